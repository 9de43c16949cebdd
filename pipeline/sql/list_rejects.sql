SELECT recognition_id, path, code, message, step
FROM ingest.rejects
WHERE batch_id = :batch_id
ORDER BY id
LIMIT :count
