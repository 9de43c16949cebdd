SELECT count(*) AS recognitions FROM ingest.manifest WHERE batch_id = :batch_id AND shard = :shard
