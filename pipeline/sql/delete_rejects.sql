DELETE FROM ingest.rejects WHERE batch_id = :batch_id
