-- Recognitions that another tool loaded. An adopted batch has no raw rows: what it holds is what the domain had. When a
-- batch of ours first changes such a recognition, its rows are copied to ingest.adopted_rows; a reset that makes the
-- domain show the adopted version again gives them back, with their ids.

CREATE OR REPLACE FUNCTION ingest.plan_adopted() RETURNS void
LANGUAGE plpgsql
AS $$
-- Work out kept_rows: what the adopted recognitions in pg_temp.affected looked like before a batch of ours changed them,
-- which is how they look now if none has (`is_new`).
BEGIN
    -- A recognition that others deleted, and maybe inserted anew, since its rows were copied.
    DELETE FROM ingest.adopted_rows k
    USING pg_temp.affected t
    JOIN ingest.adopted_rows o ON o.relation = 'public.recognitions' AND o.id = t.recognition_id
    LEFT JOIN public.recognitions r ON r.id = t.recognition_id
    WHERE t.was_adopted AND k.recognition_id = t.recognition_id AND CASE WHEN o.content IS NULL
        THEN NOT EXISTS (SELECT FROM ingest.batches b WHERE b.id = r.batch_id AND NOT b.adopted)
        ELSE r.created_at IS DISTINCT FROM (o.content ->> 'created_at')::timestamptz OR r.id IS NULL END;
    CREATE TEMP TABLE kept_rows ON COMMIT DROP AS
    SELECT k.*, false AS is_new
    FROM pg_temp.affected t
    JOIN ingest.adopted_rows k ON k.recognition_id = t.recognition_id
    WHERE t.was_adopted;
    CREATE UNIQUE INDEX ON pg_temp.kept_rows (relation, id);
    CREATE INDEX ON pg_temp.kept_rows (recognition_id, relation);
    IF NOT EXISTS (SELECT FROM pg_temp.affected WHERE was_adopted) THEN
        RETURN;
    END IF;
    INSERT INTO pg_temp.kept_rows (relation, id, recognition_id, content, label, deleted, is_new)
    SELECT row.relation, row.id, t.recognition_id, row.content, row.label, false, true
    FROM pg_temp.affected t
    CROSS JOIN LATERAL (
        SELECT 'public.recognitions' AS relation, r.id, to_jsonb(r) AS content, NULL::text AS label
        FROM public.recognitions r WHERE r.id = t.recognition_id
        UNION ALL
        SELECT 'public.images', i.id, to_jsonb(i), NULL FROM public.images i WHERE i.recognition_id = t.recognition_id
        UNION ALL
        SELECT 'public.recipes', p.id, to_jsonb(p), NULL FROM public.recipes p WHERE p.recognition_id = t.recognition_id
        UNION ALL
        SELECT 'public.recipe_lines', l.id, to_jsonb(l), NULL
        FROM public.recipes p JOIN public.recipe_lines l ON l.recipe_id = p.id
        WHERE p.recognition_id = t.recognition_id
        UNION ALL
        SELECT 'public.recipe_line_options', o.id, to_jsonb(o), NULL
        FROM public.recipes p
        JOIN public.recipe_lines l ON l.recipe_id = p.id
        JOIN public.recipe_line_options o ON o.recipe_line_id = l.id
        WHERE p.recognition_id = t.recognition_id
        UNION ALL
        SELECT 'public.initial_tray_items', i.id, to_jsonb(i), NULL
        FROM public.initial_tray_items i WHERE i.recognition_id = t.recognition_id
        UNION ALL
        -- What another tool loaded has the label on the first item of a line alone.
        SELECT 'public.initial_annotations', a.id, to_jsonb(a), coalesce(a.label, item.metadata ->> 'qwen_label',
            'dish_' || line.line_number - 1, CASE item.item_type WHEN 'PLATE' THEN 'plate' END, '')
        FROM public.images i
        JOIN public.initial_annotations a ON a.image_id = i.id
        JOIN public.initial_tray_items item ON item.id = a.initial_tray_item_id
        LEFT JOIN public.recipe_line_options option ON option.id = item.recipe_line_option_id
        LEFT JOIN public.recipe_lines line ON line.id = coalesce(item.recipe_line_id, option.recipe_line_id)
        WHERE i.recognition_id = t.recognition_id
    ) row
    WHERE t.existing AND t.was_adopted
        AND NOT EXISTS (SELECT FROM ingest.adopted_rows k WHERE k.recognition_id = t.recognition_id);
    INSERT INTO pg_temp.kept_rows (relation, id, recognition_id, deleted, is_new)
    SELECT 'public.recognitions', t.recognition_id, t.recognition_id, false, true
    FROM pg_temp.affected t
    WHERE t.was_adopted AND NOT EXISTS (SELECT FROM public.recognitions r WHERE r.id = t.recognition_id);
    ANALYZE pg_temp.kept_rows;
