DELETE FROM ingest.manifest WHERE batch_id = :batch_id
