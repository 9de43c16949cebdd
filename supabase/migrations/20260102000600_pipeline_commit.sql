-- The entry functions: the commit of a batch, and its reset.

CREATE OR REPLACE FUNCTION ingest.publish_unannotated(batch text) RETURNS bigint
LANGUAGE plpgsql
SET enable_nestloop = off
SET enable_hashjoin = on
AS $$
-- Write the annotations of pg_temp.unannotated with the items that only the model saw, by the rule of plan_detections().
-- This joins only what the batch has, as a whole, whatever the statistics say.
DECLARE
    written bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_temp.unannotated) THEN
        RETURN 0;
    END IF;
    WITH seen AS MATERIALIZED (
        SELECT d.*, CASE d.line_number WHEN 0 THEN 'PLATE' ELSE 'FOOD' END::public.item_type AS item_type,
            image.id AS image_id, place.item_ids[least(d.nth, cardinality(place.item_ids))] AS item_id
        FROM (
            SELECT q.recognition_id, q.camera_number, q.detection, q.label, ingest.line_of(q.label) AS line_number,
                jsonb_build_object('x', q.x1, 'y', q.y1, 'w', trim_scale(q.x2 - q.x1), 'h', trim_scale(q.y2 - q.y1))
                    AS bbox,
                row_number() OVER (
                    PARTITION BY q.recognition_id, q.camera_number, q.label COLLATE "C" ORDER BY q.detection)::integer AS nth
            FROM raw.detections q
            WHERE q.batch_id = batch
            OFFSET 0
        ) d
        JOIN pg_temp.unannotated_photos image USING (recognition_id, camera_number)
        LEFT JOIN pg_temp.unannotated_lines place USING (recognition_id, line_number)
    ), item AS (
        INSERT INTO public.initial_tray_items (recognition_id, item_type, source, line_number, ordinal, metadata)
        SELECT s.recognition_id, s.item_type, 'MODEL', s.line_number, s.nth,
            CASE s.nth WHEN 1 THEN jsonb_build_object('qwen_label', min(s.label)) ELSE '{}' END
                || jsonb_build_object('item_number', s.nth)
        FROM seen s
        WHERE s.item_id IS NULL
        GROUP BY s.recognition_id, s.item_type, s.line_number, s.nth
        ORDER BY s.recognition_id, s.item_type, s.line_number, s.nth
        RETURNING id, recognition_id, line_number, ordinal
    )
    INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, detection, label, bbox, source)
    SELECT s.image_id, coalesce(s.item_id, item.id), s.detection, s.label, s.bbox, 'MODEL'
    FROM seen s
    LEFT JOIN item ON s.item_id IS NULL AND item.recognition_id = s.recognition_id AND item.line_number = s.line_number
        AND item.ordinal = s.nth
    ORDER BY s.image_id, s.detection;
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END
$$;

CREATE OR REPLACE FUNCTION ingest.plan_batch(batch text)
RETURNS TABLE (recognition_id bigint, app regclass, referencing bigint)
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET default_statistics_target = 10
SET join_collapse_limit = 1
AS $$
-- Plan to make the domain show every recognition of a batch of kind 'load' in the batch's version, or the annotations of
-- a batch of kind 'qwen'; a recognition that is not there (its batch was reset meanwhile) gets those when it is loaded
-- again. Return which recognitions are in use: rows that others wrote reference what would be deleted. Leave out of the
-- plan those that are of others, and return them without a table.
DECLARE
    kind CONSTANT text := (SELECT b.kind FROM ingest.batches b WHERE b.id = batch);
    adopting CONSTANT boolean := EXISTS (SELECT FROM ingest.batches b WHERE b.adopted);