END
$$;

CREATE OR REPLACE FUNCTION ingest.is_adopted_row(wanted text, row_id bigint) RETURNS boolean
LANGUAGE plpgsql STABLE
AS $$
-- Whether a row of a recognition in pg_temp.affected was there when it was adopted.
BEGIN
    RETURN EXISTS (
        SELECT FROM pg_temp.kept_rows k WHERE k.relation = wanted AND k.id = row_id AND k.content IS NOT NULL);
END
$$;

CREATE OR REPLACE FUNCTION ingest.keep_adopted() RETURNS void
LANGUAGE plpgsql
AS $$
-- Copy the rows that are to change for the first time, and note which of all the copied ones go.
BEGIN
    INSERT INTO ingest.adopted_rows (relation, id, recognition_id, content, label)
    SELECT relation, id, recognition_id, content, label FROM pg_temp.kept_rows WHERE is_new;
    -- With what people have set since.
    UPDATE ingest.adopted_rows k
    SET content = to_jsonb(a) || jsonb_build_object('initial_tray_item_id', k.content -> 'initial_tray_item_id',
        'detection', k.content -> 'detection', 'label', k.content -> 'label')
    FROM pg_temp.stale d
    JOIN public.initial_annotations a ON a.id = d.id
    WHERE d.relation = 'public.initial_annotations'::regclass AND k.relation = 'public.initial_annotations' AND k.id = d.id;
    UPDATE ingest.adopted_rows k
    SET content = to_jsonb(i) || jsonb_build_object('line_number', k.content -> 'line_number',
        'ordinal', k.content -> 'ordinal', 'menu_item_external_id', k.content -> 'menu_item_external_id',
        'metadata', ingest.label_with(i.metadata, k.content -> 'metadata' ->> 'qwen_label'))
    FROM pg_temp.stale d
    JOIN public.initial_tray_items i ON i.id = d.id
    WHERE d.relation = 'public.initial_tray_items'::regclass AND k.relation = 'public.initial_tray_items' AND k.id = d.id;
    UPDATE ingest.adopted_rows k
    SET content = to_jsonb(o)
    FROM pg_temp.stale d
    JOIN public.recipe_line_options o ON o.id = d.id
    WHERE d.relation = 'public.recipe_line_options'::regclass AND k.relation = 'public.recipe_line_options'
        AND k.id = d.id;
    UPDATE ingest.adopted_rows k
    SET deleted = true
    FROM pg_temp.stale d
    JOIN pg_catalog.pg_class c ON c.oid = d.relation
    WHERE k.relation = 'public.' || c.relname AND k.id = d.id;
END
$$;

