-- The commit of a batch.

-- name: delete_claims
DELETE FROM ingest.claims WHERE batch_id = :batch_id

-- name: delete_rejected
DELETE FROM ingest.manifest WHERE batch_id = :batch_id AND rejected

-- name: list_rejected_keys
SELECT recognition_id, object_keys AS keys_of_photos
FROM ingest.manifest
WHERE batch_id = :batch_id AND rejected AND recognition_id > :after
ORDER BY recognition_id
LIMIT 500

-- name: transform_batch
SELECT operation, rows_written, seconds FROM ingest.transform_batch(:batch_id)

-- name: update_batch_finished
UPDATE ingest.batches b
SET state = 'done', version = (SELECT coalesce(max(version), 0) + 1 FROM ingest.batches),
    finished_at = clock_timestamp(), recognitions = m.recognitions, photos = coalesce(m.photos, 0),
    bytes = coalesce(m.bytes, 0),
    detections = (SELECT count(*) FROM raw.detections q WHERE q.batch_id = :batch_id)
FROM (
    SELECT count(*) AS recognitions, sum(cardinality(photo_paths)) AS photos,
        sum((SELECT sum(size) FROM unnest(photo_sizes) AS size))::bigint AS bytes
    FROM ingest.manifest WHERE batch_id = :batch_id
) m
WHERE b.id = :batch_id
RETURNING b.version, b.recognitions
