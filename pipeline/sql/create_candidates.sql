-- Of a recognition in several exports, the one that sorts last; without what is loaded or held by another batch.
CREATE TEMP TABLE candidates ON COMMIT DROP AS
SELECT f.recognition_id, f.path
FROM (
    SELECT DISTINCT ON (recognition_id) recognition_id, path
    FROM pg_temp.found
    WHERE code IS NULL
    ORDER BY recognition_id, path COLLATE "C" DESC
) f
WHERE (:force OR NOT EXISTS (SELECT FROM public.recognitions r WHERE r.id = f.recognition_id))
    AND NOT EXISTS (
        SELECT FROM ingest.claims c
        WHERE c.kind = 'load' AND c.recognition_id = f.recognition_id AND c.batch_id <> :batch_id
    )