CREATE OR REPLACE FUNCTION ingest.is_as_adopted(entry jsonb) RETURNS boolean
LANGUAGE sql STABLE
AS $$
-- Whether a menu entry, with its columns as an object, is as its copy from before the first batch of ours has it.
    SELECT EXISTS (
        SELECT FROM ingest.adopted_rows k
        WHERE k.relation = 'public.recognition_active_menu_items' AND k.id = (entry ->> 'id')::bigint
            AND (k.content -> 'name', k.content -> 'category', k.content -> 'price', k.content -> 'metadata')
                = (entry -> 'name', entry -> 'category', entry -> 'price', entry -> 'metadata'))
$$;

CREATE OR REPLACE FUNCTION ingest.keep_adopted_entries() RETURNS void
LANGUAGE plpgsql
AS $$
-- Give back the menu entries of adopted recognitions that the former menu has, and the new one has not; copy those that
-- the next statement overwrites. What others changed since a batch of ours wrote it stays.
BEGIN
    UPDATE public.recognition_active_menu_items e
    SET name = s.name, category = s.category, price = s.price, metadata = s.metadata
    FROM pg_temp.affected t
    JOIN pg_temp.menu_former m ON m.recognition_id = t.recognition_id
    JOIN public.recognitions r ON r.id = t.recognition_id
    JOIN pg_temp.kept_rows k ON k.recognition_id = t.recognition_id
        AND k.relation = 'public.recognition_active_menu_items'
    CROSS JOIN LATERAL jsonb_populate_record(NULL::public.recognition_active_menu_items, k.content) s
    WHERE t.was_adopted AND k.content IS NOT NULL AND e.id = k.id
        AND EXISTS (
            SELECT FROM public.menu_items f
            WHERE f.menu_id = m.menu_id AND f.external_id = e.external_id
                AND (f.name, f.category, f.price, f.metadata) IS NOT DISTINCT FROM (e.name, e.category, e.price, e.metadata)
            OFFSET 0)
        AND NOT EXISTS (
            SELECT FROM public.menu_items i WHERE i.menu_id = r.menu_id AND i.external_id = e.external_id OFFSET 0);
    INSERT INTO ingest.adopted_rows (relation, id, recognition_id, content)
    SELECT 'public.recognition_active_menu_items', e.id, t.recognition_id, to_jsonb(e)
    FROM pg_temp.affected t
    JOIN public.recognitions r ON r.id = t.recognition_id
    JOIN public.menu_items i ON i.menu_id = r.menu_id
    JOIN public.recognition_active_menu_items e ON e.recognition_id = r.id AND e.external_id = i.external_id
    LEFT JOIN pg_temp.menu_former m ON m.recognition_id = r.id
    WHERE t.was_adopted AND NOT t.is_adopted
        AND (e.name, e.category, e.price, e.metadata) IS DISTINCT FROM (i.name, i.category, i.price, i.metadata)
        AND (m.menu_id IS NULL OR EXISTS (
            SELECT FROM public.menu_items f
            WHERE f.menu_id = m.menu_id AND f.external_id = e.external_id
                AND (f.name, f.category, f.price, f.metadata) IS NOT DISTINCT FROM (e.name, e.category, e.price, e.metadata)
            OFFSET 0))
    ON CONFLICT (relation, id) DO NOTHING;
END
$$;

CREATE OR REPLACE FUNCTION ingest.insert_missing(wanted text) RETURNS void
LANGUAGE plpgsql
AS $$
-- Insert the rows of pg_temp.missing (id, content) into a table, and note that they are there again; but for those that
-- reference what others deleted, or without that reference if it is of several columns, as to an entry of a menu. A column
-- that is newer than the copy gets its default.
DECLARE
    columns text;
    condition text;
    optional text[];
    names text[];
