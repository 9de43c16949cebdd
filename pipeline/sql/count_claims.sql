SELECT count(*) AS claims FROM ingest.claims WHERE batch_id = :batch_id
