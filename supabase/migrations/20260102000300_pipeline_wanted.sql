-- What the domain has of the recognitions in pg_temp.affected, and what is wanted: lines, items and annotations, each
-- with the id of the row that means the same.

CREATE OR REPLACE FUNCTION ingest.plan_lines() RETURNS void
LANGUAGE plpgsql
AS $$
-- Work out menu_of and wanted_lines; line_id is that of the line that is there already and means the same. What an
-- adopted batch holds has no raw rows: it stays as it is, and so does every line that keeps_receipt. Of these,
-- plan_items() counts the items; until then their quantity is a usual one, for the statistics.
BEGIN
    CREATE TEMP TABLE menu_of ON COMMIT DROP AS
    SELECT DISTINCT ON (m.batch_id, m.sha256)
        m.batch_id, m.sha256, encode(sha256(convert_to(m.content::text, 'UTF8')), 'hex') AS content_sha256,
        ingest.array_of(m.content) AS content,
        ARRAY(SELECT entry ->> 'ExternalId' FROM jsonb_array_elements(ingest.array_of(m.content)) AS entry) AS external_ids
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
        false AS stays
    FROM pg_temp.affected t
    JOIN raw.receipts r ON r.batch_id = t.batch_id AND r.recognition_id = t.recognition_id
    CROSS JOIN LATERAL jsonb_array_elements(ingest.array_of(r.receipt)) WITH ORDINALITY AS l (line, line_number)
    WHERE NOT t.keeps_receipt;
    CREATE UNIQUE INDEX ON pg_temp.wanted_lines (recognition_id, line_number);
    CREATE INDEX ON pg_temp.wanted_lines (line_id); -- before the update below, or the transaction could not use it
    ANALYZE pg_temp.wanted_lines;

    CREATE TEMP TABLE present_lines ON COMMIT DROP AS
    SELECT t.recognition_id, l.id, l.line_number, m.meaning, jsonb_array_length(o.options) AS options,
        row_number() OVER (PARTITION BY t.recognition_id, m.meaning ORDER BY l.line_number) AS nth,
        t.keeps_receipt OR (t.is_adopted AND ingest.is_adopted_row('public.recipe_lines', l.id)) AS stays
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
    INSERT INTO pg_temp.wanted_lines (recognition_id, existing, line_number, quantity, line_id, former_number, stays)
    SELECT p.recognition_id, true, p.line_number, 1, p.id, p.line_number, true
    FROM pg_temp.present_lines p
    WHERE p.stays;
    ANALYZE pg_temp.wanted_lines;
END
$$;

