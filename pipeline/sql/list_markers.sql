SELECT step, shard, started_at, finished_at, worker, metrics
FROM ingest.batch_state
WHERE batch_id = :batch_id
ORDER BY started_at, step, shard
