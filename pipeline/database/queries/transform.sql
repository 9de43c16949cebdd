-- The commit of a batch.

-- name: delete_claims
DELETE FROM ingest.claims WHERE batch_id = :batch_id

-- name: list_rejected_keys
-- Of recognitions that were left out after their upload.
SELECT recognition_id, object_keys AS keys_of_photos
FROM ingest.manifest
WHERE batch_id = :batch_id AND rejected
ORDER BY recognition_id
LIMIT 500

-- name: has_rejected
SELECT EXISTS (SELECT FROM ingest.manifest WHERE batch_id = :batch_id AND rejected) AS there

-- name: list_sent
-- The objects of a shard, in the order of their keys, but those that a rejected recognition leaves.
SELECT m.object_keys[c] AS key, m.photo_sizes[c] AS size, m.md5s[c] AS md5
FROM ingest.manifest m
CROSS JOIN generate_series(1, 2) AS c
WHERE m.batch_id = :batch_id AND m.shard = :shard AND NOT m.rejected
ORDER BY m.recognition_id::text COLLATE "C", c

-- name: plan_batch
-- The recognitions of a batch that stay as they are: their change would delete rows that others reference, named with table
-- and number of rows; or, without a table, no batch has them on record.
CREATE TEMP TABLE left_out ON COMMIT DROP AS
SELECT p.recognition_id, CASE WHEN count(c.oid) > 0 THEN 'in_use' ELSE 'not_adopted' END AS code,
    coalesce(:in_use || string_agg(format('%s.%s (%s row%s)', n.nspname, c.relname, p.referencing, left('s', (p.referencing <> 1)::integer)),
        ', ' ORDER BY n.nspname || '.' || c.relname) FILTER (WHERE c.oid IS NOT NULL), :not_adopted) AS message
FROM ingest.plan_batch(:batch_id) p
LEFT JOIN pg_class c ON c.oid = p.app
LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
GROUP BY p.recognition_id;
SELECT count(*) AS recognitions FROM pg_temp.left_out

-- name: set_aside
-- Those of their photos and documents; what discovery passed over stays so.
DELETE FROM ingest.notices
WHERE batch_id = :batch_id AND step <> 'discover' AND recognition_id = ANY (ARRAY(SELECT recognition_id FROM pg_temp.left_out));
-- They are not taken, instead of used.
UPDATE ingest.batches b
SET files = b.files || jsonb_build_object('used', (b.files -> 'used')::bigint - m.files,
    'not_taken', (b.files -> 'not_taken')::bigint + m.files)
FROM (
    SELECT sum(cardinality(photo_paths) + num_nonnulls(menu_path, receipt_path))::bigint AS files
    FROM ingest.manifest WHERE batch_id = :batch_id AND recognition_id = ANY (ARRAY(SELECT recognition_id FROM pg_temp.left_out))
) m
WHERE b.id = :batch_id AND b.kind = 'load';
-- Leave recognitions out of a batch; their objects are removed with those of rejects. The notices are for recognitions, or
-- for photos of annotations.
WITH noticed AS (
    INSERT INTO ingest.notices (batch_id, recognition_id, path, code, message, step)
    SELECT m.batch_id, m.recognition_id,
        CASE WHEN m.cameras IS NULL THEN regexp_replace(path, '(/photos)?/[^/]*$', '', 'i') ELSE path END, l.code, l.message,
        'transform'
    FROM pg_temp.left_out l
    JOIN ingest.manifest m ON m.batch_id = :batch_id AND m.recognition_id = l.recognition_id
    CROSS JOIN LATERAL unnest(m.photo_paths) WITH ORDINALITY AS photo (path, n)
    WHERE n = 1 OR m.cameras IS NOT NULL
    ORDER BY m.recognition_id, n
), photos AS (
    DELETE FROM raw.photos WHERE batch_id = :batch_id AND recognition_id = ANY (ARRAY(SELECT recognition_id FROM pg_temp.left_out))
), receipts AS (
    DELETE FROM raw.receipts WHERE batch_id = :batch_id AND recognition_id = ANY (ARRAY(SELECT recognition_id FROM pg_temp.left_out))
), detections AS (
    DELETE FROM raw.detections WHERE batch_id = :batch_id AND recognition_id = ANY (ARRAY(SELECT recognition_id FROM pg_temp.left_out))
)
UPDATE ingest.manifest SET rejected = true
WHERE batch_id = :batch_id AND recognition_id = ANY (ARRAY(SELECT recognition_id FROM pg_temp.left_out))

-- name: transform_batch
SELECT operation, rows_written, seconds FROM ingest.transform_batch(:batch_id)

