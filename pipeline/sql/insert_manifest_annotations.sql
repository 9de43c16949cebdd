-- Shards are cut along the file, so that each reads one stretch of it.
INSERT INTO ingest.manifest (batch_id, recognition_id, shard, photo_paths, photo_sizes, photo_mtimes, object_keys, md5s,
    entry_cameras, entry_positions)
SELECT :batch_id, s.recognition_id,
    ((row_number() OVER (ORDER BY s.positions[1], s.recognition_id) - 1) / :shard_size + 1)::integer,
    s.paths, s.sizes, '{}', '{}', s.md5s, s.cameras, s.positions
FROM pg_temp.staged s
JOIN ingest.claims c ON c.kind = 'qwen' AND c.recognition_id = s.recognition_id AND c.batch_id = :batch_id
