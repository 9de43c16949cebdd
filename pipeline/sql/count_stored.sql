-- Photos that finished batches have in a bucket.
SELECT coalesce(sum(photos), 0)::bigint AS photos
FROM ingest.batches
WHERE state = 'done' AND kind = 'load' AND bucket = :bucket
