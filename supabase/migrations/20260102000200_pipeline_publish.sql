-- What readers see of a recognition follows from three batches alone: the newest finished one of kind 'load' that holds
-- it, and for each of its two photos the newest finished one of kind 'qwen'. A commit and a reset do the same with it.
-- They list the recognitions that they affect in the temporary table pg_temp.affected:
--
--     recognition_id, batch_id (of its photos; NULL when none is left, so that its rows go), qwen_batch_ids (of the
--     annotations of camera 1 and 2; NULL where there are none), existing (whether the domain has it already),
--     is_adopted (batch_id is an adopted batch, whose rows stay as they are), was_adopted (an adopted batch has it, whose
--     annotations stay on photos of the same size until others take their place)
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

CREATE OR REPLACE FUNCTION ingest.array_of(value jsonb) RETURNS jsonb
LANGUAGE sql STABLE
AS $$
-- A single object stands for an array of one.
    SELECT CASE WHEN jsonb_typeof(value) = 'object' THEN jsonb_build_array(value) ELSE value END
$$;

CREATE OR REPLACE FUNCTION ingest.quantity_of(count jsonb) RETURNS integer
LANGUAGE sql IMMUTABLE
AS $$
-- The items of a receipt line: its Count, or one if that is the amount of weighed goods.
    SELECT CASE WHEN count::double precision = trunc(count::double precision) THEN count::integer ELSE 1 END
$$;

CREATE OR REPLACE FUNCTION ingest.price_of(price jsonb) RETURNS numeric
LANGUAGE sql IMMUTABLE
AS $$
-- The amount of a price, NULL if there is none. pipeline/dataset/prices.py has the same rule.
    SELECT CASE WHEN abs(amount) < 10000000 THEN
        CASE WHEN round(amount::double precision::numeric, 2) = amount::double precision::numeric
            THEN round(amount, 2) END
        END
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

CREATE OR REPLACE FUNCTION ingest.is_on_record(recognition bigint) RETURNS boolean
LANGUAGE sql STABLE
AS $$
-- Whether a finished batch of kind 'load' has a recognition. What none has is of others: their own, or not adopted yet.
    SELECT EXISTS (
        SELECT FROM ingest.manifest m
        JOIN ingest.batches b ON b.id = m.batch_id
        WHERE m.recognition_id = recognition AND b.kind = 'load' AND b.state = 'done')
$$;

CREATE OR REPLACE FUNCTION ingest.is_there(recognition bigint) RETURNS boolean
LANGUAGE sql STABLE
AS $$
-- Whether the domain has rows of a recognition. No key ties a recipe to it: one may be left of a recognition that went.
    SELECT EXISTS (SELECT FROM public.recognitions r WHERE r.id = recognition)
        OR EXISTS (SELECT FROM public.recipes r WHERE r.recognition_id = recognition)
$$;

CREATE OR REPLACE FUNCTION ingest.newest_version(wanted_kind text, recognition bigint, camera integer, besides text)
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

CREATE OR REPLACE FUNCTION ingest.newest_annotations(recognition bigint, besides text) RETURNS text[]
LANGUAGE sql STABLE
AS $$
-- The batches whose annotations of camera 1 and 2 readers see, were it not for the batch `besides`.
    SELECT ARRAY[(SELECT q FROM ingest.newest_version('qwen', recognition, 1, besides) q),
                 (SELECT q FROM ingest.newest_version('qwen', recognition, 2, besides) q)]
$$;

CREATE OR REPLACE FUNCTION ingest.was_adopted(recognition bigint, besides text) RETURNS boolean
LANGUAGE sql STABLE
AS $$
-- Whether an adopted batch holds a recognition, other than the batch `besides`.
    SELECT EXISTS (
        SELECT FROM ingest.manifest m
        JOIN ingest.batches b ON b.id = m.batch_id
        WHERE m.recognition_id = recognition AND b.adopted AND b.state = 'done' AND b.id <> besides)
$$;

CREATE OR REPLACE FUNCTION ingest.is_same_photo(
    m ingest.manifest, camera integer, width integer, height integer, orientation integer) RETURNS boolean
LANGUAGE sql IMMUTABLE
AS $$
-- Whether a photo has the size and orientation for which the boxes of a batch of kind 'qwen' were worked out. Of an
-- adopted photo the orientation is not known: the tool that loaded it encoded it anew.
    SELECT (width, height, coalesce(orientation, 1))
        = (m.widths[at], m.heights[at], coalesce(m.orientations[at]::integer, 1))
    FROM array_position(m.cameras, camera) AS at
$$;

CREATE OR REPLACE FUNCTION ingest.photo_of(batch text, is_adopted boolean, recognition bigint, camera integer)
RETURNS TABLE (width integer, height integer, orientation integer)
LANGUAGE sql STABLE
AS $$
-- A photo as a batch has it; what an adopted batch has is in the domain alone.
    SELECT f.width, f.height, f.orientation::integer
    FROM raw.photos f
    WHERE NOT is_adopted AND f.batch_id = batch AND f.recognition_id = recognition AND f.camera_number = camera
    UNION ALL
    SELECT i.width, i.height, i.orientation::integer
    FROM public.images i
    WHERE is_adopted AND i.recognition_id = recognition AND i.camera_number = camera
$$;

CREATE OR REPLACE FUNCTION ingest.options_of(dishes jsonb) RETURNS jsonb
LANGUAGE sql STABLE
AS $$
-- The distinct options of a receipt line, each as [external id, name], in the order of the receipt.
    SELECT coalesce(jsonb_agg(jsonb_build_array(external_id, name) ORDER BY n), '[]')
    FROM (
        SELECT dish ->> 'ExternalId' AS external_id, dish ->> 'Name' AS name, min(n) AS n
        FROM jsonb_array_elements(ingest.array_of(dishes)) WITH ORDINALITY AS d (dish, n)
        GROUP BY 1, 2
    ) option
$$;

CREATE OR REPLACE FUNCTION ingest.meaning_of(quantity integer, options jsonb) RETURNS text
LANGUAGE sql IMMUTABLE
AS $$
-- What makes a receipt line the same line: its quantity and its options, in any order.
    SELECT md5(quantity || ' ' || (SELECT coalesce(jsonb_agg(option ORDER BY option), '[]')
                                   FROM jsonb_array_elements(options) AS option))
$$;

CREATE OR REPLACE FUNCTION ingest.line_of(label text) RETURNS integer
LANGUAGE sql IMMUTABLE
AS $$
-- The receipt line that a detection's label names: k + 1 for dish_k, 0 for a plate.
    SELECT CASE WHEN label = 'plate' THEN 0 ELSE substring(label FROM '^dish_([0-9]{1,9})$')::integer + 1 END
$$;

CREATE OR REPLACE FUNCTION ingest.has_menu_table() RETURNS boolean
LANGUAGE sql STABLE
AS $$
-- Whether the app has a table of menu entries; else there is a view.
    SELECT relkind IN ('r', 'p') FROM pg_catalog.pg_class
    WHERE oid = 'public.recognition_active_menu_items'::regclass
