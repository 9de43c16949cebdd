INSERT INTO ingest.batch_state (batch_id, step, shard, started_at, worker, metrics)
VALUES (:batch_id, :step, :shard, :started_at, :worker, CAST(:metrics AS jsonb))
