-- What the dataset holds, and why some of it is no candidate.
WITH distinct_found AS (
    SELECT recognition_id, count(*) AS copies FROM pg_temp.found WHERE code IS NULL GROUP BY recognition_id
)
SELECT count(*) AS found,
    coalesce(sum(d.copies - 1), 0)::bigint AS superseded_copies,
    count(*) FILTER (WHERE loaded.there) AS already_loaded,
    count(*) FILTER (WHERE NOT loaded.there AND c.batch_id IS NOT NULL) AS held_elsewhere,
    coalesce(array_agg(DISTINCT c.batch_id) FILTER (WHERE NOT loaded.there AND c.batch_id IS NOT NULL), '{}') AS held_by
FROM distinct_found d
LEFT JOIN ingest.claims c ON c.kind = 'load' AND c.recognition_id = d.recognition_id AND c.batch_id <> :batch_id
CROSS JOIN LATERAL (
    SELECT NOT :force AND EXISTS (SELECT FROM public.recognitions r WHERE r.id = d.recognition_id) AS there
) loaded