$$;

CREATE OR REPLACE FUNCTION ingest.find_references(locking boolean)
RETURNS TABLE (recognition_id bigint, app regclass, target regclass, referencing bigint)
LANGUAGE plpgsql
SET search_path = ''
AS $$
-- Return, of each recognition, which tables reference its rows in pg_temp.stale (relation, id, recognition_id) with rows
-- that others wrote, and how many. What a person set in an item counts as a reference of the items.
#variable_conflict use_column
DECLARE
    ours CONSTANT regclass[] := ARRAY[
        'public.menus', 'public.menu_items', 'public.recognitions', 'public.images', 'public.recipes',
        'public.recipe_lines', 'public.recipe_line_options', 'public.initial_tray_items',
        'public.initial_annotations', 'public.recognition_active_menu_items']::regclass[];
    condition text;
BEGIN
    FOR app, target, condition IN
        SELECT c.conrelid::regclass, c.confrelid::regclass,
            (SELECT string_agg(format('app.%I = target.%I', a.attname, b.attname), ' AND ')
             FROM unnest(c.conkey, c.confkey) AS k (app_column, target_column)
             JOIN pg_catalog.pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.app_column
             JOIN pg_catalog.pg_attribute b ON b.attrelid = c.confrelid AND b.attnum = k.target_column)
            || CASE c.conrelid
                WHEN 'public.initial_annotations'::regclass THEN ' AND app.source IS DISTINCT FROM ''MODEL'''
                WHEN 'public.initial_tray_items'::regclass
                    THEN ' AND app.source NOT IN (''RECIPE_LINE_OPTION'', ''MODEL'')'
                ELSE '' END
        FROM pg_catalog.pg_constraint c
        WHERE c.contype = 'f' AND c.conparentid = 0 AND c.confrelid = ANY (ours::oid[])
            AND (c.conrelid <> ALL (ours::oid[])
                OR c.conrelid IN ('public.initial_tray_items'::regclass, 'public.initial_annotations'::regclass))
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
        FOR recognition_id, referencing IN EXECUTE format(
            'SELECT d.recognition_id, count(*) FROM %1$s target '
            'JOIN pg_temp.stale d ON d.relation = %2$L::regclass AND d.id = target.id JOIN %3$s app ON %4$s '
            'GROUP BY d.recognition_id ORDER BY d.recognition_id',
            target, target::text, app, condition)
        LOOP
            RETURN NEXT;
        END LOOP;
    END LOOP;
    app := 'public.initial_tray_items';
    target := 'public.recipe_lines';
    FOR recognition_id, referencing IN
        SELECT d.recognition_id, count(*)
        FROM pg_temp.stale d
        JOIN pg_temp.present_items p ON p.id = d.id
        WHERE d.relation = 'public.initial_tray_items'::regclass AND p.is_decided
        GROUP BY d.recognition_id
    LOOP
        RETURN NEXT;
    END LOOP;
END
$$;

CREATE OR REPLACE FUNCTION ingest.refuse_referenced() RETURNS void
LANGUAGE plpgsql
AS $$
-- Raise IN001 when a row that others wrote references a row of pg_temp.stale.
DECLARE
    found text;
BEGIN
    SELECT string_agg(format('%s (%s %s, to %s)', r.app, r.referencing,
        CASE r.referencing WHEN 1 THEN 'row' ELSE 'rows' END, r.target), ', ' ORDER BY r.app, r.target)
    INTO found
    FROM (
        SELECT f.app, f.target, sum(f.referencing) AS referencing
        FROM ingest.find_references(true) f
        GROUP BY f.app, f.target
    ) r;
    IF found IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'IN001',
            MESSAGE = 'rows of other tables reference what would be deleted: ' || found;
    END IF;
END
$$;

-- What is there, what is wanted, what is stale

CREATE OR REPLACE FUNCTION ingest.plan_lines() RETURNS void
LANGUAGE plpgsql
AS $$
-- Work out menu_of and wanted_lines; line_id is that of the line that is there already and means the same. What an
-- adopted batch holds has no raw rows: it stays as it is.
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
    SELECT t.recognition_id, t.existing, l.line_number::integer AS line_number,
        ingest.quantity_of(l.line -> 'Count') AS quantity,
        -- Compared as floats, as quantity_of does: 0.99999999999999999999 is a whole item.
        CASE WHEN (l.line -> 'Count')::double precision <> ingest.quantity_of(l.line -> 'Count')
            THEN l.line -> 'Count' END AS amount,
        ingest.options_of(l.line -> 'Dishes') AS options, NULL::bigint AS line_id, NULL::integer AS former_number,
        t.is_adopted
    FROM pg_temp.affected t
    JOIN raw.receipts r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
    CROSS JOIN LATERAL jsonb_array_elements(ingest.array_of(r.receipt)) WITH ORDINALITY AS l (line, line_number);
    CREATE UNIQUE INDEX ON pg_temp.wanted_lines (recognition_id, line_number);
    -- Before the update below: the transaction could not use an index that is created after it.
    CREATE INDEX ON pg_temp.wanted_lines (line_id);
    ANALYZE pg_temp.wanted_lines;

    CREATE TEMP TABLE present_lines ON COMMIT DROP AS
    SELECT t.recognition_id, l.id, l.line_number, m.meaning,
        row_number() OVER (PARTITION BY t.recognition_id, m.meaning ORDER BY l.line_number) AS nth,
        t.is_adopted AND ingest.is_adopted_row('public.recipe_lines', l.id) AS stays
    FROM pg_temp.affected t
    JOIN public.recipes p ON p.recognition_id = t.recognition_id
    CROSS JOIN LATERAL (
        SELECT line.id, line.line_number, line.quantity
        FROM public.recipe_lines line WHERE line.recipe_id = p.id OFFSET 0
    ) l
    CROSS JOIN LATERAL (
        SELECT coalesce(jsonb_agg(jsonb_build_array(option.external_id, option.name)), '[]') AS options
        FROM public.recipe_line_options option WHERE option.recipe_line_id = l.id
    ) o
    CROSS JOIN LATERAL (SELECT ingest.meaning_of(l.quantity, o.options) AS meaning OFFSET 0) m
    WHERE t.existing;
    CREATE UNIQUE INDEX ON pg_temp.present_lines (id);
    CREATE UNIQUE INDEX ON pg_temp.present_lines (recognition_id, meaning, nth);
    ANALYZE pg_temp.present_lines;

    UPDATE pg_temp.wanted_lines w
    SET line_id = p.id, former_number = p.line_number
    FROM (
        SELECT recognition_id, line_number, meaning,
            row_number() OVER (PARTITION BY recognition_id, meaning ORDER BY line_number) AS nth
        FROM pg_temp.wanted_lines
        CROSS JOIN LATERAL (SELECT ingest.meaning_of(quantity, options) AS meaning) m
        WHERE existing
    ) a
    JOIN pg_temp.present_lines p USING (recognition_id, meaning, nth)
    WHERE w.recognition_id = a.recognition_id AND w.line_number = a.line_number;
    INSERT INTO pg_temp.wanted_lines (recognition_id, existing, line_number, quantity, line_id, former_number, is_adopted)
    SELECT p.recognition_id, true, p.line_number, 0, p.id, p.line_number, true
    FROM pg_temp.present_lines p
    WHERE p.stays;
    ANALYZE pg_temp.wanted_lines;
