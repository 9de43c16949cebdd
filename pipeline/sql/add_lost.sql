-- What another discovery took, or another batch loaded, while this one looked.
WITH lost AS (
    SELECT count(*) FILTER (WHERE c.batch_id IS NULL) AS loaded,
        count(*) FILTER (WHERE c.batch_id IS NOT NULL) AS held,
        coalesce(array_agg(DISTINCT c.batch_id) FILTER (WHERE c.batch_id IS NOT NULL), '{}') AS holders
    FROM pg_temp.staged s
    LEFT JOIN ingest.claims c ON c.kind = :kind AND c.recognition_id = s.recognition_id
    WHERE c.batch_id IS DISTINCT FROM :batch_id
)
UPDATE ingest.batches b
SET already_loaded = b.already_loaded + lost.loaded, held_elsewhere = b.held_elsewhere + lost.held,
    held_by = ARRAY(SELECT DISTINCT holder FROM unnest(b.held_by || lost.holders) AS holder ORDER BY holder)
FROM lost
WHERE b.id = :batch_id
RETURNING b.already_loaded, b.held_elsewhere, b.held_by