BEGIN
    IF kind = 'load' THEN
        CREATE TEMP TABLE affected ON COMMIT DROP AS
        SELECT r.recognition_id, r.batch_id, NULL::text[] AS qwen_batch_ids,
            ingest.is_there(r.recognition_id) AS existing, false AS is_adopted,
            adopting AND ingest.was_adopted(r.recognition_id, batch) AS was_adopted, false AS keeps_receipt
        FROM raw.receipts r
        WHERE r.batch_id = batch;
    ELSE
        PERFORM ingest.plan_unannotated(batch);
        CREATE TEMP TABLE affected ON COMMIT DROP AS
        SELECT p.id AS recognition_id, shown.id AS batch_id, NULL::text[] AS qwen_batch_ids, true AS existing,
            shown.adopted AS is_adopted, adopting AND ingest.was_adopted(p.id, batch) AS was_adopted, true AS keeps_receipt
        FROM (
            SELECT m.recognition_id FROM ingest.manifest m WHERE m.batch_id = batch AND NOT m.rejected
            EXCEPT SELECT u.recognition_id FROM pg_temp.unannotated u
        ) m
        JOIN public.recognitions p ON p.id = m.recognition_id
        LEFT JOIN LATERAL ingest.newest_version(p.id, batch) newest (id) ON true
        LEFT JOIN ingest.batches shown ON shown.id = newest.id;
    END IF;
    RETURN QUERY
    DELETE FROM pg_temp.affected t
    WHERE t.existing AND NOT ingest.is_on_record(t.recognition_id)
    RETURNING t.recognition_id, NULL::regclass, NULL::bigint;
    PERFORM ingest.plan_adopted();
    PERFORM ingest.plan_affected(batch, true);
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
SET default_statistics_target = 10
SET join_collapse_limit = 1
AS $$
-- Return which recognitions are in use, of those that are there and whose receipts discovery has copied to raw.receipts
-- to ask. This looks at receipts and sizes of photos in pg_temp.staged, and locks nothing; the commit looks again.
BEGIN
    CREATE TEMP TABLE affected ON COMMIT DROP AS
    SELECT r.recognition_id, r.batch_id, true AS existing, false AS is_adopted,
        ingest.was_adopted(r.recognition_id, batch) AS was_adopted, false AS keeps_receipt
    FROM raw.receipts r WHERE r.batch_id = batch;
    IF NOT EXISTS (SELECT FROM pg_temp.affected) THEN
        RETURN;
    END IF;
    CREATE UNIQUE INDEX ON pg_temp.affected (recognition_id);
    ANALYZE pg_temp.affected;
    PERFORM ingest.plan_adopted();
    PERFORM ingest.plan_lines();
    PERFORM ingest.plan_items();
    PERFORM ingest.plan_stale_lines();
    -- A photo of another size in bytes is another photo. Its boxes go, if all that is on record of it is for the former one.
    INSERT INTO pg_temp.stale
    SELECT 'public.initial_annotations'::regclass, a.id, t.recognition_id
    FROM pg_temp.affected t
    JOIN pg_temp.staged s ON s.recognition_id = t.recognition_id
    JOIN public.images i ON i.recognition_id = t.recognition_id AND i.byte_size <> s.photo_sizes[i.camera_number]
    JOIN public.initial_annotations a ON a.image_id = i.id AND a.source = 'MODEL'
    WHERE NOT t.was_adopted AND NOT EXISTS (
        SELECT FROM ingest.annotations_of(t.recognition_id, i.camera_number, '') o
        WHERE (o.entry).photo_sha256s[array_position((o.entry).cameras, i.camera_number)] IS DISTINCT FROM i.sha256);
    INSERT INTO pg_temp.stale
    SELECT DISTINCT 'public.initial_tray_items'::regclass::oid, p.id, p.recognition_id
    FROM pg_temp.stale d
    JOIN public.initial_annotations a ON a.id = d.id
    JOIN pg_temp.present_items p ON p.id = a.initial_tray_item_id AND p.source = 'MODEL'
    WHERE d.relation = 'public.initial_annotations'::regclass AND NOT EXISTS (
        SELECT FROM public.initial_annotations o
        WHERE o.initial_tray_item_id = p.id AND NOT EXISTS (
            SELECT FROM pg_temp.stale g WHERE g.relation = 'public.initial_annotations'::regclass AND g.id = o.id));
    -- A receipt line takes over what only the model saw in its place, unless others or another label show it as well, or
    -- equal boxes may part.
    INSERT INTO pg_temp.stale
    SELECT 'public.initial_tray_items'::regclass, p.id, p.recognition_id
    FROM pg_temp.present_items p
    JOIN pg_temp.wanted_lines w ON w.recognition_id = p.recognition_id AND w.line_number = p.line_number AND w.quantity > 0
    WHERE p.source = 'MODEL' AND NOT EXISTS (
            SELECT FROM pg_temp.stale g WHERE g.relation = 'public.initial_tray_items'::regclass AND g.id = p.id)
        AND NOT EXISTS (
            SELECT FROM public.initial_annotations a
            WHERE a.initial_tray_item_id = p.id AND (a.source IS DISTINCT FROM 'MODEL'
                OR coalesce(ingest.line_of(a.label), p.line_number) <> p.line_number OR EXISTS (
                    SELECT FROM public.initial_annotations o
                    WHERE o.image_id = a.image_id AND o.bbox = a.bbox AND o.id <> a.id)));
    ANALYZE pg_temp.stale;
    RETURN QUERY
    SELECT f.recognition_id, f.app, sum(f.referencing)::bigint
    FROM ingest.find_references(false) f
    GROUP BY f.recognition_id, f.app
    ORDER BY f.recognition_id, f.app;
    DELETE FROM raw.receipts r WHERE r.batch_id = batch;
