SELECT recognition_id, photo_paths, photo_sizes, photo_mtimes, object_keys,
    menu_path, menu_size, menu_mtime, receipt_path, receipt_size, receipt_mtime
FROM ingest.manifest
WHERE batch_id = :batch_id AND shard = :shard
ORDER BY recognition_id::text COLLATE "C"
