-- What readers see of a recognition follows from three batches alone: the newest finished one of kind 'load' that holds
-- it, and for each of its two photos the newest finished one of kind 'qwen' that is for this photo. A commit and a reset
-- do the same with it.
-- They list the recognitions that they affect in the temporary table pg_temp.affected:
--
--     recognition_id, batch_id (of its photos; NULL when none is left, so that its rows go), qwen_batch_ids (of the
--     annotations of camera 1 and 2; NULL where there are none), existing (whether the domain has it already),
--     is_adopted (batch_id is an adopted batch, whose rows stay as they are), was_adopted (an adopted batch has it, whose
--     annotations stay on photos of the same size until others take their place), keeps_receipt (a batch of kind 'qwen' is
--     committed or reset: lines, options and their items stay as they are, with what people changed)
--
-- ingest.plan_affected() fills in qwen_batch_ids and works out from the raw rows what is wanted, and which rows are stale (pg_temp.stale), and
-- changes nothing; ingest.publish_affected() writes the one and deletes the other. Rows go by natural key: those that
-- stay keep their ids.
--
-- The settings of the planner stand once, on the entry functions at the end; the functions that these call inherit
-- them, but for ingest.publish_unannotated(). Every join goes through an index, row by row, in the order in which it is written: right after a bulk load there
-- are no statistics yet, a scan of a whole table looks cheap, and the cost of a batch must not depend on what is loaded
-- already. The samples of ANALYZE are small: it runs on each temporary table, and many have wide rows.

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
-- The amount of a price of at most two decimals, a number or a text such as "1 234,50 ₽"; NULL if there is none. A point or
-- comma is a decimal one, but not before three digits, which may be a group; groups are where they are no decimals.
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
-- Whether the newest finished batch of kind 'load' that has a recognition is the one whose id the domain shows, or the
-- domain has none. Any other is of others: it was not adopted yet, or they loaded it anew or took it over.
    SELECT coalesce((
        SELECT r.id IS NULL OR coalesce(r.batch_id, '') = CASE WHEN b.adopted THEN coalesce(b.adopted_from, '') ELSE b.id END
        FROM ingest.manifest m
        JOIN ingest.batches b ON b.id = m.batch_id
        LEFT JOIN public.recognitions r ON r.id = m.recognition_id
        WHERE m.recognition_id = recognition AND b.kind = 'load' AND b.state = 'done'
        ORDER BY b.version DESC
        LIMIT 1), false)
$$;

CREATE OR REPLACE FUNCTION ingest.is_there(recognition bigint) RETURNS boolean
LANGUAGE sql STABLE
AS $$
-- Whether the domain has rows of a recognition. No key ties a recipe to it: one may be left of a recognition that went.
    SELECT EXISTS (SELECT FROM public.recognitions r WHERE r.id = recognition)
        OR EXISTS (SELECT FROM public.recipes r WHERE r.recognition_id = recognition)
$$;

CREATE OR REPLACE FUNCTION ingest.newest_version(recognition bigint, besides text) RETURNS SETOF text
LANGUAGE sql STABLE
AS $$
-- The finished batch whose version of a recognition readers see, were it not for the batch `besides`.
    SELECT b.id
    FROM ingest.manifest m
    JOIN ingest.batches b ON b.id = m.batch_id
    WHERE m.recognition_id = recognition AND b.kind = 'load' AND b.state = 'done' AND b.id <> besides
    ORDER BY b.version DESC
    LIMIT 1
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
    m ingest.manifest, camera integer, sha256 text, width integer, height integer, orientation integer) RETURNS boolean
LANGUAGE sql IMMUTABLE
AS $$
-- Whether a photo is the one for which the boxes of a batch of kind 'qwen' were worked out: by content, else by size and
-- orientation. Of an adopted photo neither content nor orientation is known: the tool that loaded it encoded it anew.
-- An expression without FROM, so that the planner inlines it.
    SELECT coalesce(sha256 = m.photo_sha256s[array_position(m.cameras, camera)],
        width = m.widths[array_position(m.cameras, camera)] AND height = m.heights[array_position(m.cameras, camera)]
        AND coalesce(orientation, 1) = coalesce(m.orientations[array_position(m.cameras, camera)]::integer, 1))
