-- An annotation app's project before the loader comes: its tables, policies, triggers and work, and trays of an older
-- script. Tests apply it to an empty database.

CREATE TYPE public.item_type AS ENUM ('FOOD', 'BUZZER', 'PLATE', 'BOTTLE', 'OTHER');
CREATE TYPE public.tray_item_source AS ENUM ('RECIPE_LINE_OPTION', 'MENU_ITEM', 'MANUAL', 'MODEL');
CREATE TYPE public.bottle_orientation AS ENUM ('horizontal', 'vertical');

CREATE TABLE public.recognitions (
    id bigint PRIMARY KEY,
    batch_id text,
    created_at timestamptz DEFAULT now()
);
CREATE INDEX idx_recognitions_batch ON public.recognitions (batch_id);

CREATE TABLE public.images (
    id bigserial PRIMARY KEY,
    recognition_id bigint NOT NULL REFERENCES public.recognitions (id) ON DELETE CASCADE,
    camera_number integer NOT NULL CHECK (camera_number IN (1, 2)),
    storage_path text NOT NULL,
    width integer,
    height integer,
    created_at timestamptz DEFAULT now(),
    UNIQUE (recognition_id, camera_number)
);

CREATE TABLE public.recipes (
    id bigserial PRIMARY KEY,
    recognition_id bigint NOT NULL UNIQUE,
    raw_payload jsonb,
    total_amount numeric(10, 2),
    created_at timestamptz DEFAULT now()
);

CREATE TABLE public.recipe_lines (
    id bigserial PRIMARY KEY,
    recipe_id bigint NOT NULL REFERENCES public.recipes (id) ON DELETE CASCADE,
    line_number integer NOT NULL,
    quantity integer NOT NULL,
    has_ambiguity boolean DEFAULT false,
    raw_name text,
    created_at timestamptz DEFAULT now(),
    UNIQUE (recipe_id, line_number)
);

CREATE TABLE public.recipe_line_options (
    id bigserial PRIMARY KEY,
    recipe_line_id bigint NOT NULL REFERENCES public.recipe_lines (id) ON DELETE CASCADE,
    external_id text NOT NULL,
    name text NOT NULL,
    is_selected boolean DEFAULT false,
    model_score double precision,
    created_at timestamptz DEFAULT now(),
    UNIQUE (recipe_line_id, external_id, name)
);

CREATE TABLE public.recognition_active_menu_items (
    id bigserial PRIMARY KEY,
    recognition_id bigint NOT NULL REFERENCES public.recognitions (id) ON DELETE CASCADE,
    external_id text NOT NULL,
    name text NOT NULL,
    category text,
    price numeric(10, 2),
    metadata jsonb,
    created_at timestamptz DEFAULT now(),
    UNIQUE (recognition_id, external_id)
);

CREATE TABLE public.initial_tray_items (
    id bigserial PRIMARY KEY,
    recognition_id bigint NOT NULL REFERENCES public.recognitions (id) ON DELETE CASCADE,
    item_type public.item_type NOT NULL,
    source public.tray_item_source NOT NULL,
    recipe_line_option_id bigint REFERENCES public.recipe_line_options (id),
    recipe_line_id bigint REFERENCES public.recipe_lines (id) ON DELETE CASCADE,
    menu_item_external_id text,
    metadata jsonb,
    bottle_orientation public.bottle_orientation,
    created_at timestamptz DEFAULT now(),
    FOREIGN KEY (recognition_id, menu_item_external_id)
        REFERENCES public.recognition_active_menu_items (recognition_id, external_id) DEFERRABLE INITIALLY DEFERRED
);
CREATE UNIQUE INDEX uq_item_option ON public.initial_tray_items
    (recognition_id, recipe_line_option_id, (metadata ->> 'qwen_label'))
    WHERE source = 'RECIPE_LINE_OPTION' AND recipe_line_option_id IS NOT NULL;
CREATE UNIQUE INDEX uq_item_line ON public.initial_tray_items
    (recognition_id, recipe_line_id, (metadata ->> 'qwen_label'))
    WHERE source = 'RECIPE_LINE_OPTION' AND recipe_line_option_id IS NULL;
CREATE UNIQUE INDEX uq_item_model ON public.initial_tray_items
    (recognition_id, item_type, (metadata ->> 'qwen_label')) WHERE source = 'MODEL';

