SELECT count(*) AS done FROM ingest.batch_state WHERE batch_id = :batch_id AND step = :step
