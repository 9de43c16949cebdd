DELETE FROM raw.recognition_files
WHERE batch_id = :batch_id AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]))
