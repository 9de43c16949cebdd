SELECT recognition_id, captured_on, photo_paths, photo_sizes, object_keys, widths, heights, orientations, sha256s,
    menu_path, menu_sha256, receipt_path, receipt_sha256
FROM ingest.manifest
WHERE batch_id = :batch_id AND shard = :shard
ORDER BY recognition_id
