DELETE FROM ingest.manifest WHERE batch_id = :batch_id AND rejected