BEGIN
    FOR condition, optional IN
        SELECT string_agg(format('(m.content ->> %L) IS NOT NULL AND ', a.attname), '')
            || format('NOT EXISTS (SELECT FROM %s p WHERE %s)', c.confrelid::regclass, string_agg(format(
                'p.%I = (m.content ->> %L)::%s', b.attname, a.attname, format_type(b.atttypid, NULL)), ' AND ')),
            array_agg(a.attname::text) FILTER (WHERE cardinality(c.conkey) > 1 AND NOT a.attnotnull)
        FROM pg_catalog.pg_constraint c
        CROSS JOIN LATERAL unnest(c.conkey, c.confkey) AS k (own, target)
        JOIN pg_catalog.pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.own
        JOIN pg_catalog.pg_attribute b ON b.attrelid = c.confrelid AND b.attnum = k.target
        WHERE c.contype = 'f' AND c.conrelid = wanted::regclass
        GROUP BY c.oid, c.confrelid
    LOOP
        IF optional IS NULL THEN
            EXECUTE 'DELETE FROM pg_temp.missing m WHERE ' || condition;
        ELSE
            EXECUTE 'UPDATE pg_temp.missing m SET content = m.content || (SELECT jsonb_object_agg(name, NULL) '
                'FROM unnest($1) AS name) WHERE ' || condition USING optional;
        END IF;
    END LOOP;
    FOR names IN
        SELECT DISTINCT ARRAY(SELECT key FROM jsonb_object_keys(m.content) AS key ORDER BY key) FROM pg_temp.missing m
    LOOP
        SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) INTO columns
        FROM pg_catalog.pg_attribute a
        WHERE a.attrelid = wanted::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
            AND a.attname = ANY (names);
        EXECUTE format(
            'INSERT INTO %1$s (%2$s) OVERRIDING SYSTEM VALUE SELECT %2$s FROM (SELECT r.* FROM pg_temp.missing m '
            'CROSS JOIN LATERAL jsonb_populate_record(NULL::%1$s, m.content) r '
            'WHERE ARRAY(SELECT key FROM jsonb_object_keys(m.content) AS key ORDER BY key) = $1) back ORDER BY id',
            wanted, columns)
        USING names;
    END LOOP;
    UPDATE ingest.adopted_rows k SET deleted = false FROM pg_temp.missing m WHERE k.relation = wanted AND k.id = m.id;
    DROP TABLE pg_temp.missing;
END
$$;

CREATE OR REPLACE FUNCTION ingest.insert_adopted(wanted text) RETURNS void
LANGUAGE plpgsql
AS $$
-- Insert the rows that batches of ours deleted; of annotations those of photos that no batch annotates.
BEGIN
    CREATE TEMP TABLE missing ON COMMIT DROP AS
    SELECT k.id, k.content
    FROM pg_temp.affected t
    JOIN pg_temp.kept_rows k ON k.recognition_id = t.recognition_id AND k.relation = wanted AND k.deleted
    LEFT JOIN public.images i ON wanted = 'public.initial_annotations' AND i.id = (k.content ->> 'image_id')::bigint
    WHERE t.is_adopted AND k.content IS NOT NULL AND (i.id IS NULL OR t.qwen_batch_ids[i.camera_number] IS NULL);
    PERFORM ingest.insert_missing(wanted);
END
$$;