END
$$;

CREATE OR REPLACE FUNCTION ingest.plan_items() RETURNS void
LANGUAGE plpgsql
AS $$
-- Work out present_items and wanted_items; item_id is that of the item that is there already. `is_decided` says that a
-- person has chosen what the receipt leaves open.
BEGIN
    CREATE TEMP TABLE present_items ON COMMIT DROP AS
    SELECT i.recognition_id, i.id, i.item_type::text AS item_type, i.source::text AS source, place.line_id,
        place.line_number,
        coalesce(i.ordinal, row_number() OVER (
            PARTITION BY i.recognition_id, i.item_type, i.source, place.line_id, place.line_number
            ORDER BY i.ordinal NULLS FIRST, i.id))::integer AS nth,
        i.line_number AS stored_number, i.ordinal AS stored_ordinal,
        t.is_adopted AND ingest.is_adopted_row('public.initial_tray_items', i.id) AS stays,
        i.metadata ->> 'qwen_label' AS label,
        CASE WHEN i.source = 'RECIPE_LINE_OPTION' THEN
            (i.recipe_line_option_id IS NOT NULL AND line.has_ambiguity)
            OR (i.menu_item_external_id IS NOT NULL AND i.menu_item_external_id IS DISTINCT FROM o.external_id)
            ELSE i.menu_item_external_id IS NOT NULL OR i.recipe_line_option_id IS NOT NULL END AS is_decided
    FROM pg_temp.affected t
    CROSS JOIN LATERAL (
        SELECT item.* FROM public.initial_tray_items item WHERE item.recognition_id = t.recognition_id OFFSET 0
    ) i
    LEFT JOIN public.recipe_line_options o ON o.id = i.recipe_line_option_id
    CROSS JOIN LATERAL (
        SELECT CASE WHEN i.source = 'RECIPE_LINE_OPTION' THEN coalesce(i.recipe_line_id, o.recipe_line_id) END AS line_id,
            CASE WHEN i.source = 'MODEL'
                THEN coalesce(i.line_number, ingest.line_of(i.metadata ->> 'qwen_label')) END AS line_number
    ) place
    LEFT JOIN public.recipe_lines line ON line.id = place.line_id
    WHERE t.existing AND i.source IN ('RECIPE_LINE_OPTION', 'MODEL') AND i.item_type IN ('FOOD', 'PLATE');
    CREATE UNIQUE INDEX ON pg_temp.present_items (id);
    CREATE INDEX ON pg_temp.present_items (line_id, nth);
    CREATE INDEX ON pg_temp.present_items (recognition_id, item_type, line_number, nth);
    ANALYZE pg_temp.present_items;

    CREATE TEMP TABLE wanted_items ON COMMIT DROP AS
    SELECT w.recognition_id, 'FOOD' AS item_type, 'RECIPE_LINE_OPTION' AS source, w.line_number, n.ordinal,
        jsonb_strip_nulls(jsonb_build_object('amount', w.amount, 'item_number', n.ordinal,
            'qwen_label', CASE n.ordinal WHEN 1 THEN 'dish_' || w.line_number - 1 END))
            || jsonb_build_object('name', CASE jsonb_array_length(w.options) WHEN 1 THEN w.options -> 0 -> 1 END)
            AS metadata,
        CASE jsonb_array_length(w.options) WHEN 1 THEN w.options -> 0 END AS option, NULL::integer AS nth,
        p.id AS item_id, false AS stays
    FROM pg_temp.wanted_lines w
    CROSS JOIN LATERAL generate_series(1, w.quantity) AS n (ordinal)
    LEFT JOIN pg_temp.present_items p ON p.line_id = w.line_id AND p.nth = n.ordinal
    WHERE NOT w.is_adopted;
    INSERT INTO pg_temp.wanted_items (recognition_id, item_type, source, line_number, ordinal, item_id, stays)
    SELECT p.recognition_id, p.item_type, p.source, p.stored_number, p.stored_ordinal, p.id, true
    FROM pg_temp.present_items p
    WHERE p.stays;
    UPDATE pg_temp.wanted_lines w
    SET quantity = (SELECT count(*) FROM pg_temp.present_items p WHERE p.line_id = w.line_id AND p.stays)
    WHERE w.is_adopted;
    CREATE UNIQUE INDEX ON pg_temp.wanted_items (recognition_id, item_type, source, line_number, ordinal);
    CREATE INDEX ON pg_temp.wanted_items (item_id);
    ANALYZE pg_temp.wanted_items;
END
$$;

