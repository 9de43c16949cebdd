-- Writing what was planned to the domain, part by part.

CREATE OR REPLACE FUNCTION ingest.publish_way() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Free the numbers of lines and the places of items that move or go.
DECLARE
    lines bigint;
    items bigint;
BEGIN
    UPDATE public.recipe_lines l
    SET line_number = -1000000 - l.line_number
    FROM pg_temp.present_lines p
    LEFT JOIN pg_temp.wanted_lines w ON w.line_id = p.id
    WHERE l.id = p.id AND l.line_number >= 0 AND w.line_number IS DISTINCT FROM p.line_number;
    GET DIAGNOSTICS lines = ROW_COUNT;

    UPDATE public.initial_tray_items i
    SET line_number = NULL, metadata = ingest.label_with(i.metadata, NULL)
    FROM pg_temp.present_items p
    LEFT JOIN pg_temp.wanted_items w ON w.item_id = p.id
    WHERE i.id = p.id
        AND (w.item_id IS NOT NULL OR EXISTS (
            SELECT FROM pg_temp.stale d WHERE d.relation = 'public.initial_tray_items'::regclass AND d.id = p.id))
        AND w.stays IS NOT true AND (w.line_number, w.ordinal) IS DISTINCT FROM (p.stored_number, p.stored_ordinal);
    GET DIAGNOSTICS items = ROW_COUNT;
    RETURN lines + items;
END
$$;

CREATE OR REPLACE FUNCTION ingest.publish_menus() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Store each menu content that pg_temp.affected needs and that is not there; note in menu_former for the parts that follow
-- which menus the recognitions have so far.
DECLARE
    stored bigint;
BEGIN
    CREATE TEMP TABLE menu_former ON COMMIT DROP AS
    SELECT r.id AS recognition_id, r.menu_id
    FROM pg_temp.affected t
    JOIN public.recognitions r ON r.id = t.recognition_id
    WHERE t.existing AND r.menu_id IS NOT NULL;
    CREATE INDEX ON pg_temp.menu_former (recognition_id);
    ANALYZE pg_temp.menu_former;
    WITH stored_menus AS (
        INSERT INTO public.menus (content_sha256)
        SELECT DISTINCT content_sha256 FROM pg_temp.menu_of ORDER BY content_sha256
        ON CONFLICT (content_sha256) DO NOTHING
        RETURNING id, content_sha256
    )
    INSERT INTO public.menu_items (menu_id, position, external_id, name, category, price, metadata)
    SELECT s.id, i.position, i.item ->> 'ExternalId', coalesce(i.item ->> 'Name', ''), i.item ->> 'Category', p.price,
        -- A price that is more than a number stays with the rest, as it was.
        i.item - CASE WHEN is_plain THEN ARRAY['ExternalId', 'Name', 'Category', 'Price']
            ELSE ARRAY['ExternalId', 'Name', 'Category'] END
    FROM stored_menus s
    JOIN (SELECT DISTINCT ON (content_sha256) content_sha256, content FROM pg_temp.menu_of ORDER BY content_sha256) c
        USING (content_sha256)
    CROSS JOIN LATERAL jsonb_array_elements(c.content) WITH ORDINALITY AS i (item, position)
    -- OFFSET 0: the price is worked out once.
    CROSS JOIN LATERAL (SELECT ingest.price_of(i.item -> 'Price') AS price OFFSET 0) p
    CROSS JOIN LATERAL (SELECT CASE jsonb_typeof(i.item -> 'Price') WHEN 'null' THEN true
        WHEN 'number' THEN p.price IS NOT NULL ELSE p.price::text = i.item ->> 'Price' END) AS q (is_plain);
    GET DIAGNOSTICS stored = ROW_COUNT;
    RETURN stored;
END
$$;

CREATE OR REPLACE FUNCTION ingest.publish_recognitions() RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
    written bigint;
