INSERT INTO ingest.rejects (batch_id, recognition_id, path, code, message, step)
SELECT :batch_id, recognition_id, path, code, message, 'discover'
FROM pg_temp.found
WHERE code IS NOT NULL
ORDER BY path COLLATE "C", message COLLATE "C"
