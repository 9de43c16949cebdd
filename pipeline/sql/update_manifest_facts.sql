UPDATE ingest.manifest m
SET widths = f.widths, heights = f.heights, orientations = f.orientations, sha256s = f.sha256s, md5s = f.md5s,
    menu_sha256 = f.menu_sha256, receipt_sha256 = f.receipt_sha256
FROM pg_temp.facts f
WHERE m.batch_id = :batch_id AND m.shard = :shard AND m.recognition_id = f.recognition_id