-- name: update_batch_complete
-- The state is done, or held with the reason; then readers do not see it, so that it has neither version nor end.
UPDATE ingest.batches b
SET state = :state, held_reason = coalesce(:reason, b.held_reason),
    version = CASE :state WHEN 'done' THEN (SELECT coalesce(max(version), 0) + 1 FROM ingest.batches) END,
    finished_at = CASE :state WHEN 'done' THEN clock_timestamp() END, recognitions = m.recognitions, photos = coalesce(m.photos, 0),
    bytes = coalesce(m.bytes, 0),
    detections = (SELECT count(*) FROM raw.detections q WHERE q.batch_id = :batch_id)
FROM (
    SELECT count(*) AS recognitions, sum(cardinality(photo_paths)) AS photos,
        sum((SELECT sum(size) FROM unnest(photo_sizes) AS size))::bigint AS bytes
    FROM ingest.manifest WHERE batch_id = :batch_id
) m
WHERE b.id = :batch_id
RETURNING b.version, b.recognitions

-- name: find_main_reject
-- The code that most of a batch's rejects have, and the message of one of them.
SELECT code, min(message) AS message
FROM ingest.rejects
WHERE batch_id = :batch_id
GROUP BY code
ORDER BY count(*) DESC, code
LIMIT 1

-- name: count_usable
-- How much of a batch can be used and how much is rejected, in recognitions, or in photos of annotations. A photo is
-- rejected if no box of it is left. What stays as it is could have been used; what changed or vanished during the load is
-- `transient`, and left to the next one.
WITH left_out AS (
    SELECT recognition_id FROM ingest.notices WHERE batch_id = :batch_id AND code IN ('in_use', 'not_adopted')
), rejected AS (
    SELECT every(r.code ~ '_(changed|vanished)$') AS is_transient
    FROM ingest.batches b
    JOIN ingest.rejects r ON r.batch_id = b.id
        AND NOT EXISTS (SELECT FROM left_out l WHERE l.recognition_id = r.recognition_id)
    CROSS JOIN LATERAL (SELECT regexp_replace(r.path, '.*[/\\]', '') AS name) last
    CROSS JOIN LATERAL (SELECT CASE WHEN last.name ~* 'main' THEN 1 WHEN last.name ~* 'qualifying' THEN 2
        WHEN r.path ~* 'main' THEN 1 ELSE 2 END AS camera) photo
    WHERE b.id = :batch_id AND CASE b.kind
        WHEN 'load' THEN NOT EXISTS (
            SELECT FROM ingest.manifest m
            WHERE m.batch_id = b.id AND m.recognition_id = r.recognition_id AND NOT m.rejected)
        ELSE NOT EXISTS (
            SELECT FROM raw.detections d
            WHERE d.batch_id = b.id AND d.recognition_id = r.recognition_id AND d.camera_number = photo.camera)
        END
    GROUP BY CASE b.kind WHEN 'load' THEN coalesce(r.recognition_id::text, r.path)
        ELSE coalesce(r.recognition_id || '/' || photo.camera, '#' || r.id) END
)
SELECT b.kind, b.source, b.found, b.already_loaded, b.held_elsewhere, b.held_by, b.held_reason, b.released_at,
    manifest.listed, rejected.rejected, rejected.transient,
    (SELECT count(*) FROM left_out) + CASE b.kind WHEN 'load' THEN manifest.listed ELSE (
        SELECT count(*)
        FROM (SELECT DISTINCT d.recognition_id, d.camera_number FROM raw.detections d WHERE d.batch_id = b.id) photo
    ) END AS usable
FROM ingest.batches b
CROSS JOIN (
    SELECT count(*) FILTER (WHERE NOT is_transient) AS rejected, count(*) FILTER (WHERE is_transient) AS transient FROM rejected
) rejected
CROSS JOIN LATERAL (
    SELECT count(*) AS listed FROM ingest.manifest m WHERE m.batch_id = b.id AND NOT m.rejected
) manifest
WHERE b.id = :batch_id

-- name: delete_look
DELETE FROM ingest.notices WHERE batch_id = :batch_id;
DELETE FROM ingest.looks WHERE batch_id = :batch_id

-- name: empty_look
-- The look found nothing to load after all: no file is used.
UPDATE ingest.looks l
SET batch_made = false, rejected = 0, seen = l.seen || jsonb_build_object('files', b.files)
FROM ingest.batches b
WHERE l.batch_id = :batch_id AND b.id = l.batch_id

-- name: forget_batch
-- One in which nothing can be used.
SELECT ingest.plan_reset(:batch_id, true);
SELECT ingest.execute_reset(:batch_id);
DELETE FROM ingest.manifest WHERE batch_id = :batch_id;
DELETE FROM ingest.batch_state WHERE batch_id = :batch_id;
DELETE FROM ingest.rejects WHERE batch_id = :batch_id;
DELETE FROM ingest.batches WHERE id = :batch_id