END
$$;

CREATE OR REPLACE FUNCTION ingest.notice_other_photos(batch text) RETURNS void
LANGUAGE plpgsql
AS $$
-- Record of which photos the newest annotations are left out, since they are for another photo: in the batch that is
-- committed, or if it is reset in theirs. What was recorded of these photos before is over. The numbers of a batch whose
-- notices change are not those that were kept when it was done.
BEGIN
    IF EXISTS (SELECT FROM ingest.notices e WHERE e.code = 'annotations_other_photo' AND e.over_at IS NULL) THEN
        UPDATE ingest.notices e
        SET over_at = clock_timestamp()
        FROM pg_temp.affected t
        WHERE e.recognition_id = t.recognition_id AND e.code = 'annotations_other_photo' AND e.over_at IS NULL
            AND e.step = 'transform';
    END IF;
    WITH added AS (
        INSERT INTO ingest.notices (batch_id, recognition_id, path, code, message, step)
        SELECT CASE own.state WHEN 'done' THEN m.batch_id ELSE own.id END, t.recognition_id, m.photo_paths[at],
            'annotations_other_photo', format('the annotations of %s are left out: they are for another photo (%s x %s pixels, '
            'orientation %s, SHA-256 %s) than the one that is there now (%s x %s pixels, orientation %s, SHA-256 %s); load-qwen '
            '--force loads them',
            m.batch_id, m.widths[at], m.heights[at], coalesce(m.orientations[at], 1),
            coalesce(left(m.photo_sha256s[at], 12), 'unknown'), f.width, f.height, coalesce(f.orientation, 1),
            coalesce(left(f.sha256, 12), 'unknown')), 'transform'
        FROM pg_temp.affected t
        CROSS JOIN generate_series(1, 2) AS camera
        CROSS JOIN LATERAL (
            SELECT (a.entry).* FROM ingest.annotations_of(t.recognition_id, camera, batch) a ORDER BY a.version DESC LIMIT 1
        ) m
        CROSS JOIN LATERAL ingest.photo_of(t.batch_id, t.is_adopted, t.recognition_id, camera) f
        CROSS JOIN LATERAL array_position(m.cameras, camera::smallint) AS at
        JOIN ingest.batches own ON own.id = batch
        WHERE t.qwen_batch_ids IS NOT NULL AND m.batch_id IS DISTINCT FROM t.qwen_batch_ids[camera]
            AND EXISTS (
                SELECT FROM raw.detections d
                WHERE d.batch_id = m.batch_id AND d.recognition_id = t.recognition_id AND d.camera_number = camera)
        ORDER BY t.recognition_id, camera
        RETURNING batch_id
    )
    UPDATE ingest.batches b SET metrics = '{}' WHERE b.state = 'done' AND b.id IN (SELECT a.batch_id FROM added a);
END
$$;

CREATE OR REPLACE FUNCTION ingest.notice_menu_entries(batch text) RETURNS void
LANGUAGE plpgsql
AS $$
-- Record of which recognitions of a batch others added or changed entries that the menu has as well; these stay.
BEGIN
    IF to_regclass('pg_temp.menu_shown') IS NULL THEN
        RETURN;
    END IF;
    INSERT INTO ingest.notices (batch_id, recognition_id, path, code, message, step)
    SELECT batch, s.recognition_id, m.menu_path, 'menu_entry_kept', 'entries of the menu that others added or changed, '
        'and that stay as they are: ' || count(DISTINCT e.id), 'transform'
    FROM pg_temp.menu_shown s
    JOIN ingest.manifest m ON m.batch_id = batch AND m.recognition_id = s.recognition_id AND m.menu_path IS NOT NULL
    JOIN public.menu_items i ON i.menu_id = s.menu_id
    JOIN public.recognition_active_menu_items e
        ON e.recognition_id = s.recognition_id AND e.external_id = i.external_id
    WHERE s.has_entries AND NOT EXISTS (
        SELECT FROM public.menu_items f
        WHERE f.menu_id = s.menu_id AND f.external_id = e.external_id
            AND (f.name, f.category, f.price, f.metadata) IS NOT DISTINCT FROM (e.name, e.category, e.price, e.metadata))
    GROUP BY s.recognition_id, m.menu_path
    ORDER BY s.recognition_id;
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
SET default_statistics_target = 10
SET join_collapse_limit = 1
AS $$
-- Carry out what ingest.plan_batch() worked out.
DECLARE
    kind CONSTANT text := (SELECT b.kind FROM ingest.batches b WHERE b.id = batch);
    started timestamptz;
