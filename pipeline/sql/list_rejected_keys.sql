SELECT unnest(object_keys) AS key FROM ingest.manifest WHERE batch_id = :batch_id AND rejected