-- name: settle_rejected
UPDATE ingest.batches b SET files = ingest.files_of(b) WHERE id = :batch_id;
-- What was rejected or noticed since discovery, and the look before had, is not told again, but for notices of a forced
-- load and of what is loaded, rejects of files that have another size since, and files that changed during the load.
WITH batch AS (
    SELECT id, kind, source, force FROM ingest.batches WHERE id = :batch_id
), notices AS (
    DELETE FROM ingest.notices n
    USING batch b
    WHERE n.batch_id = b.id AND n.step <> 'discover' AND NOT b.force
        AND NOT EXISTS (SELECT FROM ingest.manifest m WHERE m.batch_id = b.id AND m.recognition_id = n.recognition_id)
        AND EXISTS (
            SELECT FROM ingest.notices e
            JOIN ingest.looks l ON l.batch_id = e.batch_id
            WHERE e.path || e.code || e.message = n.path || n.code || n.message AND e.over_at IS NULL
                AND e.recognition_id = n.recognition_id AND e.batch_id <> b.id AND l.kind = b.kind AND l.source = b.source)
), known AS (
    SELECT r.id, e.id AS earlier_id, r.identity
    FROM batch b
    JOIN ingest.rejects r ON r.batch_id = b.id AND r.step <> 'discover'
    JOIN ingest.rejects e ON e.recognition_id = r.recognition_id AND e.over_at IS NULL AND e.batch_id <> b.id
    JOIN ingest.batches k ON k.id = e.batch_id AND k.kind = b.kind
    WHERE ingest.content_of(false, e.path, e.code, e.message) = ingest.content_of(false, r.path, r.code, r.message)
        AND ingest.sizes_of(e.identity) IS NOT DISTINCT FROM ingest.sizes_of(r.identity)
        AND r.code !~ '_(vanished|changed)$'
), rejects AS (
    DELETE FROM ingest.rejects r USING known WHERE r.id = known.id RETURNING r.id
), seen AS (
    -- The next look compares the files with what they are now.
    UPDATE ingest.rejects e SET identity = known.identity FROM known WHERE e.id = known.earlier_id AND known.identity IS NOT NULL
)
UPDATE ingest.looks SET known_rejects = known_rejects + (SELECT count(*) FROM rejects) WHERE batch_id = :batch_id

-- name: mark_over_known
-- Earlier rejects and notices of what the batch loads, and rejects in whose place it has others.
WITH batch AS (
    SELECT id, kind FROM ingest.batches WHERE id = :batch_id
), notices AS (
    UPDATE ingest.notices e
    SET over_at = clock_timestamp()
    FROM batch b
    JOIN ingest.looks l ON l.kind = b.kind AND l.batch_id <> b.id
    WHERE e.batch_id = l.batch_id AND e.step = 'transform' AND e.over_at IS NULL
        AND EXISTS (SELECT FROM ingest.manifest m WHERE m.batch_id = b.id AND m.recognition_id = e.recognition_id)
)
UPDATE ingest.rejects e
SET over_at = clock_timestamp()
FROM batch b
JOIN ingest.batches k ON k.kind = b.kind AND k.id <> b.id
WHERE e.batch_id = k.id AND k.kind = 'load' AND e.over_at IS NULL
    AND (EXISTS (SELECT FROM ingest.manifest m WHERE m.batch_id = b.id AND m.recognition_id = e.recognition_id)
        OR EXISTS (
            SELECT FROM ingest.rejects r
            WHERE r.batch_id = b.id AND r.step <> 'discover' AND r.recognition_id = e.recognition_id))

-- name: withdraw_shard
-- Forget the upload and the copy of a shard, so that both are done anew.
WITH photos AS (
    DELETE FROM raw.photos p USING ingest.manifest m
    WHERE m.batch_id = :batch_id AND m.shard = :shard
        AND p.batch_id = m.batch_id AND p.recognition_id = m.recognition_id
), receipts AS (
    DELETE FROM raw.receipts r USING ingest.manifest m
    WHERE m.batch_id = :batch_id AND m.shard = :shard
        AND r.batch_id = m.batch_id AND r.recognition_id = m.recognition_id
), menus AS (
    DELETE FROM raw.menus WHERE batch_id = :batch_id AND shard = :shard
), notices AS (
    DELETE FROM ingest.notices WHERE batch_id = :batch_id AND shard = :shard AND step IN ('upload', 'copy')
)
DELETE FROM ingest.batch_state WHERE batch_id = :batch_id AND shard = :shard AND step IN ('upload', 'copy')
