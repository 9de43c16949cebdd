SELECT state, source, bucket, shards, clock_timestamp() AS now FROM ingest.batches WHERE id = :batch_id FOR UPDATE
