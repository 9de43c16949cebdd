-- What readers see of a recognition follows from three batches alone: the newest finished one of kind 'load' that holds
-- it, and for each of its two photos the newest finished one of kind 'qwen'. A commit and a reset do the same with it.
-- They list the recognitions that they affect in the temporary table pg_temp.affected:
--
--     recognition_id, batch_id (of its photos; NULL when none is left, so that its rows go), qwen_batch_ids (of the
--     annotations of camera 1 and 2; NULL where there are none), existing (whether the domain has it already)
--
-- ingest.plan_affected() works out from the raw rows what is wanted, and which rows are stale (pg_temp.stale), and
-- changes nothing; ingest.publish_affected() writes the one and deletes the other. Rows go by natural key: those that
-- stay keep their ids.
--
-- The settings of the planner stand once, on the entry functions at the end; the functions that these call inherit
-- them. Every join goes through an index, row by row, in the order in which it is written: right after a bulk load there
-- are no statistics yet, a scan of a whole table looks cheap, and the cost of a batch must not depend on what is loaded
-- already.

-- What documents say

CREATE FUNCTION ingest.array_of(value jsonb) RETURNS jsonb
LANGUAGE sql STABLE
AS $$
-- A single object stands for an array of one.
    SELECT CASE WHEN jsonb_typeof(value) = 'object' THEN jsonb_build_array(value) ELSE value END
$$;

CREATE FUNCTION ingest.quantity_of(count jsonb) RETURNS integer
LANGUAGE sql IMMUTABLE
AS $$
-- The items of a receipt line: its Count, or one if that is the amount of weighed goods.
    SELECT CASE WHEN count::double precision = trunc(count::double precision) THEN count::integer ELSE 1 END
$$;

