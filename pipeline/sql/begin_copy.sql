-- Hold the batch and its COPY of a shard. Each statement sees what was committed before it began, so that the last
-- one sees what the others waited for. It takes over what the database has already: what is known of the photos, and
-- the menus that another shard of the batch has, as most have that of the same day. It returns the documents. Right
-- after a bulk load there are no statistics of the batch, and a scan of all batches looks cheap.
SELECT set_config('enable_seqscan', 'off', true);
SELECT FROM ingest.batches WHERE id = :batch_id FOR SHARE;
SELECT pg_advisory_xact_lock(hashtextextended('pipeline.step:' || :batch_id || '/copy/' || :shard, 0));
WITH markers AS (
    SELECT coalesce(bool_or(step = 'upload'), false) AS uploaded, coalesce(bool_or(step = 'copy'), false) AS copied
    FROM ingest.batch_state
    WHERE batch_id = :batch_id AND step IN ('upload', 'copy') AND shard = :shard
), batch AS (
    SELECT kind, state, source, clock_timestamp() AS now, uploaded, copied
    FROM ingest.batches
    CROSS JOIN markers
    WHERE id = :batch_id
), documented AS (
    SELECT manifest.*
    FROM batch
    JOIN ingest.manifest ON batch_id = :batch_id AND shard = :shard
    WHERE kind = 'load' AND state = 'loading' AND uploaded AND NOT copied
), files AS (
    INSERT INTO raw.recognition_files (batch_id, recognition_id, camera_number, captured_on, source_path, object_key,
        width, height, orientation, byte_size, sha256)
    SELECT batch_id, recognition_id, camera, captured_on, photo_paths[camera], object_keys[camera],
        widths[camera], heights[camera], orientations[camera], photo_sizes[camera], sha256s[camera]
    FROM documented
    CROSS JOIN (VALUES (1), (2)) AS cameras (camera)
    ORDER BY recognition_id, camera
), menus AS (
    INSERT INTO raw.menus (batch_id, shard, sha256, content)
    SELECT :batch_id, :shard, wanted.sha256, known.content
    FROM (SELECT DISTINCT menu_sha256 AS sha256 FROM documented) AS wanted
    CROSS JOIN LATERAL (
        SELECT content FROM raw.menus WHERE batch_id = :batch_id AND sha256 = wanted.sha256 LIMIT 1
    ) AS known
    RETURNING sha256
)
SELECT batch.*, recognition_id, menu_path, menu_size, menu_sha256, receipt_path, receipt_size, receipt_sha256,
    menu_sha256 IN (SELECT sha256 FROM menus) AS menu_known
FROM batch
LEFT JOIN documented ON true
ORDER BY recognition_id