CREATE OR REPLACE FUNCTION ingest.plan_detections() RETURNS void
LANGUAGE plpgsql
AS $$
-- Work out wanted_detections, and add to wanted_items what only the model saw. An annotation is the same while its
-- photo, label and box are (annotation_id), and keeps its item (item_id) while that stays. For others, the j-th dish_k of
-- a photo belongs to item min(j, n) of receipt line k + 1 of quantity n; without such a line, to the j-th item that the
-- model alone saw there. The j-th plate belongs to the j-th PLATE item.
BEGIN
    CREATE TEMP TABLE present_annotations ON COMMIT DROP AS
    SELECT DISTINCT ON (i.recognition_id, i.camera_number, label.label, a.bbox)
        i.recognition_id, i.camera_number, label.label, a.bbox, a.id, a.initial_tray_item_id AS item_id
    FROM pg_temp.affected t
    CROSS JOIN LATERAL (
        SELECT image.id, image.recognition_id, image.camera_number FROM public.images image
        WHERE image.recognition_id = t.recognition_id OFFSET 0
    ) i
    CROSS JOIN LATERAL (
        SELECT one.* FROM public.initial_annotations one WHERE one.image_id = i.id OFFSET 0
    ) a
    JOIN public.initial_tray_items item ON item.id = a.initial_tray_item_id
    LEFT JOIN pg_temp.kept_rows kept ON kept.relation = 'public.initial_annotations' AND kept.id = a.id
    CROSS JOIN LATERAL (
        SELECT coalesce(a.label, kept.label, item.metadata ->> 'qwen_label', '') AS label
    ) label
    WHERE t.existing AND a.source = 'MODEL'
    ORDER BY i.recognition_id, i.camera_number, label.label, a.bbox, a.id;
    CREATE INDEX ON pg_temp.present_annotations (recognition_id, camera_number, label, bbox);
    CREATE UNIQUE INDEX ON pg_temp.present_annotations (id);
    ANALYZE pg_temp.present_annotations;

    CREATE TEMP TABLE wanted_detections ON COMMIT DROP AS
    SELECT d.recognition_id, d.camera_number, d.detection, d.label, d.bbox, d.adopted_id, a.id AS annotation_id,
        CASE WHEN kept.id IS NULL OR (kept.source = 'MODEL' AND w.quantity IS NULL)
            OR EXISTS (SELECT FROM pg_temp.wanted_items o WHERE o.item_id = kept.id)
            THEN place.item_id END AS item_id,
        CASE WHEN d.line_number = 0 THEN 'PLATE' ELSE 'FOOD' END AS item_type,
        CASE WHEN w.quantity IS NULL THEN 'MODEL' ELSE 'RECIPE_LINE_OPTION' END AS source,
        d.line_number, d.nth, least(d.nth, coalesce(w.quantity, d.nth)) AS ordinal
    FROM (
        SELECT q.recognition_id, q.camera_number, q.detection, q.label, ingest.line_of(q.label) AS line_number,
            jsonb_build_object('x', q.x1, 'y', q.y1, 'w', trim_scale(q.x2 - q.x1), 'h', trim_scale(q.y2 - q.y1))
                AS bbox,
            (row_number() OVER (PARTITION BY q.recognition_id, q.camera_number, q.label ORDER BY q.detection))::integer
                AS nth, NULL::bigint AS adopted_id, NULL::bigint AS adopted_item_id
        FROM pg_temp.affected t
        CROSS JOIN LATERAL unnest(t.qwen_batch_ids) WITH ORDINALITY AS newest (batch_id, camera_number)
        CROSS JOIN LATERAL ingest.photo_of(
            t.batch_id, t.is_adopted, t.recognition_id, newest.camera_number::integer) f
        JOIN ingest.manifest m ON m.batch_id = newest.batch_id AND m.recognition_id = t.recognition_id
        -- OFFSET 0 keeps the planner from reading all detections of a batch at once for a camera.
        CROSS JOIN LATERAL (
            SELECT one.* FROM raw.detections one
            WHERE one.batch_id = newest.batch_id AND one.recognition_id = t.recognition_id
                AND one.camera_number = newest.camera_number
            OFFSET 0
        ) q
        WHERE ingest.is_same_photo(m, newest.camera_number::integer, f.width, f.height, f.orientation)
        UNION ALL
        SELECT k.recognition_id, i.camera_number,
            row_number() OVER (PARTITION BY k.recognition_id, i.camera_number ORDER BY k.id), k.label,
            ingest.line_of(k.label), k.content -> 'bbox',
            (row_number() OVER (PARTITION BY k.recognition_id, i.camera_number, k.label ORDER BY k.id))::integer,
            k.id, (k.content ->> 'initial_tray_item_id')::bigint
        FROM pg_temp.affected t
        JOIN pg_temp.kept_rows k
            ON k.recognition_id = t.recognition_id AND k.relation = 'public.initial_annotations'
        JOIN pg_temp.kept_rows o ON o.relation = 'public.images' AND o.id = (k.content ->> 'image_id')::bigint
        CROSS JOIN LATERAL jsonb_populate_record(NULL::public.images, o.content) i
        CROSS JOIN LATERAL ingest.photo_of(t.batch_id, false, t.recognition_id, i.camera_number) f
        WHERE t.was_adopted AND NOT t.is_adopted AND t.qwen_batch_ids[i.camera_number] IS NULL
            AND k.content ->> 'source' = 'MODEL'
            AND (f.width, f.height, f.orientation) = (i.width, i.height, coalesce(i.orientation, 1))
    ) d
    LEFT JOIN pg_temp.wanted_lines w ON w.recognition_id = d.recognition_id AND w.line_number = d.line_number
        AND w.quantity > 0
    LEFT JOIN pg_temp.present_annotations a ON a.recognition_id = d.recognition_id
        AND a.camera_number = d.camera_number AND a.label = d.label AND a.bbox = d.bbox
    -- An item that is not there counts as one that goes.
    LEFT JOIN public.initial_tray_items adopted ON adopted.id = d.adopted_item_id
    CROSS JOIN LATERAL (SELECT coalesce(adopted.id, a.item_id) AS item_id) place
    LEFT JOIN pg_temp.present_items kept ON kept.id = place.item_id;
    CREATE UNIQUE INDEX ON pg_temp.wanted_detections (recognition_id, camera_number, detection);
    CREATE INDEX ON pg_temp.wanted_detections (annotation_id);
    CREATE INDEX ON pg_temp.wanted_detections (item_id);
    UPDATE pg_temp.wanted_detections d
    SET item_id = p.id
    FROM pg_temp.wanted_lines w
    JOIN pg_temp.present_items p ON p.line_id = w.line_id AND p.stays
    WHERE w.is_adopted AND w.recognition_id = d.recognition_id AND w.line_number = d.line_number
        AND d.item_id IS NULL AND d.source = 'RECIPE_LINE_OPTION' AND p.nth = d.ordinal;
    ANALYZE pg_temp.wanted_detections;

    -- What the model alone saw: the items that annotations keep, each at the first place where one of them has it, and
    -- one for each place that has none; the n-th item that is there already is used again for the n-th place.
    CREATE TEMP TABLE model_items ON COMMIT DROP AS
    SELECT p.recognition_id, p.item_type, p.line_number, min(d.nth) AS nth, p.id AS item_id, p.nth AS former
    FROM pg_temp.wanted_detections d
    JOIN pg_temp.present_items p ON p.id = d.item_id AND p.source = 'MODEL'
    GROUP BY p.recognition_id, p.item_type, p.line_number, p.id, p.nth;
    CREATE INDEX ON pg_temp.model_items (recognition_id, item_type, line_number, nth);
    CREATE INDEX ON pg_temp.model_items (item_id);
    ANALYZE pg_temp.model_items;
    INSERT INTO pg_temp.model_items
    SELECT DISTINCT d.recognition_id, d.item_type, d.line_number, d.nth, p.id, d.nth
    FROM pg_temp.wanted_detections d
    LEFT JOIN pg_temp.present_items p ON p.recognition_id = d.recognition_id AND p.item_type = d.item_type
        AND p.line_number = d.line_number AND p.nth = d.nth
        AND NOT EXISTS (SELECT FROM pg_temp.model_items m WHERE m.item_id = p.id)
    WHERE d.source = 'MODEL' AND d.item_id IS NULL AND NOT EXISTS (
        SELECT FROM pg_temp.model_items m
        WHERE m.recognition_id = d.recognition_id AND m.item_type = d.item_type AND m.line_number = d.line_number
            AND m.nth = d.nth);
    -- What only the model saw stays while an annotation of others shows it.
    INSERT INTO pg_temp.model_items (recognition_id, item_type, line_number, item_id, former)
    SELECT p.recognition_id, p.item_type, p.line_number, p.id, p.nth
    FROM pg_temp.present_items p
    JOIN pg_temp.affected t USING (recognition_id)
    WHERE p.source = 'MODEL' AND t.batch_id IS NOT NULL
        AND NOT EXISTS (SELECT FROM pg_temp.model_items m WHERE m.item_id = p.id)
        AND EXISTS (
            SELECT FROM public.initial_annotations a
            WHERE a.initial_tray_item_id = p.id AND a.source IS DISTINCT FROM 'MODEL');
    ANALYZE pg_temp.model_items;

    INSERT INTO pg_temp.wanted_items
        (recognition_id, item_type, source, line_number, ordinal, nth, stays, metadata, item_id)
    SELECT m.recognition_id, m.item_type, 'MODEL', m.line_number, m.ordinal, m.nth, false,
        CASE WHEN m.ordinal = 1 AND NOT EXISTS (
            SELECT FROM pg_temp.present_items p
            WHERE p.recognition_id = m.recognition_id AND p.source = 'MODEL' AND p.item_type = m.item_type
                AND p.label = name.label AND p.stays
        ) THEN jsonb_build_object('qwen_label', name.label) ELSE '{}' END
            || jsonb_build_object('item_number', m.ordinal), m.item_id
    FROM (
        SELECT recognition_id, item_type, line_number, nth, item_id, (row_number() OVER (
            PARTITION BY recognition_id, item_type, line_number ORDER BY nth, former, item_id))::integer AS ordinal
        FROM pg_temp.model_items
    ) m
    CROSS JOIN LATERAL (
        SELECT CASE m.line_number WHEN 0 THEN 'plate' ELSE 'dish_' || m.line_number - 1 END AS label
    ) name
    WHERE NOT EXISTS (SELECT FROM pg_temp.present_items p WHERE p.id = m.item_id AND p.stays);
    CREATE INDEX ON pg_temp.wanted_items (recognition_id, item_type, line_number, nth);
    ANALYZE pg_temp.wanted_items;
    UPDATE pg_temp.wanted_detections d
    SET item_id = m.item_id
    FROM pg_temp.model_items m
    JOIN pg_temp.present_items p ON p.id = m.item_id AND p.stays
    WHERE d.source = 'MODEL' AND d.item_id IS NULL AND m.recognition_id = d.recognition_id
        AND m.item_type = d.item_type AND m.line_number = d.line_number AND m.nth = d.nth;
    UPDATE pg_temp.wanted_detections d
    SET ordinal = (
        SELECT min(w.ordinal) FROM pg_temp.wanted_items w
        WHERE w.recognition_id = d.recognition_id AND w.item_type = d.item_type AND w.line_number = d.line_number
            AND w.nth = d.nth AND w.source = 'MODEL')
    WHERE d.source = 'MODEL' AND d.item_id IS NULL;
