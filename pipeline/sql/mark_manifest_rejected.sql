UPDATE ingest.manifest SET rejected = true
WHERE batch_id = :batch_id AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]))
