-- Batches with objects in a bucket, in the order of their keys.
SELECT id, state, source, shards, created_at
FROM ingest.batches
WHERE kind = 'load' AND bucket = :bucket
ORDER BY (id || '/') COLLATE "C"