END
$$;

CREATE OR REPLACE FUNCTION ingest.plan_stale_lines() RETURNS void
LANGUAGE plpgsql
AS $$
-- Work out the part of pg_temp.stale that follows from the receipts alone.
BEGIN
    CREATE TEMP TABLE stale (relation oid NOT NULL, id bigint NOT NULL, recognition_id bigint) ON COMMIT DROP;
    CREATE INDEX ON pg_temp.stale (relation, id);

    INSERT INTO pg_temp.stale
    SELECT 'public.recipe_lines'::regclass, l.id, l.recognition_id
    FROM pg_temp.present_lines l
    WHERE NOT EXISTS (SELECT FROM pg_temp.wanted_lines w WHERE w.line_id = l.id);

    INSERT INTO pg_temp.stale
    SELECT 'public.recipe_line_options'::regclass, o.id, d.recognition_id
    FROM pg_temp.stale d
    JOIN public.recipe_line_options o ON o.recipe_line_id = d.id
    WHERE d.relation = 'public.recipe_lines'::regclass;

    INSERT INTO pg_temp.stale
    SELECT 'public.recipes'::regclass, p.id, t.recognition_id
    FROM pg_temp.affected t
    JOIN public.recipes p ON p.recognition_id = t.recognition_id
    LEFT JOIN raw.receipts r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
    -- That of an adopted recognition stays without lines, so that those can come back to it.
    WHERE t.existing AND r.receipt IS NULL
        AND NOT (t.was_adopted AND ingest.is_adopted_row('public.recipes', p.id));

    INSERT INTO pg_temp.stale
    SELECT 'public.initial_tray_items'::regclass, i.id, i.recognition_id
    FROM pg_temp.present_items i
    WHERE i.source <> 'MODEL' AND NOT EXISTS (SELECT FROM pg_temp.wanted_items w WHERE w.item_id = i.id);
    ANALYZE pg_temp.stale;
END
$$;

CREATE OR REPLACE FUNCTION ingest.plan_equal_boxes() RETURNS void
LANGUAGE plpgsql
AS $$
-- An item has a box of a photo once. Where labels differ and annotations keep their items, two detections may come to one:
-- the second gets an item of its own, which the model alone saw. An annotation that has such an item keeps it.
BEGIN
    CREATE TEMP TABLE parted ON COMMIT DROP AS
    SELECT d.recognition_id, d.camera_number, d.detection, d.item_type, d.line_number, p.id AS item_id,
        (coalesce((
            SELECT max(w.ordinal) FROM pg_temp.wanted_items w
            WHERE w.recognition_id = d.recognition_id AND w.item_type = d.item_type AND w.source = 'MODEL'
                AND w.line_number = d.line_number), 0) + row_number() OVER (
            PARTITION BY d.recognition_id, d.item_type, d.line_number ORDER BY p.nth, d.camera_number, d.detection)
        )::integer AS ordinal
    FROM (
        SELECT one.*, a.item_id AS former_id, i.target, row_number() OVER (
            PARTITION BY one.recognition_id, one.camera_number, one.bbox, i.target,
                CASE WHEN i.target IS NULL THEN ROW(one.source, one.line_number, one.ordinal) END
            ORDER BY a.item_id = i.target DESC NULLS LAST, one.annotation_id, one.detection) AS turn
        -- On a photo without annotations each label has items of its own.
        FROM (
            SELECT image.recognition_id, image.camera_number
            FROM pg_temp.affected t
            JOIN public.images image ON image.recognition_id = t.recognition_id
            WHERE t.existing AND EXISTS (SELECT FROM public.initial_annotations o WHERE o.image_id = image.id)
        ) photo
        JOIN pg_temp.wanted_detections one ON one.recognition_id = photo.recognition_id
            AND one.camera_number = photo.camera_number
        LEFT JOIN pg_temp.wanted_items place ON place.recognition_id = one.recognition_id
            AND place.item_type = one.item_type AND place.source = one.source AND place.line_number = one.line_number
            AND place.ordinal = one.ordinal
        LEFT JOIN pg_temp.present_annotations a ON a.id = one.annotation_id
        CROSS JOIN LATERAL (SELECT coalesce(one.item_id, place.item_id) AS target) i
    ) d
    LEFT JOIN pg_temp.present_items p ON p.id = d.former_id AND p.source = 'MODEL' AND p.line_number = d.line_number
        AND NOT EXISTS (SELECT FROM pg_temp.wanted_items w WHERE w.item_id = p.id)
    WHERE d.turn > 1 OR (d.former_id IS DISTINCT FROM d.target AND EXISTS (
        SELECT FROM public.initial_annotations o
        JOIN public.images image ON image.id = o.image_id AND image.camera_number = d.camera_number
        WHERE o.initial_tray_item_id = d.target AND o.bbox = d.bbox AND o.source IS DISTINCT FROM 'MODEL'));

    INSERT INTO pg_temp.wanted_items
        (recognition_id, item_type, source, line_number, ordinal, stays, metadata, item_id)
    SELECT p.recognition_id, p.item_type, 'MODEL', p.line_number, p.ordinal, false,
        jsonb_build_object('item_number', p.ordinal), p.item_id
    FROM pg_temp.parted p;
    UPDATE pg_temp.wanted_detections d
    SET source = 'MODEL', ordinal = p.ordinal, item_id = NULL
    FROM pg_temp.parted p
    WHERE d.recognition_id = p.recognition_id AND d.camera_number = p.camera_number AND d.detection = p.detection;