CREATE FUNCTION ingest.price_of(price jsonb) RETURNS numeric
LANGUAGE sql IMMUTABLE
AS $$
-- The amount of a price, NULL if there is none. pipeline/dataset/prices.py has the same rule.
    SELECT CASE WHEN abs(amount) < 10000000 THEN amount END
    FROM (
        SELECT CASE WHEN jsonb_typeof(price) = 'number' THEN price::numeric
            WHEN written IS NOT NULL
                THEN translate(regexp_replace(written, '[ ''’]|[.,](?=.*[.,])', '', 'g'), ',', '.')::numeric
            END AS amount
        FROM (
            SELECT CASE WHEN jsonb_typeof(price) = 'string' THEN (regexp_match(
                translate(price #>> '{}', U&'\00a0\2009\202f', '   '),
                '^ *(?:(?:₽|€|[$]|£|₸|₴|₺|rub|eur|usd|gbp|kzt|[рР](?:[уУ][бБ])?[.]?) *)?'
                '([+-]?(?:[0-9]{1,100}(?:[.](?:[0-9]{1,2}|[0-9]{4,100}))?'
                '|(?:0|[0-9]{4,100})[.][0-9]{3}|[0-9]{1,100},[0-9]{1,2}|0,[0-9]{1,100}'
                '|[0-9]{1,3}(?:[ ''’][0-9]{3})+(?:[.,][0-9]{1,2})?'
                '|[0-9]{1,3}(?:,[0-9]{3})+[.][0-9]{1,2}|[0-9]{1,3}(?:[.][0-9]{3})+,[0-9]{1,2}))'
                '(?: *(?:₽|€|[$]|£|₸|₴|₺|rub|eur|usd|gbp|kzt|[рР](?:[уУ][бБ])?[.]?))? *$', 'i'))[1] END AS written
        ) found
    ) known
$$;

-- What readers see, and what stands in the way

CREATE FUNCTION ingest.newest_version(wanted_kind text, recognition bigint, camera smallint, besides text)
RETURNS SETOF text
LANGUAGE sql STABLE
AS $$
-- The finished batch whose version of a recognition, or of its photo of a camera, readers see, were it not for the
-- batch `besides`.
    SELECT b.id
    FROM ingest.manifest m
    JOIN ingest.batches b ON b.id = m.batch_id
    WHERE m.recognition_id = recognition AND (camera IS NULL OR camera = ANY (m.cameras))
        AND b.kind = wanted_kind AND b.state = 'done' AND b.id <> besides
    ORDER BY b.version DESC
    LIMIT 1
$$;

CREATE FUNCTION ingest.newest_annotations(recognition bigint, besides text) RETURNS text[]
LANGUAGE sql STABLE
AS $$
-- The batches whose annotations of camera 1 and 2 readers see, were it not for the batch `besides`.
    SELECT ARRAY[(SELECT q FROM ingest.newest_version('qwen', recognition, 1::smallint, besides) q),
                 (SELECT q FROM ingest.newest_version('qwen', recognition, 2::smallint, besides) q)]
$$;

CREATE FUNCTION ingest.is_same_photo(
    m ingest.manifest, camera smallint, width integer, height integer, orientation integer) RETURNS boolean
LANGUAGE sql IMMUTABLE
AS $$
-- Whether a photo has the size and orientation for which the boxes of a batch of kind 'qwen' were worked out.
    SELECT ARRAY[width, height, orientation] = ARRAY[m.widths[at], m.heights[at], m.orientations[at]]::integer[]
    FROM array_position(m.cameras, camera) AS at
$$;

CREATE FUNCTION ingest.find_references(locking boolean)
RETURNS TABLE (app regclass, target regclass, referencing bigint)
LANGUAGE plpgsql
SET search_path = ''
AS $$
-- Return which tables reference rows of pg_temp.stale (relation, id) with rows that others wrote, and how many.
DECLARE
    ours CONSTANT regclass[] := ARRAY[
        'public.menus', 'public.menu_items', 'public.recognitions', 'public.images', 'public.recipes',
        'public.recipe_lines', 'public.recipe_line_options', 'public.initial_tray_items',
        'public.initial_annotations']::regclass[];
    condition text;
BEGIN
    FOR app, target, condition IN
        SELECT c.conrelid::regclass, c.confrelid::regclass,
            (SELECT string_agg(format('app.%I = target.%I', a.attname, b.attname), ' AND ')
             FROM unnest(c.conkey, c.confkey) AS k (app_column, target_column)
             JOIN pg_catalog.pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.app_column
             JOIN pg_catalog.pg_attribute b ON b.attrelid = c.confrelid AND b.attnum = k.target_column)
            || CASE c.conrelid WHEN 'public.initial_annotations'::regclass THEN ' AND app.source IS DISTINCT FROM ''MODEL'''
                WHEN 'public.initial_tray_items'::regclass
                    THEN ' AND app.source NOT IN (''RECIPE_LINE_OPTION'', ''MODEL'')'
                ELSE '' END
        FROM pg_catalog.pg_constraint c
        WHERE c.contype = 'f' AND c.conparentid = 0 AND c.confrelid = ANY (ours::oid[])
            AND c.conrelid <> ALL (ours[:7]::oid[])
            AND EXISTS (SELECT FROM pg_temp.stale d WHERE d.relation = c.confrelid)
        ORDER BY 1, 2
    LOOP
        IF locking THEN
            -- First, and in a statement of its own, so that the next one sees what this one waited for: a reference
            -- that arrives later waits for us, and then finds the row gone.
            EXECUTE format(
                'SELECT count(*) FROM (SELECT FROM %1$s target WHERE target.id IN '
                '(SELECT d.id FROM pg_temp.stale d WHERE d.relation = %2$L::regclass) '
                'ORDER BY target.id FOR UPDATE) locked',
                target, target::text)
            INTO referencing;
        END IF;
        EXECUTE format(
            'SELECT count(*) FROM %1$s target '
            'JOIN pg_temp.stale d ON d.relation = %2$L::regclass AND d.id = target.id JOIN %3$s app ON %4$s',
            target, target::text, app, condition)
        INTO referencing;
        IF referencing > 0 THEN
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;

CREATE FUNCTION ingest.refuse_referenced() RETURNS void
LANGUAGE plpgsql
AS $$
-- Raise IN001 when a row that others wrote references a row of pg_temp.stale.
DECLARE
    found text;
BEGIN
    SELECT string_agg(format('%s (%s %s, to %s)', r.app, r.referencing,
        CASE r.referencing WHEN 1 THEN 'row' ELSE 'rows' END, r.target), ', ')
    INTO found
    FROM ingest.find_references(true) r;
    IF found IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'IN001',
            MESSAGE = 'rows of other tables reference what would be deleted: ' || found;
    END IF;
END
$$;

-- What is wanted, what is stale

CREATE FUNCTION ingest.plan_wanted() RETURNS void
LANGUAGE plpgsql
AS $$
-- Work out menu_of, wanted_lines and wanted_detections (all in pg_temp) from the raw rows of pg_temp.affected.
BEGIN
    CREATE TEMP TABLE menu_of ON COMMIT DROP AS
    SELECT DISTINCT ON (m.batch_id, m.sha256)
        m.batch_id, m.sha256, encode(sha256(convert_to(m.content::text, 'UTF8')), 'hex') AS content_sha256,
        ingest.array_of(m.content) AS content
    FROM (SELECT DISTINCT t.batch_id, r.menu_sha256
          FROM pg_temp.affected t
          JOIN raw.receipts r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
          WHERE r.menu_sha256 IS NOT NULL) needed
    JOIN raw.menus m ON m.batch_id = needed.batch_id AND m.sha256 = needed.menu_sha256
    ORDER BY m.batch_id, m.sha256, m.shard;
    CREATE UNIQUE INDEX ON pg_temp.menu_of (batch_id, sha256);
    CREATE INDEX ON pg_temp.menu_of (content_sha256);
    ANALYZE pg_temp.menu_of;

    CREATE TEMP TABLE wanted_lines ON COMMIT DROP AS
    SELECT t.recognition_id, l.line_number::integer AS line_number, ingest.quantity_of(l.line -> 'Count') AS quantity,
        -- Compared as floats, as quantity_of does: 0.99999999999999999999 is a whole item.
        CASE WHEN (l.line -> 'Count')::double precision <> ingest.quantity_of(l.line -> 'Count')
            THEN l.line -> 'Count' END AS amount,
        ingest.array_of(l.line -> 'Dishes') AS dishes
    FROM pg_temp.affected t
    JOIN raw.receipts r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
    CROSS JOIN LATERAL jsonb_array_elements(ingest.array_of(r.receipt)) WITH ORDINALITY AS l (line, line_number);
    CREATE UNIQUE INDEX ON pg_temp.wanted_lines (recognition_id, line_number);
    ANALYZE pg_temp.wanted_lines;

    -- The j-th dish_k of a photo belongs to item min(j, n) of receipt line k + 1 of quantity n; without such a line,
    -- to the j-th item that the model alone saw there. The j-th plate belongs to the j-th PLATE item.
    CREATE TEMP TABLE wanted_detections ON COMMIT DROP AS
    SELECT d.recognition_id, d.camera_number, d.detection, d.label, d.x1, d.y1, d.x2, d.y2,
        CASE WHEN d.line_number = 0 THEN 'PLATE' ELSE 'FOOD' END AS item_type,
        CASE WHEN w.quantity IS NULL THEN 'MODEL' ELSE 'RECIPE_LINE_OPTION' END AS source,
        d.line_number,
        least(d.nth, coalesce(w.quantity, d.nth)) AS ordinal
    FROM (
        SELECT q.recognition_id, q.camera_number, q.detection, q.label, q.x1, q.y1, q.x2, q.y2,
            CASE WHEN q.label = 'plate' THEN 0 ELSE substring(q.label FROM 'dish_([0-9]+)')::integer + 1 END
                AS line_number,
            (row_number() OVER (PARTITION BY q.recognition_id, q.camera_number, q.label ORDER BY q.detection))::integer
                AS nth
        FROM pg_temp.affected t
        CROSS JOIN LATERAL unnest(t.qwen_batch_ids) WITH ORDINALITY AS newest (batch_id, camera_number)
        JOIN raw.photos f ON f.batch_id = t.batch_id AND f.recognition_id = t.recognition_id
            AND f.camera_number = newest.camera_number
        JOIN ingest.manifest m ON m.batch_id = newest.batch_id AND m.recognition_id = t.recognition_id
        -- OFFSET 0 keeps the planner from reading all detections of a batch at once for a camera.
        CROSS JOIN LATERAL (
            SELECT one.* FROM raw.detections one
            WHERE one.batch_id = newest.batch_id AND one.recognition_id = t.recognition_id
                AND one.camera_number = newest.camera_number
            OFFSET 0
        ) q
        WHERE ingest.is_same_photo(m, f.camera_number, f.width, f.height, f.orientation)
    ) d
    LEFT JOIN pg_temp.wanted_lines w ON w.recognition_id = d.recognition_id AND w.line_number = d.line_number;
    CREATE UNIQUE INDEX ON pg_temp.wanted_detections (recognition_id, camera_number, detection);
    CREATE INDEX ON pg_temp.wanted_detections (recognition_id, item_type, source, line_number, ordinal);
    ANALYZE pg_temp.wanted_detections;
END
$$;

CREATE FUNCTION ingest.plan_stale() RETURNS void
LANGUAGE plpgsql
AS $$
-- Work out pg_temp.stale: what the domain has of pg_temp.affected, and is wanted no more. OFFSET 0 keeps the planner
-- from beginning with a table of the domain.
BEGIN
    CREATE TEMP TABLE stale (relation oid NOT NULL, id bigint NOT NULL) ON COMMIT DROP;
    IF NOT EXISTS (SELECT FROM pg_temp.affected WHERE existing) THEN
        RETURN;
    END IF;

    INSERT INTO pg_temp.stale
    SELECT 'public.initial_annotations'::regclass, a.id
    FROM pg_temp.affected t
    CROSS JOIN LATERAL (
        SELECT image.id, image.camera_number FROM public.images image
        WHERE image.recognition_id = t.recognition_id OFFSET 0
    ) i
    CROSS JOIN LATERAL (
        SELECT one.id, one.detection, one.source FROM public.initial_annotations one
        WHERE one.image_id = i.id OFFSET 0
    ) a
    LEFT JOIN pg_temp.wanted_detections w ON w.recognition_id = t.recognition_id
        AND w.camera_number = i.camera_number AND w.detection = a.detection
    WHERE t.existing AND a.source = 'MODEL' AND w.recognition_id IS NULL;

    -- What only the model saw stays while an annotation of others shows it.
    INSERT INTO pg_temp.stale
    SELECT 'public.initial_tray_items'::regclass, i.id
    FROM pg_temp.affected t
    CROSS JOIN LATERAL (
        SELECT item.* FROM public.initial_tray_items item WHERE item.recognition_id = t.recognition_id OFFSET 0
    ) i
    WHERE t.existing AND i.source IN ('RECIPE_LINE_OPTION', 'MODEL')
        AND NOT (i.source = 'MODEL' AND t.batch_id IS NOT NULL AND EXISTS (
            SELECT FROM public.initial_annotations a
            WHERE a.initial_tray_item_id = i.id AND a.source IS DISTINCT FROM 'MODEL'))
        AND NOT EXISTS (
            SELECT FROM pg_temp.wanted_lines w
            WHERE i.item_type = 'FOOD' AND i.source = 'RECIPE_LINE_OPTION' AND w.recognition_id = i.recognition_id
                AND w.line_number = i.line_number AND i.ordinal <= w.quantity)
        AND NOT EXISTS (
            SELECT FROM pg_temp.wanted_detections d
            WHERE d.recognition_id = i.recognition_id AND d.item_type = i.item_type AND d.source = i.source
                AND d.line_number = i.line_number AND d.ordinal = i.ordinal);

    INSERT INTO pg_temp.stale
    SELECT 'public.recipe_line_options'::regclass, o.id
    FROM pg_temp.affected t
    JOIN public.recipes p ON p.recognition_id = t.recognition_id
    CROSS JOIN LATERAL (
        SELECT line.id, line.line_number FROM public.recipe_lines line WHERE line.recipe_id = p.id OFFSET 0
    ) l
    CROSS JOIN LATERAL (
        SELECT option.id, option.option_number FROM public.recipe_line_options option
        WHERE option.recipe_line_id = l.id OFFSET 0
    ) o
    LEFT JOIN pg_temp.wanted_lines w ON w.recognition_id = t.recognition_id AND w.line_number = l.line_number
        AND o.option_number <= jsonb_array_length(w.dishes)
    WHERE t.existing AND w.recognition_id IS NULL;

    INSERT INTO pg_temp.stale
    SELECT 'public.recipe_lines'::regclass, l.id
    FROM pg_temp.affected t
    JOIN public.recipes p ON p.recognition_id = t.recognition_id
    CROSS JOIN LATERAL (
        SELECT line.id, line.line_number FROM public.recipe_lines line WHERE line.recipe_id = p.id OFFSET 0
    ) l
    LEFT JOIN pg_temp.wanted_lines w ON w.recognition_id = t.recognition_id AND w.line_number = l.line_number
    WHERE t.existing AND w.recognition_id IS NULL;

    INSERT INTO pg_temp.stale
    SELECT 'public.recipes'::regclass, p.id
    FROM pg_temp.affected t
    JOIN public.recipes p ON p.recognition_id = t.recognition_id
    LEFT JOIN raw.receipts r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
    WHERE t.existing AND r.receipt IS NULL;

    INSERT INTO pg_temp.stale
    SELECT 'public.images'::regclass, i.id
    FROM pg_temp.affected t
    CROSS JOIN LATERAL (
        SELECT image.id FROM public.images image WHERE image.recognition_id = t.recognition_id OFFSET 0
    ) i
    WHERE t.existing AND t.batch_id IS NULL;

    INSERT INTO pg_temp.stale
    SELECT 'public.recognitions'::regclass, t.recognition_id
    FROM pg_temp.affected t
    WHERE t.existing AND t.batch_id IS NULL;

    -- A menu goes with the last recognition that had it.
    INSERT INTO pg_temp.stale
    SELECT 'public.menus'::regclass, m.id
    FROM (SELECT DISTINCT p.menu_id
          FROM pg_temp.affected t
          JOIN public.recognitions p ON p.id = t.recognition_id
          WHERE t.existing AND p.menu_id IS NOT NULL) candidate
    JOIN public.menus m ON m.id = candidate.menu_id
    WHERE NOT EXISTS (SELECT FROM pg_temp.menu_of o WHERE o.content_sha256 = m.content_sha256)
        AND NOT EXISTS (
            SELECT FROM public.recognitions p
            WHERE p.menu_id = m.id AND NOT EXISTS (SELECT FROM pg_temp.affected t WHERE t.recognition_id = p.id));

    INSERT INTO pg_temp.stale
    SELECT 'public.menu_items'::regclass, i.id
    FROM pg_temp.stale d
    JOIN public.menu_items i ON i.menu_id = d.id
    WHERE d.relation = 'public.menus'::regclass;
    ANALYZE pg_temp.stale;
END
$$;

CREATE FUNCTION ingest.plan_affected() RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    CREATE UNIQUE INDEX ON pg_temp.affected (recognition_id);
    ANALYZE pg_temp.affected;
    PERFORM ingest.plan_wanted();
    PERFORM ingest.plan_stale();
END
$$;

-- Writing it

CREATE FUNCTION ingest.publish_menus() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Store each menu content that pg_temp.affected needs and that is not there.
DECLARE
    stored bigint;
BEGIN
    WITH stored_menus AS (
        INSERT INTO public.menus (content_sha256)
        SELECT DISTINCT content_sha256 FROM pg_temp.menu_of ORDER BY content_sha256
        ON CONFLICT (content_sha256) DO NOTHING
        RETURNING id, content_sha256
    )
    INSERT INTO public.menu_items (menu_id, position, external_id, name, category, price, metadata)
    SELECT s.id, i.position, i.item ->> 'ExternalId', coalesce(i.item ->> 'Name', ''), i.item ->> 'Category',
        ingest.price_of(i.item -> 'Price'),
        -- A price that is more than a number stays with the rest, as it was.
        i.item - CASE WHEN is_plain THEN ARRAY['ExternalId', 'Name', 'Category', 'Price']
            ELSE ARRAY['ExternalId', 'Name', 'Category'] END
    FROM stored_menus s
    JOIN (SELECT DISTINCT ON (content_sha256) content_sha256, content FROM pg_temp.menu_of ORDER BY content_sha256) c
        USING (content_sha256)
    CROSS JOIN LATERAL jsonb_array_elements(c.content) WITH ORDINALITY AS i (item, position)
    CROSS JOIN LATERAL (SELECT ingest.price_of(i.item -> 'Price')::text = i.item ->> 'Price'
        OR jsonb_typeof(i.item -> 'Price') = 'null') AS p (is_plain);
    GET DIAGNOSTICS stored = ROW_COUNT;
    RETURN stored;
END
$$;

CREATE FUNCTION ingest.publish_recognitions() RETURNS bigint
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
        SET batch_id = excluded.batch_id, menu_id = excluded.menu_id, captured_on = excluded.captured_on;
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END
$$;

CREATE FUNCTION ingest.publish_images() RETURNS bigint
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

CREATE FUNCTION ingest.publish_recipes() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Write recipes, their lines and options.
DECLARE
    written bigint;
    lines bigint;
BEGIN
    INSERT INTO public.recipes (recognition_id)
    SELECT t.recognition_id
    FROM pg_temp.affected t
    JOIN raw.receipts r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
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

CREATE FUNCTION ingest.publish_model_items() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- What only the model saw: plates, and dishes that are on no line of the receipt.
DECLARE
    written bigint;
BEGIN
    INSERT INTO public.initial_tray_items (recognition_id, item_type, source, line_number, ordinal, metadata)
    SELECT d.recognition_id, d.item_type, d.source, d.line_number, d.ordinal, jsonb_build_object('label', min(d.label))
    FROM pg_temp.wanted_detections d
    WHERE d.source = 'MODEL'
    GROUP BY d.recognition_id, d.item_type, d.source, d.line_number, d.ordinal
    ORDER BY d.recognition_id, d.item_type, d.line_number, d.ordinal
    ON CONFLICT (recognition_id, item_type, source, line_number, ordinal) DO UPDATE
        SET metadata = excluded.metadata
        WHERE initial_tray_items.metadata IS DISTINCT FROM excluded.metadata;
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END
$$;

CREATE FUNCTION ingest.publish_tray_items() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- A line of quantity n gives n FOOD items, of its first option; the model may add others.
DECLARE
    written bigint;
BEGIN
    INSERT INTO public.initial_tray_items
        (recognition_id, item_type, source, recipe_line_option_id, menu_item_external_id, line_number, ordinal, metadata)
    SELECT w.recognition_id, 'FOOD', 'RECIPE_LINE_OPTION', o.id, o.external_id, w.line_number, n.ordinal,
        jsonb_strip_nulls(jsonb_build_object('name', o.name, 'amount', w.amount))
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
    RETURN written + ingest.publish_model_items();
END
$$;

CREATE FUNCTION ingest.publish_annotations() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Write one annotation for each detection; the items that they belong to are there.
DECLARE
    written bigint;
BEGIN
    INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, detection, bbox, source)
    SELECT i.id, item.id, d.detection,
        jsonb_build_object('x', d.x1, 'y', d.y1, 'w', trim_scale(d.x2 - d.x1), 'h', trim_scale(d.y2 - d.y1)), 'MODEL'
    FROM pg_temp.wanted_detections d
    JOIN public.images i ON i.recognition_id = d.recognition_id AND i.camera_number = d.camera_number
    JOIN public.initial_tray_items item ON item.recognition_id = d.recognition_id AND item.item_type = d.item_type
        AND item.source = d.source AND item.line_number = d.line_number AND item.ordinal = d.ordinal
    ORDER BY i.id, d.detection
    ON CONFLICT (image_id, source, detection) DO UPDATE
        SET initial_tray_item_id = excluded.initial_tray_item_id, bbox = excluded.bbox
        WHERE (initial_annotations.initial_tray_item_id, initial_annotations.bbox)
            IS DISTINCT FROM (excluded.initial_tray_item_id, excluded.bbox);
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END
$$;

