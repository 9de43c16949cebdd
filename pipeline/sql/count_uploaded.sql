SELECT count(*) AS total,
    count(*) FILTER (WHERE EXISTS (
        SELECT FROM ingest.batch_state s WHERE s.batch_id = m.batch_id AND s.step = 'upload' AND s.shard = m.shard
    )) AS uploaded
FROM ingest.manifest m
WHERE m.batch_id = :batch_id
