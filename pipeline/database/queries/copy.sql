-- COPY of a shard: documents and receipts.

-- name: copy_known
-- Copy what the database has already: what is known of the photos of a shard, and the menus that another shard of the
-- batch has, as most have that of the same day. It returns which menus those are.
WITH shard AS (
    SELECT * FROM ingest.manifest WHERE batch_id = :batch_id AND shard = :shard
), files AS (
    INSERT INTO raw.photos (batch_id, recognition_id, camera_number, captured_on, source_path, object_key,
        width, height, orientation, byte_size, sha256)
    SELECT batch_id, recognition_id, camera, captured_on, photo_paths[camera], object_keys[camera],
        widths[camera], heights[camera], orientations[camera], photo_sizes[camera], sha256s[camera]
    FROM shard
    CROSS JOIN (VALUES (1), (2)) AS cameras (camera)
    ORDER BY recognition_id, camera
)
INSERT INTO raw.menus (batch_id, shard, sha256, content)
SELECT :batch_id, :shard, wanted.sha256, known.content
FROM (SELECT DISTINCT menu_sha256 AS sha256 FROM shard) AS wanted
CROSS JOIN LATERAL (
    SELECT content FROM raw.menus WHERE batch_id = :batch_id AND sha256 = wanted.sha256 LIMIT 1
) AS known
RETURNING sha256

-- name: leave_out_copy
-- The photos are in the bucket already: the commit removes them. What discovery passed over stays so.
DELETE FROM raw.photos
WHERE batch_id = :batch_id AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]));
DELETE FROM ingest.notices
WHERE batch_id = :batch_id AND step <> 'discover' AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]));
UPDATE ingest.manifest SET rejected = true
WHERE batch_id = :batch_id AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]));
DELETE FROM ingest.claims
WHERE kind = 'load' AND batch_id = :batch_id AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]))

-- name: list_documents
-- The batch in a row, then the documents of a shard, each in a row with nothing of the batch in it.
SELECT kind, state, source, clock_timestamp() AS now,
    EXISTS (SELECT FROM ingest.batch_state WHERE batch_id = :batch_id AND step = 'upload' AND shard = :shard) AS uploaded,
    EXISTS (SELECT FROM ingest.batch_state WHERE batch_id = :batch_id AND step = 'copy' AND shard = :shard) AS copied,
    NULL::bigint AS recognition_id, NULL AS menu_path, NULL::bigint AS menu_size, NULL AS menu_sha256,
    NULL AS receipt_path, NULL::bigint AS receipt_size, NULL AS receipt_sha256
FROM ingest.batches
WHERE id = :batch_id
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, recognition_id, menu_path, menu_size, menu_sha256, receipt_path,
    receipt_size, receipt_sha256
FROM ingest.manifest
WHERE batch_id = :batch_id AND shard = :shard
ORDER BY recognition_id NULLS FIRST