BEGIN
    INSERT INTO public.recognitions (id, batch_id, menu_id, captured_on)
    SELECT t.recognition_id, t.batch_id, m.id, f.captured_on
    FROM pg_temp.affected t
    JOIN raw.receipts r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
    JOIN raw.photos f
        ON f.batch_id = t.batch_id AND f.recognition_id = t.recognition_id AND f.camera_number = 1
    LEFT JOIN pg_temp.menu_of o ON o.batch_id = t.batch_id AND o.sha256 = r.menu_sha256
    LEFT JOIN public.menus m ON m.content_sha256 = o.content_sha256
    ORDER BY t.recognition_id
    ON CONFLICT (id) DO UPDATE
        SET batch_id = excluded.batch_id, menu_id = excluded.menu_id, captured_on = excluded.captured_on
        WHERE EXISTS (SELECT FROM pg_temp.affected t WHERE t.recognition_id = excluded.id AND t.existing);
    GET DIAGNOSTICS written = ROW_COUNT;
    IF EXISTS (
        SELECT FROM pg_temp.affected t
        JOIN public.recognitions r ON r.id = t.recognition_id
        WHERE NOT t.existing AND r.batch_id IS DISTINCT FROM t.batch_id)
    THEN
        RAISE EXCEPTION USING ERRCODE = 'serialization_failure',
            MESSAGE = 'another program inserted a recognition of this batch in the meantime';
    END IF;
    RETURN written + ingest.restore_adopted_recognitions();
END
$$;

CREATE OR REPLACE FUNCTION ingest.publish_menu_entries() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Fill the app's table of menu entries, if there is one; of an entry that a menu has twice, the first counts. What others
-- added or changed stays: only an entry that is as the former menu or the adopted version has it is updated. ON CONFLICT
-- costs a look-up of each entry: a recognition that has none yet does without.
DECLARE
    written bigint := 0;
    n bigint;
    filled boolean;
BEGIN
    IF NOT ingest.has_menu_table() THEN
        RETURN 0;
    END IF;
    PERFORM ingest.keep_adopted_entries();
    CREATE TEMP TABLE menu_shown ON COMMIT DROP AS
    SELECT t.recognition_id, r.menu_id, EXISTS (
        SELECT FROM public.recognition_active_menu_items e WHERE e.recognition_id = t.recognition_id) AS has_entries
    FROM pg_temp.affected t
    JOIN public.recognitions r ON r.id = t.recognition_id
    WHERE NOT t.is_adopted;
    CREATE INDEX ON pg_temp.menu_shown (recognition_id);
    ANALYZE pg_temp.menu_shown;
    FOREACH filled IN ARRAY ARRAY[false, true] LOOP
        EXECUTE $insert$
            INSERT INTO public.recognition_active_menu_items
                (recognition_id, external_id, name, category, price, metadata)
            SELECT s.recognition_id, i.external_id, i.name, i.category, i.price, i.metadata
            FROM pg_temp.menu_shown s
            CROSS JOIN LATERAL (SELECT item.* FROM public.menu_items item WHERE item.menu_id = s.menu_id OFFSET 0) i
            WHERE s.has_entries = $1 AND i.id NOT IN (
                SELECT later.id
                FROM (SELECT DISTINCT menu_id FROM pg_temp.menu_shown) m
                JOIN public.menu_items former ON former.menu_id = m.menu_id
                JOIN public.menu_items later ON later.menu_id = former.menu_id
                    AND later.external_id = former.external_id AND later.position > former.position)
            ORDER BY s.recognition_id, i.position
        $insert$ || CASE WHEN filled THEN $conflict$
            ON CONFLICT (recognition_id, external_id) DO UPDATE
                SET name = excluded.name, category = excluded.category, price = excluded.price,
                    metadata = excluded.metadata
                WHERE (recognition_active_menu_items.name, recognition_active_menu_items.category,
                       recognition_active_menu_items.price, recognition_active_menu_items.metadata)
                    IS DISTINCT FROM (excluded.name, excluded.category, excluded.price, excluded.metadata)
                AND (EXISTS (
                    SELECT FROM pg_temp.menu_former m
                    JOIN public.menu_items f ON f.menu_id = m.menu_id AND f.external_id = excluded.external_id
                    WHERE m.recognition_id = excluded.recognition_id
                        AND (f.name, f.category, f.price, f.metadata) IS NOT DISTINCT FROM
                            (recognition_active_menu_items.name, recognition_active_menu_items.category,
                             recognition_active_menu_items.price, recognition_active_menu_items.metadata))
                OR ingest.is_as_adopted(to_jsonb(recognition_active_menu_items)))
        $conflict$ ELSE '' END
        USING filled;
        GET DIAGNOSTICS n = ROW_COUNT;
        written := written + n;
    END LOOP;
    PERFORM ingest.note_added_entries();
    RETURN written;
