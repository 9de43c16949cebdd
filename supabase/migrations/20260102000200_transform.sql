-- The transform: from the raw rows of chosen versions to the domain, set by set.
--
-- ingest.publish_touched() makes the domain show, for every row (recognition_id, batch_id) of the temporary table
-- pg_temp.touched, what that batch's raw rows say. A load touches its own recognitions with its own batch; a reset
-- touches the same ones with their former batches. Everything goes by natural key: rows that stay keep their ids.

CREATE FUNCTION ingest.refuse_referenced() RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
-- Raise IN001 when a row of a table that is not ours references a row of pg_temp.doomed (relation, id).
DECLARE
    ours CONSTANT regclass[] := ARRAY[
        'public.menus', 'public.menu_items', 'public.recognitions', 'public.images', 'public.recipes',
        'public.recipe_lines', 'public.recipe_line_options', 'public.initial_tray_items',
        'public.initial_annotations']::regclass[];
    link record;
    referencing bigint;
    found text[] := '{}';
BEGIN
    FOR link IN
        SELECT c.conrelid::regclass AS app, c.confrelid::regclass AS target,
            (SELECT string_agg(format('app.%I = target.%I', a.attname, b.attname), ' AND ')
             FROM unnest(c.conkey, c.confkey) AS k (app_column, target_column)
             JOIN pg_catalog.pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.app_column
             JOIN pg_catalog.pg_attribute b ON b.attrelid = c.confrelid AND b.attnum = k.target_column) AS condition
        FROM pg_catalog.pg_constraint c
        WHERE c.contype = 'f' AND c.conparentid = 0 AND c.confrelid = ANY (ours::oid[])
            AND c.conrelid <> ALL (ours::oid[])
            AND EXISTS (SELECT FROM pg_temp.doomed d WHERE d.relation = c.confrelid)
        ORDER BY 1, 2
    LOOP
        -- Lock first: a reference that arrives meanwhile waits, and then finds the row gone.
        EXECUTE format(
            'SELECT count(*) FROM (SELECT target.* FROM %1$s target JOIN pg_temp.doomed d '
            'ON d.relation = %2$L::regclass AND d.id = target.id FOR UPDATE OF target) target '
            'JOIN %3$s app ON %4$s',
            link.target, link.target::text, link.app, link.condition)
        INTO referencing;
        IF referencing > 0 THEN
            found := found || format('%s (%s rows, to %s)', link.app, referencing, link.target);
        END IF;
    END LOOP;
    IF cardinality(found) > 0 THEN
        RAISE EXCEPTION USING ERRCODE = 'IN001',
            MESSAGE = 'rows of other tables reference what would be deleted: ' || array_to_string(found, ', ');
    END IF;
END
$$;

CREATE FUNCTION ingest.publish_menus() RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET random_page_cost = 1.1
AS $$
-- Store each menu content that pg_temp.touched needs and that is not there; leave pg_temp.menu_of behind.
DECLARE
    stored bigint;
BEGIN
    CREATE TEMP TABLE menu_of ON COMMIT DROP AS
    SELECT DISTINCT ON (m.batch_id, m.sha256)
        m.batch_id, m.sha256, encode(sha256(convert_to(m.content::text, 'UTF8')), 'hex') AS content_sha256, m.content
    FROM (SELECT DISTINCT t.batch_id, r.menu_sha256
          FROM pg_temp.touched t
          JOIN raw.recipes r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
          WHERE r.menu_sha256 IS NOT NULL) needed
    JOIN raw.menus m ON m.batch_id = needed.batch_id AND m.sha256 = needed.menu_sha256
    ORDER BY m.batch_id, m.sha256, m.shard;
    ANALYZE pg_temp.menu_of;

    WITH stored_menus AS (
        INSERT INTO public.menus (content_sha256)
        SELECT DISTINCT content_sha256 FROM pg_temp.menu_of ORDER BY content_sha256
        ON CONFLICT (content_sha256) DO NOTHING
        RETURNING id, content_sha256
    )
    INSERT INTO public.menu_items (menu_id, position, external_id, name, category, price, metadata)
    SELECT s.id, i.position, i.item ->> 'ExternalId', coalesce(i.item ->> 'Name', ''), i.item ->> 'Category',
        CASE WHEN is_price THEN (i.item ->> 'Price')::numeric END,
        -- A price that is no number stays with the rest, as it was.
        i.item - CASE WHEN is_price THEN ARRAY['ExternalId', 'Name', 'Category', 'Price']
            ELSE ARRAY['ExternalId', 'Name', 'Category'] END
    FROM stored_menus s
    JOIN (SELECT DISTINCT ON (content_sha256) content_sha256, content FROM pg_temp.menu_of ORDER BY content_sha256) c
        USING (content_sha256)
    CROSS JOIN LATERAL jsonb_array_elements(c.content) WITH ORDINALITY AS i (item, position)
    CROSS JOIN LATERAL (SELECT jsonb_typeof(i.item -> 'Price') IN ('number', 'null')
        OR i.item ->> 'Price' ~ '^[+-]?[0-9]{1,100}([.][0-9]{1,100})?\Z') AS p (is_price);
    GET DIAGNOSTICS stored = ROW_COUNT;
    RETURN stored;