CREATE TABLE public.initial_annotations (
    id bigserial PRIMARY KEY,
    image_id bigint NOT NULL REFERENCES public.images (id) ON DELETE CASCADE,
    initial_tray_item_id bigint NOT NULL REFERENCES public.initial_tray_items (id) ON DELETE CASCADE,
    bbox jsonb NOT NULL,
    source text DEFAULT 'MODEL',
    is_occluded boolean DEFAULT false,
    created_at timestamptz DEFAULT now(),
    UNIQUE (image_id, initial_tray_item_id, bbox)
);

-- People's work, and a second set of the same kind for test splits.

CREATE FUNCTION public.copy_initial_state() RETURNS trigger
LANGUAGE plpgsql
AS $$
-- Copy a recognition's initial items and annotations into the tables <prefix>_items and <prefix>_annotations.
BEGIN
    EXECUTE format(
        'INSERT INTO public.%1$I (log_id, recognition_id, initial_item_id, recipe_line_id) '
        'SELECT $1, t.recognition_id, t.id, t.recipe_line_id FROM public.initial_tray_items t '
        'WHERE t.recognition_id = $2 ORDER BY t.id', TG_ARGV[0] || '_items')
    USING NEW.id, NEW.recognition_id;
    EXECUTE format(
        'INSERT INTO public.%2$I (item_id, image_id, initial_annotation_id, bbox) '
        'SELECT w.id, a.image_id, a.id, a.bbox FROM public.%1$I w '
        'JOIN public.initial_annotations a ON a.initial_tray_item_id = w.initial_item_id '
        'WHERE w.log_id = $1 ORDER BY a.id', TG_ARGV[0] || '_items', TG_ARGV[0] || '_annotations')
    USING NEW.id;
    RETURN NULL;
END
$$;

CREATE TABLE public.validation_work_log (
    id bigserial PRIMARY KEY,
    recognition_id bigint NOT NULL REFERENCES public.recognitions (id) ON DELETE CASCADE,
    created_at timestamptz DEFAULT now()
);
CREATE TABLE public.work_items (
    id bigserial PRIMARY KEY,
    log_id bigint NOT NULL REFERENCES public.validation_work_log (id) ON DELETE CASCADE,
    recognition_id bigint NOT NULL REFERENCES public.recognitions (id) ON DELETE CASCADE,
    initial_item_id bigint REFERENCES public.initial_tray_items (id),
    recipe_line_id bigint REFERENCES public.recipe_lines (id),
    created_at timestamptz DEFAULT now()
);
CREATE TABLE public.work_annotations (
    id bigserial PRIMARY KEY,
    item_id bigint NOT NULL REFERENCES public.work_items (id) ON DELETE CASCADE,
    image_id bigint NOT NULL REFERENCES public.images (id) ON DELETE CASCADE,
    initial_annotation_id bigint REFERENCES public.initial_annotations (id),
    bbox jsonb NOT NULL,
    created_at timestamptz DEFAULT now()
);
CREATE TRIGGER copy_initial_state AFTER INSERT ON public.validation_work_log
    FOR EACH ROW EXECUTE FUNCTION public.copy_initial_state('work');

CREATE TABLE public.test_split_log (LIKE public.validation_work_log INCLUDING ALL,
    FOREIGN KEY (recognition_id) REFERENCES public.recognitions (id) ON DELETE CASCADE);
CREATE TABLE public.split_items (LIKE public.work_items INCLUDING ALL,
    FOREIGN KEY (log_id) REFERENCES public.test_split_log (id) ON DELETE CASCADE,
    FOREIGN KEY (recognition_id) REFERENCES public.recognitions (id) ON DELETE CASCADE,
    FOREIGN KEY (initial_item_id) REFERENCES public.initial_tray_items (id),
    FOREIGN KEY (recipe_line_id) REFERENCES public.recipe_lines (id));
CREATE TABLE public.split_annotations (LIKE public.work_annotations INCLUDING ALL,
    FOREIGN KEY (item_id) REFERENCES public.split_items (id) ON DELETE CASCADE,
    FOREIGN KEY (image_id) REFERENCES public.images (id) ON DELETE CASCADE,
    FOREIGN KEY (initial_annotation_id) REFERENCES public.initial_annotations (id));
