-- Keep a reset, or the commit, from passing while a shard's transaction is open.
SELECT state, source, bucket, shards, clock_timestamp() AS now FROM ingest.batches WHERE id = :batch_id FOR SHARE