CREATE OR REPLACE FUNCTION ingest.plan_items() RETURNS void
LANGUAGE plpgsql
AS $$
-- Work out present_items and wanted_items; item_id is that of the item that is there already. `is_decided` says that a
-- person has chosen what the receipt leaves open, an entry that the menu of the shown version lacks, or another type or
-- line; by its place, an item is FOOD or PLATE.
BEGIN
    CREATE TEMP TABLE present_items ON COMMIT DROP AS
    SELECT i.recognition_id, i.id, kind.item_type, i.source::text AS source, place.line_id, place.line_number,
        coalesce(i.ordinal, row_number() OVER (
            PARTITION BY i.recognition_id, kind.item_type, i.source, place.line_id, place.line_number
            ORDER BY i.ordinal NULLS FIRST, i.id))::integer AS nth,
        i.line_number AS stored_number, i.ordinal AS stored_ordinal,
        (t.keeps_receipt AND i.source = 'RECIPE_LINE_OPTION')
            OR (t.is_adopted AND ingest.is_adopted_row('public.initial_tray_items', i.id)) AS stays,
        i.metadata ->> 'qwen_label' AS label,
        coalesce(i.item_type::text <> kind.item_type OR CASE WHEN i.source = 'RECIPE_LINE_OPTION' THEN
            (i.recipe_line_option_id IS NOT NULL AND line.options > 1) OR o.recipe_line_id <> place.line_id
            OR (i.line_number IS NOT NULL AND i.line_number IS DISTINCT FROM line.line_number)
            OR (i.menu_item_external_id IS NOT NULL AND (i.menu_item_external_id IS DISTINCT FROM o.external_id
                OR (i.ordinal IS NOT NULL AND NOT EXISTS (SELECT FROM public.recognitions r JOIN public.menu_items m
                    ON m.menu_id = r.menu_id AND m.external_id = o.external_id WHERE r.id = i.recognition_id OFFSET 0))))
            ELSE num_nonnulls(i.menu_item_external_id, i.recipe_line_option_id, i.recipe_line_id) > 0 END, false) AS is_decided
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
    CROSS JOIN LATERAL (
        SELECT CASE WHEN CASE WHEN i.source = 'MODEL' AND num_nulls(i.ordinal, place.line_number) > 0
            THEN i.item_type = 'PLATE' ELSE place.line_number = 0 END THEN 'PLATE' ELSE 'FOOD' END AS item_type
    ) kind
    LEFT JOIN pg_temp.present_lines line ON line.id = place.line_id
    WHERE t.existing AND i.source IN ('RECIPE_LINE_OPTION', 'MODEL')
        AND (i.ordinal IS NOT NULL OR i.item_type IN ('FOOD', 'PLATE') OR (t.was_adopted
            AND i.source = 'RECIPE_LINE_OPTION' AND ingest.is_adopted_row('public.initial_tray_items', i.id)));
    CREATE UNIQUE INDEX ON pg_temp.present_items (id);
    CREATE INDEX ON pg_temp.present_items (line_id, nth);
    CREATE INDEX ON pg_temp.present_items (recognition_id, item_type, line_number, nth);
    ANALYZE pg_temp.present_items;
    -- An item without ordinal in a place that one of ours has is of others, and one of another line was moved there by a
    -- person: it has no place, and is not deleted.
    UPDATE pg_temp.present_items p SET nth = p.nth + 1000000, is_decided = true
    WHERE (p.stored_ordinal IS NULL OR p.is_decided) AND NOT p.stays AND EXISTS (
        SELECT FROM pg_temp.present_items o
        WHERE (o.recognition_id, o.item_type, o.source) = (p.recognition_id, p.item_type, p.source)
            AND (o.line_id, o.line_number) IS NOT DISTINCT FROM (p.line_id, p.line_number)
        HAVING count(DISTINCT o.nth) < count(*));

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
    WHERE NOT w.stays;
    INSERT INTO pg_temp.wanted_items (recognition_id, item_type, source, line_number, ordinal, item_id, stays)
    SELECT p.recognition_id, p.item_type, p.source, p.stored_number, CASE p.source WHEN 'MODEL' THEN p.stored_ordinal END,
        p.id, true
    FROM pg_temp.present_items p
    WHERE p.stays;
    UPDATE pg_temp.wanted_lines w
    SET quantity = (
        SELECT coalesce(nullif(count(p.stored_ordinal), 0), count(*)) FROM pg_temp.present_items p
        WHERE p.line_id = w.line_id AND p.stays)
    WHERE w.stays;
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
    CREATE TEMP TABLE wanted_detections (
        recognition_id bigint, camera_number smallint, detection integer, label text, bbox jsonb, adopted_id bigint,
        annotation_id bigint, item_id bigint, item_type text, source text, line_number integer, nth integer, ordinal integer
    ) ON COMMIT DROP;
    IF NOT EXISTS (SELECT FROM pg_temp.affected t WHERE t.qwen_batch_ids IS NOT NULL OR t.was_adopted)
        AND NOT EXISTS (SELECT FROM pg_temp.present_items p WHERE p.source = 'MODEL') THEN
        RETURN;
    END IF;
    CREATE TEMP TABLE present_annotations ON COMMIT DROP AS
    SELECT i.recognition_id, i.camera_number, label.label, a.bbox, a.id, a.initial_tray_item_id AS item_id,
        row_number() OVER (PARTITION BY i.recognition_id, i.camera_number, label.label, a.bbox ORDER BY a.id) AS nth
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
    CROSS JOIN LATERAL (SELECT coalesce(a.label, kept.label, item.metadata ->> 'qwen_label', '') AS label) label
    WHERE t.existing AND a.source = 'MODEL';
    CREATE INDEX ON pg_temp.present_annotations (recognition_id, camera_number, label, bbox);
    CREATE UNIQUE INDEX ON pg_temp.present_annotations (id);
    ANALYZE pg_temp.present_annotations;

    INSERT INTO pg_temp.wanted_detections
    SELECT d.recognition_id, d.camera_number, d.detection, d.label, coalesce(own.bbox, d.bbox) AS bbox, d.adopted_id,
        coalesce(own.id, a.id) AS annotation_id,
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
        -- OFFSET 0 keeps the planner from reading all detections of a batch at once for a camera.
        CROSS JOIN LATERAL (
            SELECT one.* FROM raw.detections one
            WHERE one.batch_id = newest.batch_id AND one.recognition_id = t.recognition_id
                AND one.camera_number = newest.camera_number
            OFFSET 0
        ) q
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
            AND coalesce(f.sha256 = i.sha256,
                (f.width, f.height, f.orientation) = (i.width, i.height, coalesce(i.orientation, 1)))
            -- One that others deleted does not come back.
            AND (k.deleted OR EXISTS (SELECT FROM pg_temp.present_annotations p WHERE p.id = k.id))
    ) d
    LEFT JOIN pg_temp.wanted_lines w ON w.recognition_id = d.recognition_id AND w.line_number = d.line_number
        AND w.quantity > 0
    LEFT JOIN pg_temp.present_annotations a ON a.recognition_id = d.recognition_id
        AND a.camera_number = d.camera_number AND a.label = d.label AND a.bbox = d.bbox AND a.nth = 1
        AND d.adopted_id IS NULL
    LEFT JOIN pg_temp.present_annotations own ON own.id = d.adopted_id
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
    CROSS JOIN LATERAL (
        SELECT one.id, row_number() OVER (ORDER BY one.stored_ordinal, one.nth, one.id) AS nth
        FROM pg_temp.present_items one WHERE one.line_id = w.line_id AND one.stays
    ) p
    WHERE w.stays AND w.recognition_id = d.recognition_id AND w.line_number = d.line_number
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
    -- Where no item is there already, the ordinal is that of the detection.
    UPDATE pg_temp.wanted_detections d
    SET ordinal = w.ordinal
    FROM (
        SELECT recognition_id, item_type, line_number, nth, min(ordinal) AS ordinal
        FROM pg_temp.wanted_items
        WHERE source = 'MODEL'
        GROUP BY recognition_id, item_type, line_number, nth
        HAVING min(ordinal) <> nth
    ) w
    WHERE d.source = 'MODEL' AND d.item_id IS NULL AND d.recognition_id = w.recognition_id
        AND d.item_type = w.item_type AND d.line_number = w.line_number AND d.nth = w.nth;