END
$$;

CREATE OR REPLACE FUNCTION ingest.plan_stale() RETURNS void
LANGUAGE plpgsql
AS $$
-- Work out pg_temp.stale: what the domain has of pg_temp.affected, and is wanted no more. OFFSET 0 keeps the planner
-- from beginning with a table of the domain.
BEGIN
    PERFORM ingest.plan_stale_lines();
    IF NOT EXISTS (SELECT FROM pg_temp.affected WHERE existing) THEN
        RETURN;
    END IF;

    INSERT INTO pg_temp.stale
    SELECT 'public.initial_annotations'::regclass, a.id, t.recognition_id
    FROM pg_temp.affected t
    CROSS JOIN LATERAL (
        SELECT image.id, image.camera_number FROM public.images image
        WHERE image.recognition_id = t.recognition_id OFFSET 0
    ) i
    CROSS JOIN LATERAL (
        SELECT one.id, one.source FROM public.initial_annotations one WHERE one.image_id = i.id OFFSET 0
    ) a
    WHERE t.existing AND a.source = 'MODEL'
        AND NOT EXISTS (SELECT FROM pg_temp.wanted_detections w WHERE w.annotation_id = a.id)
        AND NOT (t.is_adopted AND t.qwen_batch_ids[i.camera_number] IS NULL
            AND ingest.is_adopted_row('public.initial_annotations', a.id));

    INSERT INTO pg_temp.stale
    SELECT 'public.initial_tray_items'::regclass, i.id, i.recognition_id
    FROM pg_temp.present_items i
    WHERE i.source = 'MODEL' AND NOT EXISTS (SELECT FROM pg_temp.wanted_items w WHERE w.item_id = i.id)
        AND NOT EXISTS (SELECT FROM pg_temp.wanted_detections d WHERE d.item_id = i.id);

    INSERT INTO pg_temp.stale
    SELECT 'public.images'::regclass, i.id, t.recognition_id
    FROM pg_temp.affected t
    CROSS JOIN LATERAL (
        SELECT image.id FROM public.images image WHERE image.recognition_id = t.recognition_id OFFSET 0
    ) i
    WHERE t.existing AND (t.batch_id IS NULL
        OR (t.is_adopted AND NOT ingest.is_adopted_row('public.images', i.id)));

    INSERT INTO pg_temp.stale
    SELECT 'public.recognitions'::regclass, t.recognition_id, t.recognition_id
    FROM pg_temp.affected t
    WHERE t.existing AND t.batch_id IS NULL;

    -- Entries of the former menu that the new one has not, in a table of the app; those that others added stay.
    IF ingest.has_menu_table() THEN
        INSERT INTO pg_temp.stale
        SELECT 'public.recognition_active_menu_items'::regclass, e.id, t.recognition_id
        FROM pg_temp.affected t
        JOIN public.recognitions p ON p.id = t.recognition_id
        JOIN public.menu_items f ON f.menu_id = p.menu_id
        JOIN public.recognition_active_menu_items e ON e.recognition_id = p.id AND e.external_id = f.external_id
        LEFT JOIN raw.receipts r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
        LEFT JOIN pg_temp.menu_of o ON o.batch_id = r.batch_id AND o.sha256 = r.menu_sha256
        LEFT JOIN public.menus m ON m.id = p.menu_id
        WHERE t.existing AND m.content_sha256 IS DISTINCT FROM o.content_sha256
            AND NOT EXISTS (
                SELECT FROM jsonb_array_elements(o.content) AS entry WHERE entry ->> 'ExternalId' = f.external_id)
            -- An adopted recognition keeps the entries that it had.
            AND NOT (t.was_adopted AND NOT EXISTS (
                SELECT FROM pg_temp.kept_rows k
                WHERE k.relation = 'public.recognition_active_menu_items' AND k.id = e.id AND k.content IS NULL))
        GROUP BY e.id, t.recognition_id;
    END IF;

    -- A menu goes with the last recognition that had it: it stays if one of them does.
    INSERT INTO pg_temp.stale
    SELECT 'public.menus'::regclass, m.id, candidate.recognition_id
    FROM (SELECT p.menu_id, min(p.id) AS recognition_id
          FROM pg_temp.affected t
          JOIN public.recognitions p ON p.id = t.recognition_id
          WHERE t.existing AND p.menu_id IS NOT NULL
          GROUP BY p.menu_id) candidate
    JOIN public.menus m ON m.id = candidate.menu_id
    WHERE NOT EXISTS (SELECT FROM pg_temp.menu_of o WHERE o.content_sha256 = m.content_sha256)
        AND NOT EXISTS (
            SELECT FROM public.recognitions p
            WHERE p.menu_id = m.id AND NOT EXISTS (SELECT FROM pg_temp.affected t WHERE t.recognition_id = p.id));

    INSERT INTO pg_temp.stale
    SELECT 'public.menu_items'::regclass, i.id, d.recognition_id
    FROM pg_temp.stale d
    JOIN public.menu_items i ON i.menu_id = d.id
    WHERE d.relation = 'public.menus'::regclass;
    ANALYZE pg_temp.stale;
END
$$;

CREATE OR REPLACE FUNCTION ingest.plan_affected() RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    CREATE UNIQUE INDEX ON pg_temp.affected (recognition_id);
    ANALYZE pg_temp.affected;
    -- Work on a recognition that begins now waits for the commit, and then finds its new rows; so does a choice.
    PERFORM FROM public.recognitions r
    WHERE r.id IN (SELECT t.recognition_id FROM pg_temp.affected t WHERE t.existing)
    ORDER BY r.id FOR UPDATE;
    PERFORM FROM public.initial_tray_items i
    WHERE i.recognition_id IN (SELECT t.recognition_id FROM pg_temp.affected t WHERE t.existing)
    ORDER BY i.id FOR UPDATE;
    PERFORM ingest.plan_lines();
    PERFORM ingest.plan_items();
    PERFORM ingest.plan_detections();
    PERFORM ingest.plan_equal_boxes();
    PERFORM ingest.plan_stale();
END
$$;

-- Writing it

CREATE OR REPLACE FUNCTION ingest.publish_way() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Remove annotations that go, and free the numbers of lines and the places of items that move or go.
DECLARE
    lines bigint;
    items bigint;
