SELECT recognition_id, path, code, message
FROM pg_temp.found
WHERE code IS NOT NULL
ORDER BY path COLLATE "C"
LIMIT :count