END
$$;

CREATE OR REPLACE FUNCTION ingest.publish_images() RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
    written bigint;
BEGIN
    INSERT INTO public.images
        (recognition_id, camera_number, storage_path, width, height, orientation, byte_size, sha256)
    SELECT f.recognition_id, f.camera_number, f.object_key, f.width, f.height, f.orientation, f.byte_size, f.sha256
    FROM pg_temp.affected t
    JOIN raw.photos f ON f.batch_id = t.batch_id AND f.recognition_id = t.recognition_id
    ORDER BY f.recognition_id, f.camera_number
    ON CONFLICT (recognition_id, camera_number) DO UPDATE
        SET storage_path = excluded.storage_path, width = excluded.width, height = excluded.height,
            orientation = excluded.orientation, byte_size = excluded.byte_size, sha256 = excluded.sha256;
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END
$$;

CREATE OR REPLACE FUNCTION ingest.publish_recipes() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Write recipes, their lines and options. A line that stays keeps all but its number. A recipe that stays gets the
-- receipt that its lines are of, unless its payload is another tool's or was left empty.
DECLARE
    written bigint;
    lines bigint;
BEGIN
    INSERT INTO public.recipes (recognition_id, raw_payload)
    SELECT t.recognition_id, r.receipt
    FROM pg_temp.affected t
    JOIN raw.receipts r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
    WHERE r.receipt IS NOT NULL
    ORDER BY t.recognition_id
    ON CONFLICT (recognition_id) DO UPDATE SET raw_payload = excluded.raw_payload
        WHERE recipes.raw_payload <> excluded.raw_payload AND EXISTS (
            SELECT FROM pg_temp.affected t
            WHERE t.recognition_id = excluded.recognition_id AND t.existing AND NOT t.was_adopted);
    GET DIAGNOSTICS written = ROW_COUNT;

    UPDATE public.recipe_lines l
    SET line_number = w.line_number
    FROM pg_temp.wanted_lines w
    WHERE w.line_id = l.id AND w.line_number <> w.former_number;
    GET DIAGNOSTICS lines = ROW_COUNT;
    written := written + lines;

    INSERT INTO public.recipe_lines (recipe_id, line_number, quantity, has_ambiguity, raw_name)
    SELECT p.id, w.line_number, w.quantity, jsonb_array_length(w.options) > 1,
        (SELECT string_agg(o.option ->> 1, ' / ' ORDER BY o.n)
         FROM jsonb_array_elements(w.options) WITH ORDINALITY AS o (option, n))
    FROM pg_temp.wanted_lines w
    JOIN public.recipes p ON p.recognition_id = w.recognition_id
    WHERE w.line_id IS NULL
    ORDER BY p.id, w.line_number;
    GET DIAGNOSTICS lines = ROW_COUNT;
    written := written + lines;

    -- The only option is selected; of several, a person selects one later.
    INSERT INTO public.recipe_line_options (recipe_line_id, external_id, name, is_selected)
    SELECT l.id, o.option ->> 0, o.option ->> 1, jsonb_array_length(w.options) = 1
    FROM pg_temp.wanted_lines w
    JOIN public.recipes p ON p.recognition_id = w.recognition_id
    -- OFFSET 0 keeps the planner from looking for a line by its number alone.
    CROSS JOIN LATERAL (
        SELECT line.id FROM public.recipe_lines line
        WHERE line.recipe_id = p.id AND line.line_number = w.line_number OFFSET 0
    ) l
    CROSS JOIN LATERAL jsonb_array_elements(w.options) WITH ORDINALITY AS o (option, n)
    WHERE w.line_id IS NULL
    ORDER BY l.id, o.n;
    GET DIAGNOSTICS lines = ROW_COUNT;
    RETURN written + lines;
