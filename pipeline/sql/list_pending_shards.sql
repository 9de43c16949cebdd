SELECT s.shard
FROM ingest.batches b
CROSS JOIN LATERAL generate_series(:after + 1, b.shards) AS s (shard)
WHERE b.id = :batch_id
    AND NOT EXISTS (
        SELECT FROM ingest.batch_state m WHERE m.batch_id = b.id AND m.step = :step AND m.shard = s.shard
    )
ORDER BY s.shard