BEGIN
    DELETE FROM public.initial_annotations a
    USING pg_temp.stale d
    WHERE d.relation = 'public.initial_annotations'::regclass AND a.id = d.id;

    UPDATE public.recipe_lines l
    SET line_number = -1000000 - l.line_number
    FROM pg_temp.present_lines p
    LEFT JOIN pg_temp.wanted_lines w ON w.line_id = p.id
    WHERE l.id = p.id AND l.line_number >= 0 AND w.line_number IS DISTINCT FROM p.line_number;
    GET DIAGNOSTICS lines = ROW_COUNT;

    UPDATE public.initial_tray_items i
    SET line_number = NULL, metadata = i.metadata - 'qwen_label'
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
    CROSS JOIN LATERAL (SELECT CASE jsonb_typeof(i.item -> 'Price') WHEN 'null' THEN true
        WHEN 'number' THEN ingest.price_of(i.item -> 'Price') IS NOT NULL
        ELSE ingest.price_of(i.item -> 'Price')::text = i.item ->> 'Price' END) AS p (is_plain);
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
-- Fill the app's table of menu entries, if there is one; of an entry that a menu has twice, the first counts.
DECLARE
    written bigint;
BEGIN
    IF NOT ingest.has_menu_table() THEN
        RETURN 0;
    END IF;
    PERFORM ingest.keep_adopted_entries();
    INSERT INTO public.recognition_active_menu_items (recognition_id, external_id, name, category, price, metadata)
    SELECT t.recognition_id, i.external_id, i.name, i.category, i.price, i.metadata
    FROM pg_temp.affected t
    JOIN public.recognitions r ON r.id = t.recognition_id
    JOIN public.menu_items i ON i.menu_id = r.menu_id
    WHERE NOT t.is_adopted AND NOT EXISTS (
        SELECT FROM public.menu_items former
        WHERE former.menu_id = i.menu_id AND former.external_id = i.external_id AND former.position < i.position)
    ORDER BY t.recognition_id, i.position
    ON CONFLICT (recognition_id, external_id) DO UPDATE
        SET name = excluded.name, category = excluded.category, price = excluded.price, metadata = excluded.metadata
        WHERE (recognition_active_menu_items.name, recognition_active_menu_items.category,
               recognition_active_menu_items.price, recognition_active_menu_items.metadata)
            IS DISTINCT FROM (excluded.name, excluded.category, excluded.price, excluded.metadata);
    GET DIAGNOSTICS written = ROW_COUNT;
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
-- Write recipes, their lines and options. A line that stays keeps all but its number.
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
    JOIN public.recipe_lines l ON l.recipe_id = p.id AND l.line_number = w.line_number
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
-- stays keeps all but its place, and the entry of the menu, unless a person chose that.
DECLARE
    written bigint;
    moved bigint;
    chosen bigint;
BEGIN
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
        AND i.menu_item_external_id IS DISTINCT FROM menu.external_id;
    GET DIAGNOSTICS chosen = ROW_COUNT;

    UPDATE public.initial_tray_items i
    SET line_number = w.line_number, ordinal = w.ordinal,
        metadata = i.metadata || jsonb_strip_nulls(jsonb_build_object('qwen_label', w.metadata -> 'qwen_label'))
    FROM pg_temp.wanted_items w
    WHERE w.item_id = i.id AND w.stays IS NOT true
        AND (i.line_number, i.ordinal) IS DISTINCT FROM (w.line_number, w.ordinal);
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
        WHERE r.id = w.recognition_id
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
-- Write one annotation for each detection; the items that they belong to are there. Those that go make room first.
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
        AND item.item_type = d.item_type::public.item_type AND item.source = d.source::public.tray_item_source
        AND item.line_number = d.line_number AND item.ordinal = d.ordinal
    WHERE a.id = d.annotation_id AND (a.detection, a.label, a.initial_tray_item_id)
        IS DISTINCT FROM (d.detection, d.label, coalesce(d.item_id, item.id));
    GET DIAGNOSTICS moved = ROW_COUNT;

    PERFORM ingest.restore_adopted_annotations();
    INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, detection, label, bbox, source)
    SELECT i.id, coalesce(d.item_id, item.id), d.detection, d.label, d.bbox, 'MODEL'
    FROM pg_temp.wanted_detections d
    JOIN public.images i ON i.recognition_id = d.recognition_id AND i.camera_number = d.camera_number
    LEFT JOIN public.initial_tray_items item ON d.item_id IS NULL AND item.recognition_id = d.recognition_id
        AND item.item_type = d.item_type::public.item_type AND item.source = d.source::public.tray_item_source
        AND item.line_number = d.line_number AND item.ordinal = d.ordinal
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

CREATE OR REPLACE FUNCTION ingest.notice_other_photos(batch text) RETURNS void
LANGUAGE plpgsql
AS $$
-- Record which annotations are left out, since they are for another photo: in a batch, or if that is NULL in theirs.
BEGIN
    INSERT INTO ingest.notices (batch_id, recognition_id, path, code, message, step)
    SELECT coalesce(batch, m.batch_id), t.recognition_id, m.photo_paths[at], 'annotations_other_photo', format(
        'the annotations of %s are left out: they are for a photo of %s x %s pixels and orientation %s, and it has %s x %s '
        'and %s now', m.batch_id, m.widths[at], m.heights[at], coalesce(m.orientations[at], 1), f.width, f.height,
        coalesce(f.orientation, 1)), 'transform'
    FROM pg_temp.affected t
    CROSS JOIN LATERAL unnest(t.qwen_batch_ids) WITH ORDINALITY AS newest (batch_id, camera_number)
    CROSS JOIN LATERAL ingest.photo_of(t.batch_id, t.is_adopted, t.recognition_id, newest.camera_number::integer) f
    JOIN ingest.manifest m ON m.batch_id = newest.batch_id AND m.recognition_id = t.recognition_id
    CROSS JOIN LATERAL array_position(m.cameras, newest.camera_number::smallint) AS at
    WHERE NOT ingest.is_same_photo(m, newest.camera_number::integer, f.width, f.height, f.orientation)
        AND EXISTS (
            SELECT FROM raw.detections d
            WHERE d.batch_id = m.batch_id AND d.recognition_id = t.recognition_id
                AND d.camera_number = newest.camera_number)
    ORDER BY t.recognition_id, newest.camera_number;
END
$$;

-- Entry functions: the commit of a batch, and its reset

CREATE OR REPLACE FUNCTION ingest.plan_batch(batch text)
RETURNS TABLE (recognition_id bigint, app regclass, referencing bigint)
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET join_collapse_limit = 1
AS $$
-- Plan to make the domain show every recognition of a batch of kind 'load' in the batch's version, or the annotations of
-- a batch of kind 'qwen'; a recognition that is not there (its batch was reset meanwhile) gets those when it is loaded
-- again. Return which recognitions are in use: rows that others wrote reference what would be deleted. Leave out of the
-- plan those that are of others, and return them without a table.
DECLARE
    kind CONSTANT text := (SELECT b.kind FROM ingest.batches b WHERE b.id = batch);
    annotated CONSTANT boolean := EXISTS (SELECT FROM ingest.batches b WHERE b.kind = 'qwen' AND b.state = 'done');
    adopting CONSTANT boolean := EXISTS (SELECT FROM ingest.batches b WHERE b.adopted);
