-- A finished batch has all its markers and no claim; a batch that was reset has left nothing but its own row.
SELECT b.id AS batch_id, 'batch ' || b.id AS what, problem.message
FROM ingest.batches b
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE s.step IN ('discover', 'transform') AND s.shard = 0) AS whole,
        count(*) FILTER (WHERE s.step = 'upload') AS uploads, count(*) FILTER (WHERE s.step = 'copy') AS copies,
        count(*) AS markers
    FROM ingest.batch_state s WHERE s.batch_id = b.id
) m
CROSS JOIN LATERAL (
    SELECT 'is done and lacks a marker' AS message
    WHERE b.state = 'done'
        AND (m.whole <> 2 OR m.copies <> b.shards OR (b.kind = 'load' AND m.uploads <> b.shards))
    UNION ALL
    SELECT 'is reset and has markers left' WHERE b.state = 'reset' AND m.markers > 0
    UNION ALL
    SELECT 'is reset and has a manifest left'
    WHERE b.state = 'reset' AND EXISTS (SELECT FROM ingest.manifest f WHERE f.batch_id = b.id)
    UNION ALL
    SELECT 'is ' || b.state || ' and holds recognitions'
    WHERE b.state <> 'loading' AND EXISTS (SELECT FROM ingest.claims c WHERE c.batch_id = b.id)
) problem
