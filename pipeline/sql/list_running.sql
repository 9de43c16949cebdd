-- Batches that a run is loading now: it holds the lock of try_lock_batch.sql. A key of 64 bits is in pg_locks as two
-- halves; the locks of other databases of the server are there as well.
SELECT b.id
FROM ingest.batches b
CROSS JOIN LATERAL (SELECT hashtextextended('pipeline.batch:' || b.id, 0) AS value) AS key
WHERE b.state = 'loading'
    AND EXISTS (
        SELECT
        FROM pg_locks l
        JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()
        WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
            AND l.classid::bigint = (key.value >> 32) & 4294967295
            AND l.objid::bigint = key.value & 4294967295
    )
ORDER BY b.created_at
