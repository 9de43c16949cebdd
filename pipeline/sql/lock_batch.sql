SELECT kind, state, source, bucket, shards, created_at, clock_timestamp() AS now FROM ingest.batches WHERE id = :batch_id FOR UPDATE
