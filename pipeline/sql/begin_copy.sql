-- Hold the batch and its COPY of a shard; return the batch in a row, then its documents, each in a row with nothing of
-- the batch in it. Each statement sees what was committed before it began, so that the last one sees what the others
-- waited for. Right after a bulk load there are no statistics of the batch, and a scan of all batches looks cheap.
SELECT set_config('enable_seqscan', 'off', true);
SELECT FROM ingest.batches WHERE id = :batch_id FOR SHARE;
SELECT pg_advisory_xact_lock(hashtextextended('pipeline.step:' || :batch_id || '/copy/' || :shard, 0));
WITH markers AS (
    SELECT coalesce(bool_or(step = 'upload'), false) AS uploaded, coalesce(bool_or(step = 'copy'), false) AS copied
    FROM ingest.batch_state
    WHERE batch_id = :batch_id AND step IN ('upload', 'copy') AND shard = :shard
), batch AS (
    SELECT kind, state, source, clock_timestamp() AS now, uploaded, copied
    FROM ingest.batches
    CROSS JOIN markers
    WHERE id = :batch_id
)
SELECT *, NULL::bigint AS recognition_id, NULL AS menu_path, NULL::bigint AS menu_size, NULL AS menu_sha256,
    NULL AS receipt_path, NULL::bigint AS receipt_size, NULL AS receipt_sha256
FROM batch
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, recognition_id, menu_path, menu_size, menu_sha256, receipt_path, receipt_size,
    receipt_sha256
FROM batch
JOIN ingest.manifest ON batch_id = :batch_id AND shard = :shard
WHERE kind = 'load' AND state = 'loading' AND uploaded AND NOT copied
ORDER BY recognition_id NULLS FIRST
