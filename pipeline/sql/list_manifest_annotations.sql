SELECT recognition_id, photo_paths AS paths, photo_sizes AS sizes, md5s, entry_cameras AS cameras,
    entry_positions AS positions
FROM ingest.manifest
WHERE batch_id = :batch_id AND shard = :shard
ORDER BY entry_positions[1]
