-- Where discovery saw the annotations of some photos of a shard, and what they were.
SELECT photo_sizes AS sizes, md5s, entry_positions AS positions
FROM ingest.manifest
WHERE batch_id = :batch_id AND shard = :shard
LIMIT :count
