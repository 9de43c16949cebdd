-- The raw schema holds what finished batches have, and of unfinished ones what their markers say.
SELECT b.id AS batch_id, 'batch ' || b.id AS what,
    CASE WHEN b.recognitions <> b.wanted
        THEN 'has ' || b.recognitions || ' recognitions in raw instead of ' || b.wanted
        ELSE 'has ' || b.photos || ' photos in raw instead of ' || 2 * b.wanted END AS message
FROM (
    SELECT batch_id AS id, sum(recognitions) AS recognitions, sum(photos) AS photos, sum(wanted) AS wanted
    FROM (
        SELECT batch_id, count(*) AS recognitions, 0 AS photos, 0 AS wanted FROM raw.recipes GROUP BY batch_id
        UNION ALL
        SELECT batch_id, 0, count(*), 0 FROM raw.recognition_files GROUP BY batch_id
        UNION ALL
        SELECT m.batch_id, 0, 0, count(*)
        FROM ingest.manifest m
        JOIN ingest.batch_state s ON s.batch_id = m.batch_id AND s.step = 'copy' AND s.shard = m.shard
        JOIN ingest.batches k ON k.id = m.batch_id AND k.kind = 'load' AND k.state <> 'resetting'
        WHERE NOT m.rejected
        GROUP BY m.batch_id
    ) counted
    GROUP BY batch_id
) b
WHERE b.recognitions <> b.wanted OR b.photos <> 2 * b.wanted
UNION ALL
SELECT q.batch_id, 'batch ' || q.batch_id, 'has annotations in raw, and is not there'
FROM (SELECT DISTINCT batch_id FROM raw.qwen_annotations) q
LEFT JOIN ingest.batches b ON b.id = q.batch_id AND b.kind = 'qwen' AND b.state IN ('loading', 'done')
WHERE b.id IS NULL
UNION ALL
SELECT m.batch_id, 'batch ' || m.batch_id, 'has menus in raw, and is not there'
FROM (SELECT DISTINCT batch_id FROM raw.menus) m
LEFT JOIN ingest.batches b ON b.id = m.batch_id AND b.kind = 'load' AND b.state IN ('loading', 'done')
WHERE b.id IS NULL
