-- Shards are cut along the text order of the numbers, so that the keys of a shard are neighbours in the bucket.
INSERT INTO ingest.manifest (batch_id, recognition_id, shard, captured_on, photo_paths, photo_sizes, photo_mtimes,
    object_keys, menu_path, menu_size, menu_mtime, receipt_path, receipt_size, receipt_mtime)
SELECT :batch_id, s.recognition_id,
    ((row_number() OVER (ORDER BY s.recognition_id::text COLLATE "C") - 1) / :shard_size + 1)::integer,
    s.captured_on, s.photo_paths, s.photo_sizes, s.photo_mtimes,
    ARRAY[:batch_id || '/recognitions/' || s.recognition_id || '/camera1.jpg',
          :batch_id || '/recognitions/' || s.recognition_id || '/camera2.jpg'],
    s.menu_path, s.menu_size, s.menu_mtime, s.receipt_path, s.receipt_size, s.receipt_mtime
FROM pg_temp.staged s
JOIN ingest.claims c ON c.kind = 'load' AND c.recognition_id = s.recognition_id AND c.batch_id = :batch_id
