SELECT recognition_id, object_keys AS keys_of_photos
FROM ingest.manifest
WHERE batch_id = :batch_id AND rejected AND recognition_id > :after
ORDER BY recognition_id
LIMIT 500