$$;

CREATE OR REPLACE FUNCTION ingest.annotations_of(recognition bigint, camera integer, batch text)
RETURNS TABLE (version bigint, entry ingest.manifest)
LANGUAGE sql STABLE
AS $$
-- What finished batches of kind 'qwen' have of a camera, whichever photo it is for, once `batch` is committed, or if it is
-- finished already, reset. Without a version is the one that is committed.
    SELECT b.version, m
    FROM ingest.manifest m
    JOIN ingest.batches b ON b.id = m.batch_id
    WHERE m.recognition_id = recognition AND camera = ANY (m.cameras)
        AND b.kind = 'qwen' AND (b.state = 'done') <> (b.id = batch)
$$;

CREATE OR REPLACE FUNCTION ingest.annotations_of_photo(
    recognition bigint, camera integer, sha256 text, width integer, height integer, orientation integer, batch text)
RETURNS SETOF text
LANGUAGE sql STABLE
AS $$
-- The batch whose annotations of a photo readers see, once `batch` is committed or reset.
    SELECT (a.entry).batch_id
    FROM ingest.annotations_of(recognition, camera, batch) a
    WHERE ingest.is_same_photo(a.entry, camera, sha256, width, height, orientation)
    ORDER BY a.version DESC
    LIMIT 1
$$;

CREATE OR REPLACE FUNCTION ingest.photo_of(shown text, is_adopted boolean, recognition bigint, camera integer)
RETURNS TABLE (sha256 text, width integer, height integer, orientation integer)
LANGUAGE sql STABLE
AS $$
-- A photo as the batch `shown` has it; what an adopted batch has is in the domain alone.
    SELECT f.sha256, f.width, f.height, f.orientation::integer
    FROM raw.photos f
    WHERE NOT is_adopted AND f.batch_id = shown AND f.recognition_id = recognition AND f.camera_number = camera
    UNION ALL
    SELECT i.sha256, i.width, i.height, i.orientation::integer
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

CREATE OR REPLACE FUNCTION ingest.label_with(metadata jsonb, label text) RETURNS jsonb
LANGUAGE sql IMMUTABLE
AS $$
-- The metadata of an item with this label, or with none; what is no object stays as it is.
    SELECT CASE WHEN jsonb_typeof(metadata) = 'object'
        THEN metadata - 'qwen_label' || jsonb_strip_nulls(jsonb_build_object('qwen_label', label)) ELSE metadata END
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
                    THEN ' AND (app.source NOT IN (''RECIPE_LINE_OPTION'', ''MODEL'') OR app.item_type NOT IN (''FOOD'', ''PLATE'')'
                        -- One that stays, and that a person gave an option, a line or an entry that goes.
                        ' OR EXISTS (SELECT FROM pg_temp.present_items p WHERE p.id = app.id AND p.is_decided)'
                        ' AND NOT EXISTS (SELECT FROM pg_temp.stale g'
                        ' WHERE g.relation = ''public.initial_tray_items''::regclass AND g.id = app.id))'
                WHEN 'public.recognition_active_menu_items'::regclass
                    THEN ' AND NOT EXISTS (SELECT FROM pg_temp.stale g'
                        ' WHERE g.relation = ''public.recognition_active_menu_items''::regclass AND g.id = app.id)'
                ELSE '' END
        FROM pg_catalog.pg_constraint c
        WHERE c.contype = 'f' AND c.conparentid = 0 AND c.confrelid = ANY (ours::oid[])
            AND (c.conrelid <> ALL (ours::oid[])
                OR c.conrelid IN ('public.initial_tray_items'::regclass, 'public.initial_annotations'::regclass)
                OR (c.conrelid = 'public.recognition_active_menu_items'::regclass
                    AND c.confrelid = 'public.recognitions'::regclass))
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
