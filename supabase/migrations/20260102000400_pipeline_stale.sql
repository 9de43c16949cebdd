-- What the domain has of the recognitions in pg_temp.affected and is wanted no more, and the plan as a whole.

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
    WHERE t.existing AND r.receipt IS NULL AND NOT t.keeps_receipt
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
    IF NOT EXISTS (SELECT FROM pg_temp.wanted_detections) THEN
        RETURN;
    END IF;
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
    WHERE t.existing AND (t.batch_id IS NULL
        OR (t.is_adopted AND NOT ingest.is_adopted_row('public.recognitions', t.recognition_id)));

    -- Entries of the former menu that the new one has not, in a table of the app; those that others added stay.
    IF ingest.has_menu_table() THEN
        INSERT INTO pg_temp.stale
        SELECT 'public.recognition_active_menu_items'::regclass, e.id, t.recognition_id
        -- First those whose menu is another one: OFFSET 0 keeps the planner from looking at all entries of the others.
        FROM (
            SELECT t.recognition_id, t.was_adopted, p.menu_id, coalesce(o.external_ids, '{}') AS external_ids
            FROM pg_temp.affected t
            JOIN public.recognitions p ON p.id = t.recognition_id
            LEFT JOIN raw.receipts r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
            LEFT JOIN pg_temp.menu_of o ON o.batch_id = r.batch_id AND o.sha256 = r.menu_sha256
            LEFT JOIN public.menus m ON m.id = p.menu_id
            WHERE t.existing AND m.content_sha256 IS DISTINCT FROM o.content_sha256
            OFFSET 0
        ) t
        JOIN public.menu_items f ON f.menu_id = t.menu_id AND f.external_id <> ALL (t.external_ids)
        JOIN public.recognition_active_menu_items e
            ON e.recognition_id = t.recognition_id AND e.external_id = f.external_id
        -- What others added or changed stays, and an adopted recognition keeps the entries that it had.
        WHERE (f.name, f.category, f.price, f.metadata) IS NOT DISTINCT FROM (e.name, e.category, e.price, e.metadata)
            AND (NOT t.was_adopted OR EXISTS (
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

CREATE OR REPLACE FUNCTION ingest.plan_affected(batch text, locks boolean) RETURNS void
LANGUAGE plpgsql
AS $$
-- Plan what readers see of pg_temp.affected once `batch` is committed or reset; with `locks` for a plan that is carried out.
BEGIN
    IF EXISTS (SELECT FROM ingest.batches b WHERE b.kind = 'qwen' AND (b.state = 'done') <> (b.id = batch)) THEN
        UPDATE pg_temp.affected t
        SET qwen_batch_ids = ARRAY[
            (SELECT q FROM ingest.photo_of(t.batch_id, t.is_adopted, t.recognition_id, 1) f
             CROSS JOIN LATERAL ingest.annotations_of_photo(
                 t.recognition_id, 1, f.sha256, f.width, f.height, f.orientation, batch) q),
            (SELECT q FROM ingest.photo_of(t.batch_id, t.is_adopted, t.recognition_id, 2) f
             CROSS JOIN LATERAL ingest.annotations_of_photo(
                 t.recognition_id, 2, f.sha256, f.width, f.height, f.orientation, batch) q)]
        WHERE t.batch_id IS NOT NULL;
    END IF;
    CREATE UNIQUE INDEX ON pg_temp.affected (recognition_id);
    ANALYZE pg_temp.affected;
    -- Work on a recognition that begins now waits for the commit, and then finds its new rows; so does a choice.
    PERFORM FROM public.recognitions r
    WHERE locks AND r.id IN (SELECT t.recognition_id FROM pg_temp.affected t WHERE t.existing)
    ORDER BY r.id FOR UPDATE;
    PERFORM FROM public.initial_tray_items i
    WHERE locks AND i.recognition_id IN (SELECT t.recognition_id FROM pg_temp.affected t WHERE t.existing)
    ORDER BY i.id FOR UPDATE;
    PERFORM ingest.plan_lines();
    PERFORM ingest.plan_items();
    PERFORM ingest.plan_detections();
    PERFORM ingest.plan_equal_boxes();
    PERFORM ingest.plan_stale();
END
$$;