END
$$;

CREATE FUNCTION ingest.publish_recognitions() RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET random_page_cost = 1.1
AS $$
DECLARE
    written bigint;
BEGIN
    INSERT INTO public.recognitions (id, batch_id, menu_id, captured_on)
    SELECT t.recognition_id, t.batch_id, m.id, f.captured_on
    FROM pg_temp.touched t
    JOIN raw.recipes r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
    JOIN raw.recognition_files f
        ON f.batch_id = t.batch_id AND f.recognition_id = t.recognition_id AND f.camera_number = 1
    LEFT JOIN pg_temp.menu_of o ON o.batch_id = t.batch_id AND o.sha256 = r.menu_sha256
    LEFT JOIN public.menus m ON m.content_sha256 = o.content_sha256
    ORDER BY t.recognition_id
    ON CONFLICT (id) DO UPDATE
        SET batch_id = excluded.batch_id, menu_id = excluded.menu_id, captured_on = excluded.captured_on;
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END
$$;

CREATE FUNCTION ingest.publish_images() RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET random_page_cost = 1.1
AS $$
DECLARE
    written bigint;
BEGIN
    INSERT INTO public.images
        (recognition_id, camera_number, storage_path, width, height, orientation, byte_size, sha256)
    SELECT f.recognition_id, f.camera_number, f.object_key, f.width, f.height, f.orientation, f.byte_size, f.sha256
    FROM pg_temp.touched t
    JOIN raw.recognition_files f ON f.batch_id = t.batch_id AND f.recognition_id = t.recognition_id
    ORDER BY f.recognition_id, f.camera_number
    ON CONFLICT (recognition_id, camera_number) DO UPDATE
        SET storage_path = excluded.storage_path, width = excluded.width, height = excluded.height,
            orientation = excluded.orientation, byte_size = excluded.byte_size, sha256 = excluded.sha256;
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END
$$;

CREATE FUNCTION ingest.publish_recipes() RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET random_page_cost = 1.1
AS $$
-- Write recipes, their lines and options; leave pg_temp.wanted_lines behind.
DECLARE
    written bigint;
    lines bigint;
BEGIN
    CREATE TEMP TABLE wanted_lines ON COMMIT DROP AS
    SELECT t.recognition_id, l.line_number::integer AS line_number, (l.line ->> 'Count')::integer AS quantity,
        l.line -> 'Dishes' AS dishes
    FROM pg_temp.touched t
    JOIN raw.recipes r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
    CROSS JOIN LATERAL jsonb_array_elements(r.receipt) WITH ORDINALITY AS l (line, line_number);
    CREATE UNIQUE INDEX ON pg_temp.wanted_lines (recognition_id, line_number);
    ANALYZE pg_temp.wanted_lines;

    INSERT INTO public.recipes (recognition_id)
    SELECT t.recognition_id
    FROM pg_temp.touched t
    JOIN raw.recipes r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
    WHERE r.receipt IS NOT NULL
    ORDER BY t.recognition_id
    ON CONFLICT (recognition_id) DO NOTHING;
    GET DIAGNOSTICS written = ROW_COUNT;

    INSERT INTO public.recipe_lines (recipe_id, line_number, quantity, has_ambiguity, raw_name)
    SELECT p.id, w.line_number, w.quantity, jsonb_array_length(w.dishes) > 1,
        (SELECT string_agg(d.dish ->> 'Name', ' / ' ORDER BY d.n)
         FROM jsonb_array_elements(w.dishes) WITH ORDINALITY AS d (dish, n))
    FROM pg_temp.wanted_lines w
    JOIN public.recipes p ON p.recognition_id = w.recognition_id
    ORDER BY p.id, w.line_number
    ON CONFLICT (recipe_id, line_number) DO UPDATE
        SET quantity = excluded.quantity, has_ambiguity = excluded.has_ambiguity, raw_name = excluded.raw_name
        WHERE (recipe_lines.quantity, recipe_lines.has_ambiguity, recipe_lines.raw_name)
            IS DISTINCT FROM (excluded.quantity, excluded.has_ambiguity, excluded.raw_name);
    GET DIAGNOSTICS lines = ROW_COUNT;
    written := written + lines;

    INSERT INTO public.recipe_line_options (recipe_line_id, option_number, external_id, name)
    SELECT l.id, d.n, d.dish ->> 'ExternalId', d.dish ->> 'Name'
    FROM pg_temp.wanted_lines w
    JOIN public.recipes p ON p.recognition_id = w.recognition_id
    JOIN public.recipe_lines l ON l.recipe_id = p.id AND l.line_number = w.line_number
    CROSS JOIN LATERAL jsonb_array_elements(w.dishes) WITH ORDINALITY AS d (dish, n)
    ORDER BY l.id, d.n
    ON CONFLICT (recipe_line_id, option_number) DO UPDATE
        SET external_id = excluded.external_id, name = excluded.name
        WHERE (recipe_line_options.external_id, recipe_line_options.name)
            IS DISTINCT FROM (excluded.external_id, excluded.name);
    GET DIAGNOSTICS lines = ROW_COUNT;
    RETURN written + lines;
