-- Readers see each recognition in the version of the newest finished batch that holds it, and nothing else.
SELECT coalesce(newest.batch_id, r.batch_id) AS batch_id, 'recognition ' || coalesce(newest.recognition_id, r.id) AS what,
    CASE WHEN r.id IS NULL THEN 'is in finished batch ' || newest.batch_id || ' and not in the domain'
        WHEN newest.batch_id IS NULL THEN 'is in the domain and in no finished batch'
        ELSE 'is shown as batch ' || r.batch_id || ' has it, not as batch ' || newest.batch_id END AS message
FROM (
    SELECT DISTINCT ON (m.recognition_id) m.recognition_id, m.batch_id
    FROM ingest.manifest m
    JOIN ingest.batches b ON b.id = m.batch_id
    WHERE b.kind = 'load' AND b.state = 'done'
    ORDER BY m.recognition_id, b.version DESC
) newest
FULL JOIN public.recognitions r ON r.id = newest.recognition_id
WHERE r.batch_id IS DISTINCT FROM newest.batch_id
