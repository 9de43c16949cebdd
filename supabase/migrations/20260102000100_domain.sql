-- The domain: what the annotation app reads. Every natural key is a unique constraint, so that a reload keeps ids.

CREATE TABLE public.menus (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    content_sha256 text NOT NULL UNIQUE,
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE public.menus IS 'A menu once per distinct content: content_sha256 is the hash of its jsonb text.';

CREATE TABLE public.menu_items (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    menu_id bigint NOT NULL REFERENCES public.menus (id),
    position integer NOT NULL,
    external_id text NOT NULL,
    name text NOT NULL,
    category text,
    price numeric,
    metadata jsonb NOT NULL DEFAULT '{}',
    UNIQUE (menu_id, position)
);
CREATE INDEX menu_items_external_id ON public.menu_items (menu_id, external_id);

CREATE TABLE public.recognitions (
    id bigint PRIMARY KEY,
    batch_id text NOT NULL,
    menu_id bigint REFERENCES public.menus (id),
    captured_on date,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX recognitions_batch_id ON public.recognitions (batch_id);
CREATE INDEX recognitions_menu_id ON public.recognitions (menu_id);
COMMENT ON COLUMN public.recognitions.batch_id IS 'The batch whose version of this recognition readers see.';

CREATE TABLE public.images (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    recognition_id bigint NOT NULL REFERENCES public.recognitions (id),
    camera_number smallint NOT NULL CHECK (camera_number IN (1, 2)),
    storage_path text NOT NULL,
    width integer NOT NULL,
    height integer NOT NULL,
    orientation smallint NOT NULL,
    byte_size bigint NOT NULL,
    sha256 text NOT NULL CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    UNIQUE (recognition_id, camera_number)
);
COMMENT ON COLUMN public.images.width IS 'Pixels as stored; orientation is the EXIF value, 1 when there is none.';

CREATE TABLE public.recipes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    recognition_id bigint NOT NULL UNIQUE REFERENCES public.recognitions (id)
);

CREATE TABLE public.recipe_lines (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    recipe_id bigint NOT NULL REFERENCES public.recipes (id),
    line_number integer NOT NULL CHECK (line_number > 0),
    quantity integer NOT NULL CHECK (quantity > 0),
    has_ambiguity boolean NOT NULL,
    raw_name text NOT NULL,
    UNIQUE (recipe_id, line_number)
);

CREATE TABLE public.recipe_line_options (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    recipe_line_id bigint NOT NULL REFERENCES public.recipe_lines (id),
    option_number integer NOT NULL CHECK (option_number > 0),
    external_id text NOT NULL,
    name text NOT NULL,
    UNIQUE (recipe_line_id, option_number)
);

CREATE TABLE public.initial_tray_items (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    recognition_id bigint NOT NULL REFERENCES public.recognitions (id),
    item_type text NOT NULL,
    source text NOT NULL,
    recipe_line_option_id bigint REFERENCES public.recipe_line_options (id),
    menu_item_external_id text,
    line_number integer NOT NULL DEFAULT 0,
    ordinal integer NOT NULL DEFAULT 1,
    metadata jsonb NOT NULL DEFAULT '{}',
    UNIQUE (recognition_id, item_type, source, line_number, ordinal)
);
CREATE INDEX initial_tray_items_option ON public.initial_tray_items (recipe_line_option_id);
COMMENT ON COLUMN public.initial_tray_items.line_number IS 'Receipt line, from 1; 0 when the item is on no line.';

CREATE TABLE public.initial_annotations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    image_id bigint NOT NULL REFERENCES public.images (id),
    initial_tray_item_id bigint NOT NULL REFERENCES public.initial_tray_items (id),
    detection integer NOT NULL,
    bbox jsonb NOT NULL,
    source text NOT NULL,
    UNIQUE (image_id, source, detection)
);
CREATE INDEX initial_annotations_item ON public.initial_annotations (initial_tray_item_id);

CREATE VIEW public.recognition_active_menu_items AS
SELECT r.id AS recognition_id, i.external_id, i.name, i.category, i.price, i.metadata
FROM public.recognitions r
JOIN public.menu_items i ON i.menu_id = r.menu_id;

ALTER TABLE public.menus ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.menu_items ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.recognitions ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.images ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.recipes ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.recipe_lines ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.recipe_line_options ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.initial_tray_items ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.initial_annotations ENABLE ROW LEVEL SECURITY;

-- A view runs with its owner's rights and would look past row-level security, unless told otherwise (PostgreSQL 15).
-- The roles are those of Supabase; another PostgreSQL may not have them.
DO $$
DECLARE
    role_name text;
BEGIN
    IF current_setting('server_version_num')::int >= 150000 THEN
        EXECUTE 'ALTER VIEW public.recognition_active_menu_items SET (security_invoker = true)';
    END IF;
    FOREACH role_name IN ARRAY ARRAY['anon', 'authenticated'] LOOP
        IF EXISTS (SELECT FROM pg_roles WHERE rolname = role_name) THEN
            EXECUTE format('REVOKE ALL ON public.recognition_active_menu_items FROM %I', role_name);
        END IF;
    END LOOP;
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'service_role') THEN
        GRANT USAGE ON SCHEMA public, ingest, raw TO service_role;
        GRANT ALL ON ALL TABLES IN SCHEMA ingest, raw TO service_role;
        GRANT ALL ON public.menus, public.menu_items, public.recognitions, public.images, public.recipes,
            public.recipe_lines, public.recipe_line_options, public.initial_tray_items, public.initial_annotations,
            public.recognition_active_menu_items TO service_role;
        GRANT USAGE ON ALL SEQUENCES IN SCHEMA public, ingest TO service_role;
    END IF;
END
$$;
