-- The batch in a row, then the annotations of a shard in the order of the file, each in a row with nothing of the batch.
SELECT *
FROM (
    SELECT kind, state, source, clock_timestamp() AS now,
        EXISTS (SELECT FROM ingest.batch_state WHERE batch_id = :batch_id AND step = 'copy' AND shard = :shard) AS copied,
        NULL::bigint AS recognition_id, NULL::text[] AS paths, NULL::bigint[] AS sizes, NULL::text[] AS md5s,
        NULL::smallint[] AS cameras, NULL::bigint[] AS positions
    FROM ingest.batches
    WHERE id = :batch_id
    UNION ALL
    SELECT NULL, NULL, NULL, NULL, NULL, recognition_id, photo_paths, photo_sizes, md5s, entry_cameras, entry_positions
    FROM ingest.manifest
    WHERE batch_id = :batch_id AND shard = :shard
) AS listed
ORDER BY positions[1] NULLS FIRST
