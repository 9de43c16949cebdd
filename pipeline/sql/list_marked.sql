SELECT step, shard FROM ingest.batch_state WHERE batch_id = :batch_id
