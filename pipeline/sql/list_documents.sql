-- The batch in a row, then the documents of a shard, each in a row with nothing of the batch in it.
SELECT kind, state, source, clock_timestamp() AS now,
    EXISTS (SELECT FROM ingest.batch_state WHERE batch_id = :batch_id AND step = 'upload' AND shard = :shard) AS uploaded,
    EXISTS (SELECT FROM ingest.batch_state WHERE batch_id = :batch_id AND step = 'copy' AND shard = :shard) AS copied,
    NULL::bigint AS recognition_id, NULL AS menu_path, NULL::bigint AS menu_size, NULL AS menu_sha256,
    NULL AS receipt_path, NULL::bigint AS receipt_size, NULL AS receipt_sha256
FROM ingest.batches
WHERE id = :batch_id
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, recognition_id, menu_path, menu_size, menu_sha256, receipt_path,
    receipt_size, receipt_sha256
FROM ingest.manifest
WHERE batch_id = :batch_id AND shard = :shard
ORDER BY recognition_id NULLS FIRST
