-- Copy what the database has already: what is known of the photos of a shard, and the menus that another shard of the
-- batch has, as most have that of the same day. It returns which menus those are.
WITH shard AS (
    SELECT * FROM ingest.manifest WHERE batch_id = :batch_id AND shard = :shard
), files AS (
    INSERT INTO raw.recognition_files (batch_id, recognition_id, camera_number, captured_on, source_path, object_key,
        width, height, orientation, byte_size, sha256)
    SELECT batch_id, recognition_id, camera, captured_on, photo_paths[camera], object_keys[camera],
        widths[camera], heights[camera], orientations[camera], photo_sizes[camera], sha256s[camera]
    FROM shard
    CROSS JOIN (VALUES (1), (2)) AS cameras (camera)
    ORDER BY recognition_id, camera
)
INSERT INTO raw.menus (batch_id, shard, sha256, content)
SELECT :batch_id, :shard, wanted.sha256, known.content
FROM (SELECT DISTINCT menu_sha256 AS sha256 FROM shard) AS wanted
CROSS JOIN LATERAL (
    SELECT content FROM raw.menus WHERE batch_id = :batch_id AND sha256 = wanted.sha256 LIMIT 1
) AS known
RETURNING sha256