CREATE TRIGGER copy_initial_state AFTER INSERT ON public.test_split_log
    FOR EACH ROW EXECUTE FUNCTION public.copy_initial_state('split');

CREATE VIEW public.annotation_export AS
SELECT r.id AS recognition_id, r.batch_id, i.camera_number, i.storage_path, t.item_type, t.source, t.metadata,
    t.bottle_orientation, coalesce(o.name, l.raw_name) AS dish, m.price, a.id AS annotation_id, a.is_occluded,
    coalesce(s.bbox, w.bbox, a.bbox) AS bbox
FROM public.recognitions r
JOIN public.images i ON i.recognition_id = r.id
JOIN public.initial_annotations a ON a.image_id = i.id
JOIN public.initial_tray_items t ON t.id = a.initial_tray_item_id
LEFT JOIN public.recipe_line_options o ON o.id = t.recipe_line_option_id
LEFT JOIN public.recipe_lines l ON l.id = t.recipe_line_id
LEFT JOIN public.recognition_active_menu_items m
    ON m.recognition_id = r.id AND m.external_id = t.menu_item_external_id
LEFT JOIN public.work_annotations w ON w.initial_annotation_id = a.id
LEFT JOIN public.split_annotations s ON s.initial_annotation_id = a.id;

-- Supabase's role and the app's policies.

DO $$
DECLARE
    name text;
BEGIN
    IF to_regrole('authenticated') IS NULL THEN
        CREATE ROLE authenticated NOLOGIN;
    END IF;
    FOREACH name IN ARRAY ARRAY['recognitions', 'images', 'recipes', 'recipe_lines', 'recipe_line_options',
        'recognition_active_menu_items', 'initial_tray_items', 'initial_annotations', 'validation_work_log', 'work_items',
        'work_annotations', 'test_split_log', 'split_items', 'split_annotations'] LOOP
        EXECUTE format('ALTER TABLE public.%I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('CREATE POLICY all_for_signed_in ON public.%I TO authenticated USING (true) WITH CHECK (true)', name);
    END LOOP;
END
$$;

-- The raw tables of the older script.

CREATE SCHEMA IF NOT EXISTS raw;
CREATE TABLE raw.recognition_files (
    id bigserial PRIMARY KEY,
    recognition_id bigint NOT NULL UNIQUE,
    batch_id text,
    active_menu jsonb,
    image1_path text,
    image2_path text,
    image1_width integer,
    image1_height integer,
    image2_width integer,
    image2_height integer
);
CREATE TABLE raw.recipes (id bigserial PRIMARY KEY, recognition_id bigint NOT NULL UNIQUE, payload jsonb);
CREATE TABLE raw.qwen_annotations (
    id bigserial PRIMARY KEY,
    recognition_id bigint NOT NULL,
    image_path text NOT NULL,
    bbox jsonb NOT NULL,
    class_name text NOT NULL,
    item_type text,
    external_id text,
    UNIQUE (recognition_id, image_path, class_name, bbox)
);

-- Three trays as the older script left them: one option, several options, a plate that all boxes share.

INSERT INTO public.recognitions (id, batch_id)
VALUES (90001, 'batch_20250601_021500'), (90002, 'manual_load'), (90003, NULL);
INSERT INTO public.images (recognition_id, camera_number, storage_path, width, height)
SELECT r.id, c, format('recognitions/%s/camera%s.jpg', r.id, c), 640, 480
FROM public.recognitions r CROSS JOIN generate_series(1, 2) AS c;
INSERT INTO public.recognition_active_menu_items (recognition_id, external_id, name, category, price, metadata)
SELECT r.id, n::text, 'dish ' || n, 'soups', 100 + n, '{}' FROM public.recognitions r CROSS JOIN generate_series(1, 5) AS n;
INSERT INTO public.recipes (recognition_id, raw_payload, total_amount)
SELECT id, '[{"Count": 1, "Dishes": [{"Name": "dish 1", "ExternalId": "1"}]},
    {"Count": 2, "Dishes": [{"Name": "dish 2", "ExternalId": "2"}, {"Name": "dish 3", "ExternalId": "3"}]}]', 305.00
