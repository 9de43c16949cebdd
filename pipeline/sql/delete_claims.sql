DELETE FROM ingest.claims WHERE batch_id = :batch_id