CREATE OR REPLACE FUNCTION ingest.restore_adopted() RETURNS void
LANGUAGE plpgsql
AS $$
-- Give back photos, lines and items of pg_temp.affected as they were when they were adopted, so that the plan finds them.
-- Rows that batches of ours added give up their numbers and labels, and are stale in the plan.
BEGIN
    CREATE TEMP TABLE restored ON COMMIT DROP AS
    SELECT k.recognition_id, k.relation, k.id, k.content
    FROM pg_temp.affected t
    JOIN pg_temp.kept_rows k ON k.recognition_id = t.recognition_id
    WHERE t.is_adopted AND NOT k.is_new AND k.content IS NOT NULL
        AND (NOT t.keeps_receipt OR k.relation = 'public.initial_annotations');
    IF NOT EXISTS (SELECT FROM pg_temp.restored) THEN
        RETURN;
    END IF;
    CREATE UNIQUE INDEX ON pg_temp.restored (relation, id);
    ANALYZE pg_temp.restored;

    UPDATE public.images i
    SET storage_path = s.storage_path, width = s.width, height = s.height, byte_size = s.byte_size, sha256 = s.sha256,
        orientation = s.orientation
    FROM pg_temp.restored k
    CROSS JOIN LATERAL jsonb_populate_record(NULL::public.images, k.content) s
    WHERE k.relation = 'public.images' AND i.id = k.id;

    PERFORM ingest.insert_adopted('public.recipes');
    UPDATE public.recipe_lines l
    SET line_number = -1000000 - l.line_number
    FROM pg_temp.restored k
    JOIN public.recipes p ON p.recognition_id = k.recognition_id
    WHERE k.relation = 'public.recognitions' AND l.recipe_id = p.id AND l.line_number >= 0;
    UPDATE public.recipe_lines l
    SET line_number = (k.content ->> 'line_number')::integer
    FROM pg_temp.restored k
    WHERE k.relation = 'public.recipe_lines' AND l.id = k.id;
    PERFORM ingest.insert_adopted('public.recipe_lines');
    PERFORM ingest.insert_adopted('public.recipe_line_options');

    -- What the model alone saw keeps its place, and gets its label again with the plan.
    UPDATE public.initial_tray_items i
    SET line_number = CASE WHEN i.source = 'MODEL' AND NOT was.adopted THEN i.line_number END,
        metadata = ingest.label_with(i.metadata, NULL)
    FROM pg_temp.restored k
    JOIN public.initial_tray_items one ON one.recognition_id = k.recognition_id
    CROSS JOIN LATERAL (
        SELECT ingest.is_adopted_row('public.initial_tray_items', one.id) AS adopted
    ) was
    WHERE k.relation = 'public.recognitions' AND i.id = one.id AND i.source IN ('RECIPE_LINE_OPTION', 'MODEL')
        AND (i.line_number IS NOT NULL OR NOT was.adopted);
    -- What a person chose or cleared since stays so: what is not as the menu gave it to an item of the version that goes.
    UPDATE public.initial_tray_items i
    SET line_number = s.line_number, ordinal = s.ordinal,
        metadata = ingest.label_with(i.metadata, s.metadata ->> 'qwen_label'),
        menu_item_external_id = CASE WHEN i.source = 'RECIPE_LINE_OPTION' AND i.ordinal IS NOT NULL
            AND CASE WHEN menu.has_entry THEN i.menu_item_external_id = o.external_id AND NOT EXISTS (
                    SELECT FROM public.recipe_line_options other
                    WHERE other.recipe_line_id = o.recipe_line_id AND other.id <> o.id)
                ELSE i.menu_item_external_id IS NULL END
            -- Without the entry, if others deleted that.
            THEN (SELECT s.menu_item_external_id WHERE NOT ingest.has_menu_table() OR EXISTS (
                SELECT FROM public.recognition_active_menu_items e
                WHERE e.recognition_id = i.recognition_id AND e.external_id = s.menu_item_external_id OFFSET 0))
            ELSE i.menu_item_external_id END
    FROM pg_temp.restored k
    CROSS JOIN LATERAL jsonb_populate_record(NULL::public.initial_tray_items, k.content) s
    LEFT JOIN public.recipe_line_options o ON o.id = s.recipe_line_option_id
    CROSS JOIN LATERAL (
        SELECT EXISTS (
            SELECT FROM public.recognitions r
            JOIN public.menu_items m ON m.menu_id = r.menu_id AND m.external_id = o.external_id
            WHERE r.id = k.recognition_id OFFSET 0) AS has_entry
    ) menu
    WHERE k.relation = 'public.initial_tray_items' AND i.id = k.id
        AND (i.line_number, i.ordinal, i.metadata ->> 'qwen_label', i.menu_item_external_id)
            IS DISTINCT FROM (s.line_number, s.ordinal, s.metadata ->> 'qwen_label', s.menu_item_external_id);
    PERFORM ingest.insert_adopted('public.initial_tray_items');