END
$$;

CREATE OR REPLACE FUNCTION ingest.publish_tray_items() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- A line of quantity n gives n FOOD items, of its option if it has only one; the model may add others. An item that
-- stays keeps all but its place and, where menus are published, the entry of the menu, unless a person chose or cleared it.
DECLARE
    has_menus CONSTANT boolean := to_regclass('pg_temp.menu_former') IS NOT NULL;
    written bigint;
    moved bigint;
    chosen bigint := 0;
BEGIN
    IF has_menus THEN
        UPDATE public.initial_tray_items i
        SET menu_item_external_id = menu.external_id
        FROM pg_temp.wanted_items w
        JOIN pg_temp.present_items p ON p.id = w.item_id AND NOT p.is_decided
        LEFT JOIN LATERAL (
            SELECT m.external_id
            FROM public.recognitions r
            JOIN public.menu_items m ON m.menu_id = r.menu_id AND m.external_id = w.option ->> 0
            WHERE r.id = w.recognition_id
            LIMIT 1
        ) menu ON true
        WHERE i.id = w.item_id AND w.source = 'RECIPE_LINE_OPTION' AND w.stays IS NOT true
            AND i.menu_item_external_id IS DISTINCT FROM menu.external_id
            AND (i.menu_item_external_id IS NOT NULL OR NOT EXISTS (
                SELECT FROM pg_temp.menu_former f
                JOIN public.menu_items m ON m.menu_id = f.menu_id AND m.external_id = menu.external_id
                WHERE f.recognition_id = w.recognition_id OFFSET 0));
        GET DIAGNOSTICS chosen = ROW_COUNT;
    END IF;

    UPDATE public.initial_tray_items i
    SET line_number = w.line_number, ordinal = w.ordinal,
        metadata = CASE WHEN w.metadata ? 'qwen_label'
            THEN ingest.label_with(i.metadata, w.metadata ->> 'qwen_label') ELSE i.metadata END
    FROM pg_temp.wanted_items w
    WHERE w.item_id = i.id AND w.stays IS NOT true
        AND ((i.line_number, i.ordinal) IS DISTINCT FROM (w.line_number, w.ordinal)
            OR (w.metadata ? 'qwen_label' AND NOT i.metadata ? 'qwen_label'));
    GET DIAGNOSTICS moved = ROW_COUNT;

    INSERT INTO public.initial_tray_items (recognition_id, item_type, source, recipe_line_id, recipe_line_option_id,
        menu_item_external_id, line_number, ordinal, metadata)
    SELECT w.recognition_id, w.item_type::public.item_type, w.source::public.tray_item_source, l.id, o.id, menu.external_id,
        w.line_number, w.ordinal, w.metadata
    FROM pg_temp.wanted_items w
    LEFT JOIN public.recipes p ON p.recognition_id = w.recognition_id AND w.source = 'RECIPE_LINE_OPTION'
    LEFT JOIN public.recipe_lines l ON l.recipe_id = p.id AND l.line_number = w.line_number
    LEFT JOIN public.recipe_line_options o
        ON o.recipe_line_id = l.id AND o.external_id = w.option ->> 0 AND o.name = w.option ->> 1
    LEFT JOIN LATERAL (
        SELECT i.external_id
        FROM public.recognitions r
        JOIN public.menu_items i ON i.menu_id = r.menu_id AND i.external_id = w.option ->> 0
        -- Others may have deleted the entry since the menu was published.
        WHERE r.id = w.recognition_id AND (has_menus OR EXISTS (
            SELECT FROM public.recognition_active_menu_items e
            WHERE e.recognition_id = r.id AND e.external_id = i.external_id OFFSET 0))
        LIMIT 1
    ) menu ON true
    WHERE w.item_id IS NULL
    ORDER BY w.recognition_id, w.source DESC, w.item_type, w.line_number, w.ordinal;
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written + moved + chosen;
END
$$;

