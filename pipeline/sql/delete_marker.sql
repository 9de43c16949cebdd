DELETE FROM ingest.batch_state WHERE batch_id = :batch_id AND step = :step AND shard = :shard
