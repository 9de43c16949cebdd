-- Discovery of an annotations file: entries in a temporary table, then claims, manifest and raw rows.

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

-- name: create_annotated
-- What the annotations file has of each recognition, and what stands in the way of loading it. Of a photo that is in
-- the file several times, the key that sorts last counts, and of equal keys the last.
CREATE TEMP TABLE annotated ON COMMIT DROP AS
SELECT e.*, known.there AS known, loaded.there AS loaded, c.batch_id AS holder
FROM (
    SELECT recognition_id, count(*) AS photos, sum(detections) AS detections,
        array_agg(path ORDER BY camera_number) FILTER (WHERE detections IS NOT NULL) AS paths,
        array_agg(number ORDER BY camera_number) FILTER (WHERE detections IS NOT NULL) AS numbers,
        array_agg(size ORDER BY camera_number) FILTER (WHERE detections IS NOT NULL) AS sizes
    FROM (
        SELECT DISTINCT ON (recognition_id, camera_number) *
        FROM pg_temp.entries
        ORDER BY recognition_id, camera_number, detections IS NULL, path COLLATE "C" DESC, number DESC
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

-- name: create_detections
-- One row a usable detection, numbered from 1 in its entry.
CREATE TEMP TABLE detections (
    number bigint NOT NULL,
    detection integer NOT NULL,
    label text NOT NULL,
    x1 double precision NOT NULL,
    y1 double precision NOT NULL,
    x2 double precision NOT NULL,
    y2 double precision NOT NULL
) ON COMMIT DROP

-- name: create_entries
-- One row an entry of the annotations file, numbered in its order; detections is NULL where the value cannot be used.
CREATE TEMP TABLE entries (
    number bigint NOT NULL,
    recognition_id bigint NOT NULL,
    camera_number smallint NOT NULL,
    path text NOT NULL,
    size bigint NOT NULL,
    detections bigint
) ON COMMIT DROP

-- name: create_staged_annotations
-- A recognition without any detection is loaded only to take the place of a former version.
CREATE TEMP TABLE staged ON COMMIT DROP AS
SELECT recognition_id, paths, numbers, sizes
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

-- name: insert_annotations
-- The detections of the photos in the manifest.
INSERT INTO raw.detections (batch_id, recognition_id, camera_number, detection, label, x1, y1, x2, y2)
SELECT :batch_id, e.recognition_id, e.camera_number, d.detection, d.label, d.x1, d.y1, d.x2, d.y2
FROM (
    SELECT unnest(s.numbers) AS number
    FROM pg_temp.staged s
    JOIN ingest.claims c ON c.kind = 'qwen' AND c.recognition_id = s.recognition_id AND c.batch_id = :batch_id
) chosen
JOIN pg_temp.entries e USING (number)
JOIN pg_temp.detections d USING (number)

-- name: insert_manifest_annotations
-- All of a batch's annotations are one shard: discovery copies them itself.
INSERT INTO ingest.manifest (batch_id, recognition_id, shard, photo_paths, photo_sizes, photo_mtimes, object_keys)
SELECT :batch_id, s.recognition_id, 1, s.paths, s.sizes, '{}', '{}'
FROM pg_temp.staged s
JOIN ingest.claims c ON c.kind = 'qwen' AND c.recognition_id = s.recognition_id AND c.batch_id = :batch_id
