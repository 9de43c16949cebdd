UPDATE ingest.batches b
SET state = 'done', version = (SELECT coalesce(max(version), 0) + 1 FROM ingest.batches),
    finished_at = clock_timestamp(), recognitions = m.recognitions, photos = 2 * m.recognitions, bytes = m.bytes
FROM (
    SELECT count(*) AS recognitions, coalesce(sum(photo_sizes[1] + photo_sizes[2]), 0)::bigint AS bytes
    FROM ingest.manifest WHERE batch_id = :batch_id
) m
WHERE b.id = :batch_id
RETURNING b.version, b.recognitions
