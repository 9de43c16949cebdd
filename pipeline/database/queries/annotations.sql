-- Discovery of an annotations file, and its shards.

-- name: add_unknown
-- A photo of a recognition that is not loaded is a reject of its own.
INSERT INTO pg_temp.found (recognition_id, path, code, message)
SELECT e.recognition_id, e.path, 'recognition_unknown', 'the recognition ' || e.recognition_id || ' is not loaded'
FROM pg_temp.entries e
JOIN pg_temp.annotated a USING (recognition_id)
WHERE NOT a.known

-- name: analyze_annotated
ANALYZE pg_temp.annotated

-- name: analyze_entries
ANALYZE pg_temp.entries

-- name: count_annotated
SELECT count(*) FILTER (WHERE known) AS found,
    count(*) FILTER (WHERE known AND loaded) AS already_loaded,
    count(*) FILTER (WHERE known AND NOT loaded AND holder IS NOT NULL) AS held_elsewhere,
    coalesce(array_agg(DISTINCT holder) FILTER (WHERE known AND NOT loaded AND holder IS NOT NULL), '{}') AS held_by,
    (SELECT count(*) FROM pg_temp.entries)::bigint - coalesce(sum(photos), 0)::bigint AS superseded_copies
FROM pg_temp.annotated

-- name: count_shard
SELECT count(*) AS recognitions FROM ingest.manifest WHERE batch_id = :batch_id AND shard = :shard

-- name: create_annotated
-- What the annotations file has of each recognition, and what stands in the way of loading it. Of a photo that is in
-- the file several times, the key that sorts last counts, and of equal keys the last.
CREATE TEMP TABLE annotated ON COMMIT DROP AS
SELECT e.*, known.there AS known, loaded.there AS loaded, c.batch_id AS holder
FROM (
    SELECT recognition_id, count(*) AS photos, sum(detections) AS detections,
        array_agg(camera_number ORDER BY camera_number) FILTER (WHERE detections IS NOT NULL) AS cameras,
        array_agg(path ORDER BY camera_number) FILTER (WHERE detections IS NOT NULL) AS paths,
        array_agg(position ORDER BY camera_number) FILTER (WHERE detections IS NOT NULL) AS positions,
        array_agg(size ORDER BY camera_number) FILTER (WHERE detections IS NOT NULL) AS sizes,
        array_agg(md5 ORDER BY camera_number) FILTER (WHERE detections IS NOT NULL) AS md5s
    FROM (
        SELECT DISTINCT ON (recognition_id, camera_number) *
        FROM pg_temp.entries
        ORDER BY recognition_id, camera_number, detections IS NULL, path COLLATE "C" DESC, position DESC
    ) photo
    GROUP BY recognition_id
) e
LEFT JOIN ingest.claims c ON c.kind = 'qwen' AND c.recognition_id = e.recognition_id AND c.batch_id <> :batch_id
CROSS JOIN LATERAL (
    SELECT EXISTS (SELECT FROM public.recognitions r WHERE r.id = e.recognition_id) AS there
) known
CROSS JOIN LATERAL (
    -- Camera by camera, so that each is two look-ups in an index, whatever the statistics say.
    SELECT NOT :force AND (
        EXISTS (SELECT FROM public.initial_annotations a WHERE a.image_id = (
            SELECT i.id FROM public.images i WHERE i.recognition_id = e.recognition_id AND i.camera_number = 1))
        OR EXISTS (SELECT FROM public.initial_annotations a WHERE a.image_id = (
            SELECT i.id FROM public.images i WHERE i.recognition_id = e.recognition_id AND i.camera_number = 2))
    ) AS there
) loaded

-- name: create_entries
-- One row a photo in the annotations file; detections is NULL where its value is of no use.
CREATE TEMP TABLE entries (
    recognition_id bigint NOT NULL,
    camera_number smallint NOT NULL,
    path text NOT NULL,
    position bigint NOT NULL,
    size bigint NOT NULL,
    md5 text NOT NULL,
    detections bigint
) ON COMMIT DROP

-- name: create_staged_annotations
-- A recognition without any detection is loaded only to take the place of a former version.
CREATE TEMP TABLE staged ON COMMIT DROP AS
SELECT recognition_id, cameras, paths, positions, sizes, md5s
FROM pg_temp.annotated
WHERE known AND NOT loaded AND holder IS NULL AND (detections > 0 OR (:force AND detections = 0))

-- name: drop_late_annotations
-- Another batch may have committed since the candidates were chosen.
DELETE FROM ingest.claims c
WHERE c.kind = 'qwen' AND c.batch_id = :batch_id AND NOT :force
    AND (
        EXISTS (SELECT FROM public.initial_annotations a WHERE a.image_id = (
            SELECT i.id FROM public.images i WHERE i.recognition_id = c.recognition_id AND i.camera_number = 1))
        OR EXISTS (SELECT FROM public.initial_annotations a WHERE a.image_id = (
            SELECT i.id FROM public.images i WHERE i.recognition_id = c.recognition_id AND i.camera_number = 2))
    )

-- name: drop_skipped_rejects
-- What is wrong with photos that are not looked at this time is not told.
DELETE FROM pg_temp.found f
USING pg_temp.annotated a
WHERE a.recognition_id = f.recognition_id AND (NOT a.known OR a.loaded OR a.holder IS NOT NULL)

-- name: index_annotated
CREATE UNIQUE INDEX annotated_recognition ON pg_temp.annotated (recognition_id)

-- name: insert_manifest_annotations
-- Shards are cut along the file, so that each reads one stretch of it.
INSERT INTO ingest.manifest (batch_id, recognition_id, shard, photo_paths, photo_sizes, photo_mtimes, object_keys, md5s,
    entry_cameras, entry_positions)
SELECT :batch_id, s.recognition_id,
    ((row_number() OVER (ORDER BY s.positions[1], s.recognition_id) - 1) / :shard_size + 1)::integer,
    s.paths, s.sizes, '{}', '{}', s.md5s, s.cameras, s.positions
FROM pg_temp.staged s
JOIN ingest.claims c ON c.kind = 'qwen' AND c.recognition_id = s.recognition_id AND c.batch_id = :batch_id

-- name: list_annotations
-- The batch in a row, then the annotations of a shard in the order of the file, each in a row with nothing of the batch.
SELECT *
FROM (
    SELECT kind, state, source, clock_timestamp() AS now,
        EXISTS (SELECT FROM ingest.batch_state WHERE batch_id = :batch_id AND step = 'copy' AND shard = :shard) AS copied,
        NULL::bigint AS recognition_id, NULL::text[] AS paths, NULL::bigint[] AS sizes, NULL::text[] AS md5s,
        NULL::smallint[] AS cameras, NULL::bigint[] AS positions
    FROM ingest.batches
    WHERE id = :batch_id
    UNION ALL
    SELECT NULL, NULL, NULL, NULL, NULL, recognition_id, photo_paths, photo_sizes, md5s, entry_cameras, entry_positions
    FROM ingest.manifest
    WHERE batch_id = :batch_id AND shard = :shard
) AS listed
ORDER BY positions[1] NULLS FIRST

-- name: sample_annotations
-- Where discovery saw the annotations of some photos of a shard, and what they were.
SELECT photo_sizes AS sizes, md5s, entry_positions AS positions
FROM ingest.manifest
WHERE batch_id = :batch_id AND shard = :shard
LIMIT :count