END
$$;

CREATE OR REPLACE FUNCTION ingest.plan_unannotated(batch text) RETURNS void
LANGUAGE plpgsql
AS $$
-- Work out unannotated: recognitions of a batch of kind 'qwen' that get their first annotations. None of their rows changes,
-- so the batch needs no comparison with them: a batch of ours shows them, with the photos that it is for, without any
-- annotation or item of the model, and with one item for each place of their receipt lines. OFFSET 0: each photo is a look-up
-- in an index.
BEGIN
    PERFORM FROM public.recognitions r
    WHERE r.id IN (SELECT m.recognition_id FROM ingest.manifest m WHERE m.batch_id = batch AND NOT m.rejected)
    ORDER BY r.id FOR UPDATE;
    CREATE TEMP TABLE unannotated ON COMMIT DROP AS
    SELECT r.id AS recognition_id
    FROM ingest.manifest m
    JOIN public.recognitions r ON r.id = m.recognition_id
    JOIN ingest.batches shown ON shown.id = r.batch_id
    JOIN ingest.manifest own ON own.batch_id = r.batch_id AND own.recognition_id = r.id
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE
                ingest.is_same_photo(m, i.camera_number, i.sha256, i.width, i.height, i.orientation)) AS same,
            count(*) FILTER (WHERE EXISTS (
                SELECT FROM public.initial_annotations a WHERE a.image_id = i.id OFFSET 0)) AS annotated
        FROM public.images i
        WHERE i.recognition_id = r.id
    ) photo
    CROSS JOIN LATERAL (
        SELECT count(*) AS found, count(line.id) AS placed
        FROM public.initial_tray_items i
        LEFT JOIN public.recipe_lines line ON line.id = i.recipe_line_id AND line.line_number = i.line_number
            AND i.ordinal BETWEEN 1 AND line.quantity AND i.source = 'RECIPE_LINE_OPTION' AND i.item_type = 'FOOD'
        WHERE i.recognition_id = r.id AND i.source IN ('RECIPE_LINE_OPTION', 'MODEL') AND i.item_type IN ('FOOD', 'PLATE')
    ) item
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(line.quantity), 0) AS places
        FROM public.recipes p
        JOIN public.recipe_lines line ON line.recipe_id = p.id
        WHERE p.recognition_id = r.id
    ) receipt
    WHERE m.batch_id = batch AND NOT m.rejected AND shown.kind = 'load' AND shown.state = 'done' AND NOT shown.adopted
        AND photo.same = cardinality(m.cameras) AND photo.annotated = 0
        AND item.placed = item.found AND item.placed = receipt.places
        AND NOT EXISTS (
            SELECT FROM ingest.manifest o JOIN ingest.batches b ON b.id = o.batch_id
            WHERE o.recognition_id = r.id AND o.batch_id <> batch AND b.state = 'done'
                AND (b.kind = 'qwen' OR b.adopted OR b.version > shown.version));
    CREATE UNIQUE INDEX ON pg_temp.unannotated (recognition_id);
    ANALYZE pg_temp.unannotated;
    CREATE TEMP TABLE unannotated_photos ON COMMIT DROP AS
    SELECT i.id, i.recognition_id, i.camera_number
    FROM pg_temp.unannotated u
    JOIN public.images i ON i.recognition_id = u.recognition_id;
    CREATE TEMP TABLE unannotated_lines ON COMMIT DROP AS
    SELECT i.recognition_id, i.line_number, array_agg(i.id ORDER BY i.ordinal) AS item_ids
    FROM pg_temp.unannotated u
    JOIN public.initial_tray_items i ON i.recognition_id = u.recognition_id
    WHERE i.source = 'RECIPE_LINE_OPTION' AND i.item_type = 'FOOD'
    GROUP BY i.recognition_id, i.line_number;
    -- None of them goes before its annotations are there.
    PERFORM FROM public.initial_tray_items i
    WHERE i.recognition_id IN (SELECT u.recognition_id FROM pg_temp.unannotated u)
    ORDER BY i.id FOR KEY SHARE;
END
$$;
