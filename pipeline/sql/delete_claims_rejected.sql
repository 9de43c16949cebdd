DELETE FROM ingest.claims
WHERE kind = :kind AND batch_id = :batch_id AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]))
