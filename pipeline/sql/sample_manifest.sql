-- Some photos of a shard as discovery saw them.
SELECT photo_paths, photo_sizes, photo_mtimes
FROM ingest.manifest
WHERE batch_id = :batch_id AND shard = :shard
LIMIT :count
