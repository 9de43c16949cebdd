SELECT shard, count(*) AS recognitions FROM ingest.manifest WHERE batch_id = :batch_id GROUP BY shard