CREATE FUNCTION ingest.publish_removals() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Delete the rows of pg_temp.stale, those that reference others first.
DECLARE
    removed bigint := 0;
    n bigint;
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'initial_annotations', 'initial_tray_items', 'recipe_line_options', 'recipe_lines', 'recipes', 'images',
        'recognitions', 'menu_items', 'menus']
    LOOP
        EXECUTE format(
            'DELETE FROM public.%1$I x USING pg_temp.stale d WHERE d.relation = %2$L::regclass AND x.id = d.id',
            name, 'public.' || name);
        GET DIAGNOSTICS n = ROW_COUNT;
        removed := removed + n;
    END LOOP;
    RETURN removed;
END
$$;

CREATE FUNCTION ingest.publish_affected(kind text)
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
    -- Items and annotations before removals: what stays moves to its item, and an item to its option, before any goes.
    FOREACH part IN ARRAY
        CASE WHEN kind = 'load' THEN ARRAY['menus', 'recognitions', 'images', 'recipes'] ELSE ARRAY[]::text[] END
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

CREATE FUNCTION ingest.notice_other_photos(batch text) RETURNS void
LANGUAGE plpgsql
AS $$
-- Record which annotations are left out, since they are for another photo: in a batch, or if that is NULL in theirs.
BEGIN
    INSERT INTO ingest.notices (batch_id, recognition_id, path, code, message, step)
    SELECT coalesce(batch, m.batch_id), t.recognition_id, m.photo_paths[at], 'annotations_other_photo', format(
        'the annotations of %s are left out: they are for a photo of %s x %s pixels and orientation %s, and it has %s x %s '
        'and %s now', m.batch_id, m.widths[at], m.heights[at], m.orientations[at], f.width, f.height, f.orientation),
        'transform'
    FROM pg_temp.affected t
    CROSS JOIN LATERAL unnest(t.qwen_batch_ids) WITH ORDINALITY AS newest (batch_id, camera_number)
    JOIN raw.photos f ON f.batch_id = t.batch_id AND f.recognition_id = t.recognition_id
        AND f.camera_number = newest.camera_number
    JOIN ingest.manifest m ON m.batch_id = newest.batch_id AND m.recognition_id = t.recognition_id
    CROSS JOIN LATERAL array_position(m.cameras, f.camera_number) AS at
    WHERE NOT ingest.is_same_photo(m, f.camera_number, f.width, f.height, f.orientation)
        AND EXISTS (
            SELECT FROM raw.detections d
            WHERE d.batch_id = m.batch_id AND d.recognition_id = t.recognition_id AND d.camera_number = f.camera_number)
    ORDER BY t.recognition_id, f.camera_number;
