SELECT recognition_id, path
FROM pg_temp.candidates
WHERE recognition_id > :after
ORDER BY recognition_id
LIMIT :count
