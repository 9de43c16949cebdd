-- How many recognitions there are, and of how many the shard has the marker of a step.
SELECT count(*) AS total,
    count(*) FILTER (WHERE EXISTS (
        SELECT FROM ingest.batch_state s WHERE s.batch_id = m.batch_id AND s.step = :step AND s.shard = m.shard
    )) AS marked
FROM ingest.manifest m
WHERE m.batch_id = :batch_id
