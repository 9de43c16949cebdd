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

-- People's work.

CREATE TABLE public.validation_work_log (
    id bigserial PRIMARY KEY,
    recognition_id bigint NOT NULL REFERENCES public.recognitions (id) ON DELETE CASCADE,
    created_at timestamptz DEFAULT now()
);
CREATE TABLE public.work_items (
    id bigserial PRIMARY KEY,
    work_log_id bigint NOT NULL REFERENCES public.validation_work_log (id) ON DELETE CASCADE,
    recognition_id bigint NOT NULL REFERENCES public.recognitions (id) ON DELETE CASCADE,
    initial_item_id bigint REFERENCES public.initial_tray_items (id),
    recipe_line_id bigint REFERENCES public.recipe_lines (id),
    created_at timestamptz DEFAULT now()
);
CREATE TABLE public.work_annotations (
    id bigserial PRIMARY KEY,
    work_item_id bigint NOT NULL REFERENCES public.work_items (id) ON DELETE CASCADE,
    image_id bigint NOT NULL REFERENCES public.images (id) ON DELETE CASCADE,
    initial_annotation_id bigint REFERENCES public.initial_annotations (id),
    bbox jsonb NOT NULL,
    created_at timestamptz DEFAULT now()
);

CREATE FUNCTION public.copy_initial_state() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO public.work_items (work_log_id, recognition_id, initial_item_id, recipe_line_id)
    SELECT NEW.id, NEW.recognition_id, t.id, t.recipe_line_id
    FROM public.initial_tray_items t WHERE t.recognition_id = NEW.recognition_id;
    INSERT INTO public.work_annotations (work_item_id, image_id, initial_annotation_id, bbox)
    SELECT w.id, a.image_id, a.id, a.bbox
    FROM public.work_items w
    JOIN public.initial_annotations a ON a.initial_tray_item_id = w.initial_item_id
    WHERE w.work_log_id = NEW.id;
    RETURN NULL;
END
$$;
CREATE TRIGGER copy_initial_state AFTER INSERT ON public.validation_work_log
    FOR EACH ROW EXECUTE FUNCTION public.copy_initial_state();

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
        'work_annotations'] LOOP
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
INSERT INTO public.recipes (recognition_id, raw_payload) SELECT id, '[]' FROM public.recognitions;
INSERT INTO public.recipe_lines (recipe_id, line_number, quantity, has_ambiguity, raw_name)
SELECT p.id, n, n, n = 2, 'line ' || n FROM public.recipes p CROSS JOIN generate_series(1, 2) AS n;
INSERT INTO public.recipe_line_options (recipe_line_id, external_id, name, is_selected)
SELECT l.id, o::text, 'dish ' || o, l.line_number = 1
FROM public.recipe_lines l CROSS JOIN LATERAL generate_series(l.line_number, 2 * l.line_number - 1) AS o;
INSERT INTO public.initial_tray_items
    (recognition_id, item_type, source, recipe_line_option_id, recipe_line_id, menu_item_external_id, metadata)
SELECT p.recognition_id, 'FOOD', 'RECIPE_LINE_OPTION', o.id, CASE WHEN l.has_ambiguity THEN l.id END, o.external_id,
    jsonb_strip_nulls(jsonb_build_object('item_number', n, 'name', o.name,
        'qwen_label', CASE n WHEN 1 THEN 'dish_' || l.line_number - 1 END))
FROM public.recipe_lines l
JOIN public.recipes p ON p.id = l.recipe_id
CROSS JOIN LATERAL generate_series(1, l.quantity) AS n
LEFT JOIN public.recipe_line_options o ON o.recipe_line_id = l.id AND NOT l.has_ambiguity;
INSERT INTO public.initial_tray_items (recognition_id, item_type, source, metadata)
SELECT id, 'PLATE', 'MODEL', '{"qwen_label": "plate"}' FROM public.recognitions;
INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, bbox)
SELECT i.id, t.id, jsonb_build_object('x', 10 * t.id, 'y', 20, 'w', 50, 'h', 60)
FROM public.images i
JOIN public.initial_tray_items t ON t.recognition_id = i.recognition_id AND t.metadata ? 'qwen_label';
INSERT INTO public.validation_work_log (recognition_id) VALUES (90001);
