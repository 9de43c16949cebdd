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