END
$$;

CREATE FUNCTION ingest.publish_tray_items() RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET random_page_cost = 1.1
AS $$
-- A line of quantity n gives n FOOD items, of its first option.
DECLARE
    written bigint;
BEGIN
    INSERT INTO public.initial_tray_items
        (recognition_id, item_type, source, recipe_line_option_id, menu_item_external_id, line_number, ordinal, metadata)
    SELECT w.recognition_id, 'FOOD', 'RECIPE_LINE_OPTION', o.id, o.external_id, w.line_number, n.ordinal,
        jsonb_build_object('name', o.name)
    FROM pg_temp.wanted_lines w
    JOIN public.recipes p ON p.recognition_id = w.recognition_id
    JOIN public.recipe_lines l ON l.recipe_id = p.id AND l.line_number = w.line_number
    JOIN public.recipe_line_options o ON o.recipe_line_id = l.id AND o.option_number = 1
    CROSS JOIN LATERAL generate_series(1, w.quantity) AS n (ordinal)
    ORDER BY w.recognition_id, w.line_number, n.ordinal
    ON CONFLICT (recognition_id, item_type, source, line_number, ordinal) DO UPDATE
        SET recipe_line_option_id = excluded.recipe_line_option_id,
            menu_item_external_id = excluded.menu_item_external_id, metadata = excluded.metadata
        WHERE (initial_tray_items.recipe_line_option_id, initial_tray_items.menu_item_external_id,
               initial_tray_items.metadata)
            IS DISTINCT FROM (excluded.recipe_line_option_id, excluded.menu_item_external_id, excluded.metadata);
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END
$$;

CREATE FUNCTION ingest.remove_vanished() RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET random_page_cost = 1.1
AS $$
-- Delete what an earlier version of a touched recognition had and this one has not; needs pg_temp.wanted_lines.
DECLARE
    removed bigint := 0;
    n bigint;