CREATE OR REPLACE FUNCTION ingest.publish_annotations() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Write one annotation for each detection. The items that they belong to are there, and stale annotations are deleted.
DECLARE
    written bigint;
    moved bigint;
    removed bigint;
BEGIN
    DELETE FROM public.initial_annotations a USING pg_temp.stale d
    WHERE d.relation = 'public.initial_annotations'::regclass AND a.id = d.id;
    GET DIAGNOSTICS removed = ROW_COUNT;

    UPDATE public.initial_annotations a
    SET detection = d.detection, label = d.label,
        initial_tray_item_id = coalesce(d.item_id, item.id)
    FROM pg_temp.wanted_detections d
    LEFT JOIN public.initial_tray_items item ON d.item_id IS NULL AND item.recognition_id = d.recognition_id
        AND item.source = d.source::public.tray_item_source AND item.line_number = d.line_number AND item.ordinal = d.ordinal
    WHERE a.id = d.annotation_id AND (a.detection, a.label, a.initial_tray_item_id)
        IS DISTINCT FROM (d.detection, d.label, coalesce(d.item_id, item.id));
    GET DIAGNOSTICS moved = ROW_COUNT;

    PERFORM ingest.restore_adopted_annotations();
    INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, detection, label, bbox, source)
    SELECT i.id, coalesce(d.item_id, item.id), d.detection, d.label, d.bbox, 'MODEL'
    FROM pg_temp.wanted_detections d
    JOIN public.images i ON i.recognition_id = d.recognition_id AND i.camera_number = d.camera_number
    LEFT JOIN public.initial_tray_items item ON d.item_id IS NULL AND item.recognition_id = d.recognition_id
        AND item.source = d.source::public.tray_item_source AND item.line_number = d.line_number AND item.ordinal = d.ordinal
    WHERE d.annotation_id IS NULL AND d.adopted_id IS NULL
    ORDER BY i.id, d.detection;
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written + moved + removed;
END
$$;

CREATE OR REPLACE FUNCTION ingest.publish_removals() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Delete the other rows of pg_temp.stale, those that reference others first.
DECLARE
    removed bigint := 0;
    n bigint;
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'initial_tray_items', 'recipe_line_options', 'recipe_lines', 'recipes', 'images',
        'recognition_active_menu_items', 'recognitions', 'menu_items', 'menus']
    LOOP
        CONTINUE WHEN NOT EXISTS (SELECT FROM pg_temp.stale d WHERE d.relation = to_regclass('public.' || name));
        EXECUTE format(
            'DELETE FROM public.%1$I x USING pg_temp.stale d WHERE d.relation = %2$L::regclass AND x.id = d.id',
            name, 'public.' || name);
        GET DIAGNOSTICS n = ROW_COUNT;
        removed := removed + n;
    END LOOP;
    RETURN removed;
END
$$;

CREATE OR REPLACE FUNCTION ingest.publish_affected(kind text)
RETURNS TABLE (operation text, rows_written bigint, seconds double precision)
LANGUAGE plpgsql
AS $$
-- Make the domain show pg_temp.affected, for which ingest.plan_affected() was called; return what each part took. A
-- batch of kind 'qwen' leaves photos, menus and receipts as they are.
DECLARE
    part text;
    started timestamptz;
BEGIN
    PERFORM ingest.refuse_referenced();
    PERFORM ingest.keep_adopted();
    -- Items and annotations before removals: an annotation that stays moves to its item before the former one goes.
    FOREACH part IN ARRAY
        CASE WHEN kind = 'load' THEN ARRAY['way', 'menus', 'recognitions', 'menu_entries', 'images', 'recipes'] ELSE ARRAY['way'] END
            || ARRAY['tray_items', 'annotations', 'removals']
    LOOP
        started := clock_timestamp();
        operation := 'transform_' || part;
        EXECUTE format('SELECT ingest.%I()', 'publish_' || part) INTO rows_written;
        seconds := extract(epoch FROM clock_timestamp() - started);
        RETURN NEXT;
    END LOOP;
END
$$;