BEGIN
    PERFORM ingest.notice_other_photos(batch);
    RETURN QUERY SELECT p.* FROM ingest.publish_affected(kind) p;
    PERFORM ingest.notice_menu_entries(batch);
    IF kind = 'qwen' THEN
        started := clock_timestamp();
        operation := 'transform_unannotated';
        rows_written := ingest.publish_unannotated(batch);
        seconds := extract(epoch FROM clock_timestamp() - started);
        RETURN NEXT;
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION ingest.plan_reset(batch text, locks boolean) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET default_statistics_target = 10
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
        SELECT p.id AS recognition_id, former.id AS batch_id, NULL::text[] AS qwen_batch_ids, true AS existing,
            coalesce(former.adopted, false) AS is_adopted, ingest.was_adopted(p.id, batch) AS was_adopted,
            false AS keeps_receipt
        FROM ingest.manifest m
        JOIN public.recognitions p ON p.id = m.recognition_id
        LEFT JOIN LATERAL ingest.newest_version(p.id, batch) newest (id) ON true
        LEFT JOIN ingest.batches former ON former.id = newest.id
        WHERE m.batch_id = batch AND target.state = 'done' AND NOT m.rejected
            AND (target.adopted OR p.batch_id = batch) AND ingest.is_on_record(p.id);
    ELSE
        CREATE TEMP TABLE affected ON COMMIT DROP AS
        SELECT p.id AS recognition_id, shown.id AS batch_id, NULL::text[] AS qwen_batch_ids, true AS existing,
            shown.adopted AS is_adopted, ingest.was_adopted(p.id, batch) AS was_adopted, true AS keeps_receipt
        FROM ingest.manifest m
        JOIN public.recognitions p ON p.id = m.recognition_id
        CROSS JOIN LATERAL ingest.newest_version(p.id, batch) newest (id)
        JOIN ingest.batches shown ON shown.id = newest.id
        WHERE m.batch_id = batch AND target.state = 'done' AND ingest.is_on_record(p.id) AND EXISTS (
            SELECT FROM unnest(m.cameras) AS camera
            CROSS JOIN LATERAL ingest.photo_of(shown.id, shown.adopted, p.id, camera) f
            CROSS JOIN LATERAL ingest.annotations_of_photo(
                p.id, camera, f.sha256, f.width, f.height, f.orientation, '') q
            WHERE q = batch);
    END IF;
    PERFORM ingest.plan_adopted();
    PERFORM ingest.restore_adopted();
    PERFORM ingest.plan_affected(batch, locks);
    -- The entries of an adopted version go with it; those that are newer than its adoption are of others.
    IF target.adopted AND ingest.has_menu_table() THEN
        INSERT INTO pg_temp.stale
        SELECT 'public.recognition_active_menu_items'::regclass, e.id, t.recognition_id
        FROM pg_temp.affected t
        JOIN ingest.manifest m ON m.batch_id = batch AND m.recognition_id = t.recognition_id
        JOIN ingest.batch_state s ON s.batch_id = batch AND s.step = 'copy' AND s.shard = m.shard
        JOIN public.recognition_active_menu_items e ON e.recognition_id = t.recognition_id
        WHERE (e.created_at > s.started_at) IS NOT TRUE
            AND NOT EXISTS (SELECT FROM pg_temp.stale d
                WHERE d.relation = 'public.recognition_active_menu_items'::regclass AND d.id = e.id)
            AND NOT EXISTS (
                SELECT FROM public.recognitions r
                JOIN public.menu_items i ON i.menu_id = r.menu_id AND i.external_id = e.external_id
                WHERE r.id = t.recognition_id AND t.batch_id IS NOT NULL);
        ANALYZE pg_temp.stale;
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION ingest.execute_reset(batch text) RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET default_statistics_target = 10
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
    PERFORM ingest.notice_other_photos(batch);
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