BEGIN
    CREATE TEMP TABLE doomed (relation oid NOT NULL, id bigint NOT NULL) ON COMMIT DROP;
    IF NOT EXISTS (SELECT FROM pg_temp.touched WHERE existing) THEN
        RETURN 0;
    END IF;

    INSERT INTO pg_temp.doomed
    SELECT 'public.initial_tray_items'::regclass, i.id
    FROM pg_temp.touched t
    JOIN public.initial_tray_items i ON i.recognition_id = t.recognition_id
    LEFT JOIN pg_temp.wanted_lines w
        ON w.recognition_id = i.recognition_id AND w.line_number = i.line_number AND i.ordinal <= w.quantity
    WHERE t.existing AND i.item_type = 'FOOD' AND i.source = 'RECIPE_LINE_OPTION' AND w.recognition_id IS NULL;

    INSERT INTO pg_temp.doomed
    SELECT 'public.initial_annotations'::regclass, a.id
    FROM pg_temp.doomed d
    JOIN public.initial_annotations a ON a.initial_tray_item_id = d.id
    WHERE d.relation = 'public.initial_tray_items'::regclass;

    INSERT INTO pg_temp.doomed
    SELECT 'public.recipe_line_options'::regclass, o.id
    FROM pg_temp.touched t
    JOIN public.recipes p ON p.recognition_id = t.recognition_id
    JOIN public.recipe_lines l ON l.recipe_id = p.id
    JOIN public.recipe_line_options o ON o.recipe_line_id = l.id
    LEFT JOIN pg_temp.wanted_lines w ON w.recognition_id = t.recognition_id AND w.line_number = l.line_number
        AND o.option_number <= jsonb_array_length(w.dishes)
    WHERE t.existing AND w.recognition_id IS NULL;

    INSERT INTO pg_temp.doomed
    SELECT 'public.recipe_lines'::regclass, l.id
    FROM pg_temp.touched t
    JOIN public.recipes p ON p.recognition_id = t.recognition_id
    JOIN public.recipe_lines l ON l.recipe_id = p.id
    LEFT JOIN pg_temp.wanted_lines w ON w.recognition_id = t.recognition_id AND w.line_number = l.line_number
    WHERE t.existing AND w.recognition_id IS NULL;

    INSERT INTO pg_temp.doomed
    SELECT 'public.recipes'::regclass, p.id
    FROM pg_temp.touched t
    JOIN public.recipes p ON p.recognition_id = t.recognition_id
    JOIN raw.recipes r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
    WHERE t.existing AND r.receipt IS NULL;

    ANALYZE pg_temp.doomed;
    PERFORM ingest.refuse_referenced();

    DELETE FROM public.initial_annotations x USING pg_temp.doomed d
    WHERE d.relation = 'public.initial_annotations'::regclass AND x.id = d.id;
    GET DIAGNOSTICS n = ROW_COUNT;
    removed := removed + n;
    DELETE FROM public.initial_tray_items x USING pg_temp.doomed d
    WHERE d.relation = 'public.initial_tray_items'::regclass AND x.id = d.id;
    GET DIAGNOSTICS n = ROW_COUNT;
    removed := removed + n;
    DELETE FROM public.recipe_line_options x USING pg_temp.doomed d
    WHERE d.relation = 'public.recipe_line_options'::regclass AND x.id = d.id;
    GET DIAGNOSTICS n = ROW_COUNT;
    removed := removed + n;
    DELETE FROM public.recipe_lines x USING pg_temp.doomed d
    WHERE d.relation = 'public.recipe_lines'::regclass AND x.id = d.id;
    GET DIAGNOSTICS n = ROW_COUNT;
    removed := removed + n;
    DELETE FROM public.recipes x USING pg_temp.doomed d
    WHERE d.relation = 'public.recipes'::regclass AND x.id = d.id;
    GET DIAGNOSTICS n = ROW_COUNT;
    RETURN removed + n;
END
$$;

CREATE FUNCTION ingest.publish_touched() RETURNS TABLE (operation text, rows_written bigint, seconds double precision)
LANGUAGE plpgsql
SET search_path = ''
AS $$
-- Make the domain show pg_temp.touched; return what each statement took.
DECLARE
    started timestamptz;
BEGIN
    started := clock_timestamp();
    operation := 'transform_menus';
    rows_written := ingest.publish_menus();
    seconds := extract(epoch FROM clock_timestamp() - started);
    RETURN NEXT;

    started := clock_timestamp();
    operation := 'transform_recognitions';
    rows_written := ingest.publish_recognitions();
    seconds := extract(epoch FROM clock_timestamp() - started);
    RETURN NEXT;

    started := clock_timestamp();
    operation := 'transform_images';
    rows_written := ingest.publish_images();
    seconds := extract(epoch FROM clock_timestamp() - started);
    RETURN NEXT;

    started := clock_timestamp();
    operation := 'transform_recipes';
    rows_written := ingest.publish_recipes();
    seconds := extract(epoch FROM clock_timestamp() - started);
    RETURN NEXT;

    -- Items before removals: an item of a line that stays moves to its option before anything goes.
    started := clock_timestamp();
    operation := 'transform_tray_items';
    rows_written := ingest.publish_tray_items();
    seconds := extract(epoch FROM clock_timestamp() - started);
    RETURN NEXT;

    started := clock_timestamp();
    operation := 'transform_removals';
    rows_written := ingest.remove_vanished();
    seconds := extract(epoch FROM clock_timestamp() - started);
    RETURN NEXT;
END
$$;

CREATE FUNCTION ingest.transform_batch(batch text)
RETURNS TABLE (operation text, rows_written bigint, seconds double precision)
LANGUAGE plpgsql
SET search_path = ''
AS $$
-- Make the domain show every recognition of the batch in the batch's version.
BEGIN
    CREATE TEMP TABLE touched ON COMMIT DROP AS
    SELECT r.recognition_id, r.batch_id,
        EXISTS (SELECT FROM public.recognitions p WHERE p.id = r.recognition_id) AS existing
    FROM raw.recipes r
    WHERE r.batch_id = batch;
    CREATE UNIQUE INDEX ON pg_temp.touched (recognition_id);
    ANALYZE pg_temp.touched;
    RETURN QUERY SELECT * FROM ingest.publish_touched();
END
$$;