END
$$;

-- Entry functions: the commit of a batch, and its reset

CREATE FUNCTION ingest.transform_batch(batch text)
RETURNS TABLE (operation text, rows_written bigint, seconds double precision)
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET join_collapse_limit = 1
AS $$
-- Make the domain show every recognition of a batch of kind 'load' in the batch's version, or the annotations of a batch
-- of kind 'qwen'; a recognition that is not there (its batch was reset meanwhile) gets those when it is loaded again.
DECLARE
    kind CONSTANT text := (SELECT b.kind FROM ingest.batches b WHERE b.id = batch);
    annotated CONSTANT boolean := EXISTS (SELECT FROM ingest.batches b WHERE b.kind = 'qwen' AND b.state = 'done');
    started CONSTANT timestamptz := clock_timestamp();
BEGIN
    IF kind = 'load' THEN
        CREATE TEMP TABLE affected ON COMMIT DROP AS
        SELECT r.recognition_id, r.batch_id,
            CASE WHEN annotated THEN ingest.newest_annotations(r.recognition_id, batch) END AS qwen_batch_ids,
            EXISTS (SELECT FROM public.recognitions p WHERE p.id = r.recognition_id) AS existing
        FROM raw.receipts r
        WHERE r.batch_id = batch;
    ELSE
        CREATE TEMP TABLE affected ON COMMIT DROP AS
        SELECT p.id AS recognition_id, p.batch_id, ARRAY[
                CASE WHEN 1 = ANY (m.cameras) THEN m.batch_id ELSE former[1] END,
                CASE WHEN 2 = ANY (m.cameras) THEN m.batch_id ELSE former[2] END] AS qwen_batch_ids,
            true AS existing
        FROM ingest.manifest m
        JOIN public.recognitions p ON p.id = m.recognition_id
        CROSS JOIN LATERAL ingest.newest_annotations(p.id, batch) former
        WHERE m.batch_id = batch;
    END IF;
    PERFORM ingest.plan_affected();
    PERFORM ingest.notice_other_photos(batch);
    operation := 'transform_plan';
    SELECT count(*) INTO rows_written FROM pg_temp.affected;
    seconds := extract(epoch FROM clock_timestamp() - started);
    RETURN NEXT;
    RETURN QUERY SELECT * FROM ingest.publish_affected(kind);
