-- All batches, in the order of their keys.
SELECT id, kind, state, source, bucket, shards, created_at
FROM ingest.batches
ORDER BY (id || '/') COLLATE "C"