BEGIN
    IF kind = 'load' THEN
        CREATE TEMP TABLE affected ON COMMIT DROP AS
        SELECT r.recognition_id, r.batch_id,
            CASE WHEN annotated THEN ingest.newest_annotations(r.recognition_id, batch) END AS qwen_batch_ids,
            ingest.is_there(r.recognition_id) AS existing, false AS is_adopted,
            adopting AND ingest.was_adopted(r.recognition_id, batch) AS was_adopted
        FROM raw.receipts r
        WHERE r.batch_id = batch;
        RETURN QUERY
        DELETE FROM pg_temp.affected t
        WHERE t.existing AND NOT ingest.is_on_record(t.recognition_id)
        RETURNING t.recognition_id, NULL::regclass, NULL::bigint;
    ELSE
        RETURN QUERY
        SELECT p.id, NULL::regclass, NULL::bigint
        FROM ingest.manifest m
        JOIN public.recognitions p ON p.id = m.recognition_id
        WHERE m.batch_id = batch AND NOT m.rejected AND NOT ingest.is_on_record(p.id);
        CREATE TEMP TABLE affected ON COMMIT DROP AS
        SELECT p.id AS recognition_id, shown.id AS batch_id, ARRAY[
                CASE WHEN 1 = ANY (m.cameras) THEN m.batch_id ELSE former[1] END,
                CASE WHEN 2 = ANY (m.cameras) THEN m.batch_id ELSE former[2] END] AS qwen_batch_ids,
            true AS existing, shown.adopted AS is_adopted,
            adopting AND ingest.was_adopted(p.id, batch) AS was_adopted
        FROM ingest.manifest m
        JOIN public.recognitions p ON p.id = m.recognition_id
        JOIN ingest.batches shown ON shown.id = CASE WHEN adopting
            THEN (SELECT v FROM ingest.newest_version('load', p.id, NULL, batch) v) ELSE p.batch_id END
        CROSS JOIN LATERAL ingest.newest_annotations(p.id, batch) former
        WHERE m.batch_id = batch AND NOT m.rejected;
    END IF;
    PERFORM ingest.plan_adopted();
    PERFORM ingest.plan_affected();
    RETURN QUERY
    SELECT f.recognition_id, f.app, sum(f.referencing)::bigint
    FROM ingest.find_references(true) f
    GROUP BY f.recognition_id, f.app
    ORDER BY f.recognition_id, f.app;
END
$$;

CREATE OR REPLACE FUNCTION ingest.find_in_use(batch text)
RETURNS TABLE (recognition_id bigint, app regclass, referencing bigint)
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET join_collapse_limit = 1
AS $$
-- Return which recognitions are in use, of those that are there and whose receipts discovery has copied to raw.receipts
-- to ask. This looks at receipts alone and locks nothing; the commit looks again.
BEGIN
    CREATE TEMP TABLE affected ON COMMIT DROP AS
    SELECT r.recognition_id, r.batch_id, true AS existing, false AS is_adopted,
        ingest.was_adopted(r.recognition_id, batch) AS was_adopted
    FROM raw.receipts r WHERE r.batch_id = batch;
    CREATE UNIQUE INDEX ON pg_temp.affected (recognition_id);
    ANALYZE pg_temp.affected;
    PERFORM ingest.plan_adopted();
    PERFORM ingest.plan_lines();
    PERFORM ingest.plan_items();
    PERFORM ingest.plan_stale_lines();
    RETURN QUERY
    SELECT f.recognition_id, f.app, sum(f.referencing)::bigint
    FROM ingest.find_references(false) f
    GROUP BY f.recognition_id, f.app
    ORDER BY f.recognition_id, f.app;
    DELETE FROM raw.receipts r WHERE r.batch_id = batch;
END
$$;

CREATE OR REPLACE FUNCTION ingest.transform_batch(batch text)
RETURNS TABLE (operation text, rows_written bigint, seconds double precision)
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET join_collapse_limit = 1
AS $$
-- Carry out what ingest.plan_batch() worked out.
BEGIN
    PERFORM ingest.notice_other_photos(batch);
    RETURN QUERY SELECT p.* FROM ingest.batches b CROSS JOIN LATERAL ingest.publish_affected(b.kind) p WHERE b.id = batch;
END
$$;

CREATE OR REPLACE FUNCTION ingest.plan_reset(batch text) RETURNS void
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
        -- An adopted version may have given annotations to those that came after it.
        CREATE TEMP TABLE affected ON COMMIT DROP AS
        SELECT p.id AS recognition_id, former.id AS batch_id,
            CASE WHEN former.id IS NOT NULL THEN ingest.newest_annotations(p.id, batch) END AS qwen_batch_ids,
            true AS existing, coalesce(former.adopted, false) AS is_adopted,
            ingest.was_adopted(p.id, batch) AS was_adopted
        FROM ingest.manifest m
        JOIN public.recognitions p ON p.id = m.recognition_id
        LEFT JOIN LATERAL ingest.newest_version('load', p.id, NULL, batch) newest (id) ON true
        LEFT JOIN ingest.batches former ON former.id = newest.id
        WHERE m.batch_id = batch AND target.state = 'done' AND NOT m.rejected
            AND (target.adopted OR p.batch_id = batch);
    ELSE
        CREATE TEMP TABLE affected ON COMMIT DROP AS
        SELECT p.id AS recognition_id, shown.id AS batch_id, former AS qwen_batch_ids, true AS existing,
            shown.adopted AS is_adopted, ingest.was_adopted(p.id, batch) AS was_adopted
        FROM ingest.manifest m
        JOIN public.recognitions p ON p.id = m.recognition_id
        CROSS JOIN LATERAL ingest.newest_version('load', p.id, NULL, batch) newest (id)
        JOIN ingest.batches shown ON shown.id = newest.id
        CROSS JOIN LATERAL ingest.newest_annotations(p.id, batch) former
        WHERE m.batch_id = batch AND target.state = 'done' AND EXISTS (
            SELECT FROM unnest(m.cameras) AS camera
            LEFT JOIN ingest.batches f ON f.id = former[camera]
            WHERE f.version IS NULL OR f.version < target.version);
    END IF;
    PERFORM ingest.plan_adopted();
    PERFORM ingest.restore_adopted();
    PERFORM ingest.plan_affected();
END
$$;

CREATE OR REPLACE FUNCTION ingest.execute_reset(batch text) RETURNS bigint
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
    -- What is as it was when it was adopted needs no copy any more.
    DELETE FROM ingest.adopted_rows k
    USING pg_temp.affected t
    WHERE k.recognition_id = t.recognition_id AND (NOT t.was_adopted
        OR (t.is_adopted AND num_nonnulls(t.qwen_batch_ids[1], t.qwen_batch_ids[2]) = 0));
    RETURN removed;
END
$$;