END
$$;

CREATE OR REPLACE FUNCTION ingest.note_added_entries() RETURNS void
LANGUAGE plpgsql
AS $$
-- Note which menu entries of adopted recognitions this transaction inserted.
BEGIN
    INSERT INTO ingest.adopted_rows (relation, id, recognition_id)
    SELECT 'public.recognition_active_menu_items', e.id, e.recognition_id
    FROM pg_temp.affected t
    JOIN public.recognition_active_menu_items e ON e.recognition_id = t.recognition_id
    WHERE t.was_adopted AND NOT t.is_adopted AND e.created_at = now()
    ON CONFLICT (relation, id) DO NOTHING;
END
$$;

CREATE OR REPLACE FUNCTION ingest.restore_adopted_recognitions() RETURNS bigint
LANGUAGE plpgsql
AS $$
-- Give back what restore_adopted() leaves to the time after the plan, which reads the menu that goes.
DECLARE
    written bigint := 0;
BEGIN
    IF to_regclass('pg_temp.restored') IS NOT NULL THEN
        UPDATE public.recognitions r
        SET batch_id = s.batch_id, menu_id = s.menu_id, captured_on = s.captured_on
        FROM pg_temp.restored k
        CROSS JOIN LATERAL jsonb_populate_record(NULL::public.recognitions, k.content) s
        WHERE k.relation = 'public.recognitions' AND r.id = k.id;
        GET DIAGNOSTICS written = ROW_COUNT;
    END IF;
    RETURN written;
END
$$;

CREATE OR REPLACE FUNCTION ingest.restore_adopted_annotations() RETURNS void
LANGUAGE plpgsql
AS $$
-- Give back the annotations of photos that no batch of ours annotates: to the adopted version with their items, to one of
-- ours with the items that the plan found for them.
BEGIN
    IF to_regclass('pg_temp.restored') IS NOT NULL THEN
        UPDATE public.initial_annotations a
        SET initial_tray_item_id = s.initial_tray_item_id, detection = s.detection, label = s.label
        FROM pg_temp.restored k
        CROSS JOIN LATERAL jsonb_populate_record(NULL::public.initial_annotations, k.content) s
        JOIN public.images i ON i.id = s.image_id
        JOIN public.initial_tray_items item ON item.id = s.initial_tray_item_id
        JOIN pg_temp.affected t ON t.recognition_id = i.recognition_id AND t.qwen_batch_ids[i.camera_number] IS NULL
        WHERE k.relation = 'public.initial_annotations' AND a.id = k.id
            AND (a.initial_tray_item_id, a.detection, a.label)
                IS DISTINCT FROM (s.initial_tray_item_id, s.detection, s.label);
        PERFORM ingest.insert_adopted('public.initial_annotations');
    END IF;
    IF EXISTS (SELECT FROM pg_temp.wanted_detections d WHERE d.adopted_id IS NOT NULL AND d.annotation_id IS NULL) THEN
        CREATE TEMP TABLE missing ON COMMIT DROP AS
        SELECT k.id, k.content || jsonb_build_object('initial_tray_item_id', coalesce(d.item_id, item.id),
            'detection', d.detection, 'label', d.label) AS content
        FROM pg_temp.wanted_detections d
        JOIN pg_temp.kept_rows k ON k.relation = 'public.initial_annotations' AND k.id = d.adopted_id
        LEFT JOIN public.initial_tray_items item ON d.item_id IS NULL AND item.recognition_id = d.recognition_id
            AND item.source = d.source::public.tray_item_source AND item.line_number = d.line_number
            AND item.ordinal = d.ordinal
        WHERE d.annotation_id IS NULL;
        PERFORM ingest.insert_missing('public.initial_annotations');
    END IF;
END
$$;
