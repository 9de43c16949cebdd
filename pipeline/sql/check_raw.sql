-- The raw schema holds what finished batches have, and of unfinished ones what their markers say.
SELECT coalesce(b.id, found.batch_id) AS batch_id, 'batch ' || coalesce(b.id, found.batch_id) AS what,
    'has ' || coalesce(found.recognitions, 0) || ' recognitions in raw instead of ' || coalesce(wanted.recognitions, 0)
        AS message
FROM (
    SELECT batch_id, count(*) AS recognitions FROM raw.recipes GROUP BY batch_id
) found
FULL JOIN (
    SELECT m.batch_id, count(*) AS recognitions
    FROM ingest.manifest m
    JOIN ingest.batch_state s ON s.batch_id = m.batch_id AND s.step = 'copy' AND s.shard = m.shard
    JOIN ingest.batches k ON k.id = m.batch_id AND k.kind = 'load' AND k.state <> 'resetting'
    WHERE NOT m.rejected
    GROUP BY m.batch_id
) wanted USING (batch_id)
LEFT JOIN ingest.batches b ON b.id = coalesce(found.batch_id, wanted.batch_id)
WHERE found.recognitions IS DISTINCT FROM wanted.recognitions
UNION ALL
SELECT q.batch_id, 'batch ' || q.batch_id, 'has annotations in raw, and is not there'
FROM (SELECT DISTINCT batch_id FROM raw.qwen_annotations) q
LEFT JOIN ingest.batches b ON b.id = q.batch_id AND b.kind = 'qwen' AND b.state IN ('loading', 'done')
WHERE b.id IS NULL