FROM public.recognitions;
INSERT INTO public.recipe_lines (recipe_id, line_number, quantity, has_ambiguity, raw_name)
SELECT p.id, n, n, n = 2, 'line ' || n FROM public.recipes p CROSS JOIN generate_series(1, 2) AS n;
INSERT INTO public.recipe_line_options (recipe_line_id, external_id, name, is_selected)
SELECT l.id, o::text, 'dish ' || o, l.line_number = 1
FROM public.recipe_lines l CROSS JOIN LATERAL generate_series(l.line_number, 2 * l.line_number - 1) AS o;
INSERT INTO public.initial_tray_items
    (recognition_id, item_type, source, recipe_line_option_id, recipe_line_id, menu_item_external_id, metadata)
SELECT p.recognition_id, 'FOOD', 'RECIPE_LINE_OPTION', o.id, CASE WHEN l.has_ambiguity THEN l.id END, o.external_id,
    jsonb_build_object('item_number', n, 'name', o.name)
        || CASE n WHEN 1 THEN jsonb_build_object('qwen_label', 'dish_' || l.line_number - 1) ELSE '{}' END
FROM public.recipe_lines l
JOIN public.recipes p ON p.id = l.recipe_id
CROSS JOIN LATERAL generate_series(1, l.quantity) AS n
LEFT JOIN public.recipe_line_options o ON o.recipe_line_id = l.id AND NOT l.has_ambiguity;
INSERT INTO public.initial_tray_items (recognition_id, item_type, source, metadata)
SELECT id, 'PLATE', 'MODEL', '{"qwen_label": "plate"}' FROM public.recognitions;
-- Two plates a photo, of the one item.
INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, bbox)
SELECT i.id, t.id, jsonb_build_object('x', 10 * n, 'y', 20, 'w', 50, 'h', 60)
FROM public.images i
JOIN public.initial_tray_items t ON t.recognition_id = i.recognition_id AND t.metadata ? 'qwen_label'
CROSS JOIN LATERAL generate_series(1, CASE t.item_type WHEN 'PLATE' THEN 2 ELSE 1 END) AS n;

INSERT INTO raw.recognition_files (recognition_id, batch_id, active_menu, image1_path, image2_path, image1_width,
    image1_height, image2_width, image2_height)
SELECT id, batch_id, '[{"ExternalId": "1", "Name": "dish 1", "Category": "soups", "Price": 101}]',
    format('recognitions/%s/camera1.jpg', id), format('recognitions/%s/camera2.jpg', id), 640, 480, 640, 480
FROM public.recognitions;
INSERT INTO raw.recipes (recognition_id, payload) SELECT recognition_id, raw_payload FROM public.recipes;
INSERT INTO raw.qwen_annotations (recognition_id, image_path, bbox, class_name, item_type)
SELECT i.recognition_id, format('camera%s.jpg', i.camera_number), a.bbox, t.metadata ->> 'qwen_label', t.item_type::text
FROM public.initial_annotations a
JOIN public.images i ON i.id = a.image_id
JOIN public.initial_tray_items t ON t.id = a.initial_tray_item_id;

-- What people did with them.

INSERT INTO public.validation_work_log (recognition_id) VALUES (90001);
INSERT INTO public.test_split_log (recognition_id) VALUES (90002);
UPDATE public.work_annotations SET bbox = bbox || '{"x": 12}';
UPDATE public.recipe_line_options o SET is_selected = true, model_score = 0.75
FROM public.recipe_lines l
JOIN public.recipes p ON p.id = l.recipe_id
WHERE o.recipe_line_id = l.id AND p.recognition_id = 90001 AND l.has_ambiguity AND o.external_id = '3';
INSERT INTO public.initial_tray_items (recognition_id, item_type, source, menu_item_external_id, bottle_orientation)
VALUES (90002, 'BOTTLE', 'MANUAL', '5', 'vertical');
INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, bbox, source, is_occluded)
SELECT i.id, t.id, '{"x": 1, "y": 2, "w": 3, "h": 4}', 'HUMAN', true
FROM public.images i
JOIN public.initial_tray_items t ON t.recognition_id = i.recognition_id AND t.source = 'MANUAL';

-- The app's own migrations, as the Supabase CLI records them: the first, and the newest.

CREATE SCHEMA supabase_migrations;
CREATE TABLE supabase_migrations.schema_migrations (version text NOT NULL PRIMARY KEY, statements text[], name text);
INSERT INTO supabase_migrations.schema_migrations (version, statements, name)
VALUES ('20250301100000', '{}', 'trays'), ('20260402100000', '{}', 'test_splits');