END
$$;

CREATE FUNCTION ingest.plan_reset(batch text) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET join_collapse_limit = 1
AS $$
-- Work out what the domain shows once the batch is gone: of each recognition that it shows in this batch's version,
-- the former one. Nothing when the batch was never committed, or when all of it was superseded.
DECLARE
    target ingest.batches;
BEGIN
    SELECT * INTO STRICT target FROM ingest.batches b WHERE b.id = batch;
    IF target.kind = 'load' THEN
        CREATE TEMP TABLE affected ON COMMIT DROP AS
        SELECT p.id AS recognition_id, former AS batch_id,
            CASE WHEN former IS NOT NULL THEN ingest.newest_annotations(p.id, batch) END AS qwen_batch_ids,
            true AS existing
        FROM public.recognitions p
        LEFT JOIN LATERAL ingest.newest_version('load', p.id, NULL, batch) former ON true
        WHERE p.batch_id = batch;
    ELSE
        CREATE TEMP TABLE affected ON COMMIT DROP AS
        SELECT p.id AS recognition_id, p.batch_id, former AS qwen_batch_ids, true AS existing
        FROM ingest.manifest m
        JOIN public.recognitions p ON p.id = m.recognition_id
        CROSS JOIN LATERAL ingest.newest_annotations(p.id, batch) former
        WHERE m.batch_id = batch AND target.state = 'done' AND EXISTS (
            SELECT FROM unnest(m.cameras) AS camera
            LEFT JOIN ingest.batches f ON f.id = former[camera]
            WHERE f.version IS NULL OR f.version < target.version);
    END IF;
    PERFORM ingest.plan_affected();
END
$$;

CREATE FUNCTION ingest.execute_reset(batch text) RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET join_collapse_limit = 1
AS $$
-- Carry out what ingest.plan_reset() worked out, remove the batch's raw rows and claims; return the rows of public and
-- raw that went.
DECLARE
    removed bigint;
    n bigint;
    name text;
BEGIN
    PERFORM ingest.publish_affected(b.kind) FROM ingest.batches b WHERE b.id = batch;
    PERFORM ingest.notice_other_photos(NULL);
    SELECT count(*) INTO removed FROM pg_temp.stale;
    FOREACH name IN ARRAY ARRAY['photos', 'receipts', 'menus', 'detections'] LOOP
        EXECUTE format('DELETE FROM raw.%I WHERE batch_id = $1', name) USING batch;
        GET DIAGNOSTICS n = ROW_COUNT;
        removed := removed + n;
    END LOOP;
    DELETE FROM ingest.claims WHERE batch_id = batch;
    RETURN removed;
END
$$;
