-- The objects that a shard of a finished batch has, in the order of their keys; named says that readers see them.
SELECT m.object_keys[c] AS key, m.photo_paths[c] AS path, m.photo_sizes[c] AS size, m.sha256s[c] AS sha256,
    m.md5s[c] AS md5, coalesce(i.storage_path = m.object_keys[c], false) AS named
FROM ingest.manifest m
CROSS JOIN generate_series(1, 2) AS c
LEFT JOIN public.images i ON i.recognition_id = m.recognition_id AND i.camera_number = c
WHERE m.batch_id = :batch_id AND m.shard = :shard
ORDER BY m.recognition_id::text COLLATE "C", c
