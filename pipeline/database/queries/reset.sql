-- Reset: what goes, what comes back, what stands in the way.

-- name: count_raw
SELECT
    (SELECT count(*) FROM raw.photos WHERE batch_id = :batch_id) AS photos,
    (SELECT count(*) FROM raw.receipts WHERE batch_id = :batch_id) AS receipts,
    (SELECT count(*) FROM raw.menus WHERE batch_id = :batch_id) AS menus,
    (SELECT count(*) FROM raw.detections WHERE batch_id = :batch_id) AS detections

-- name: count_objects
-- Of an adopted batch, whose objects have no prefix of their own.
SELECT coalesce(sum(num_nonnulls(object_keys[1], object_keys[2])), 0)::bigint AS objects,
    coalesce(sum(coalesce(photo_sizes[1], 0) + coalesce(photo_sizes[2], 0)), 0)::bigint AS bytes
FROM ingest.manifest WHERE batch_id = :batch_id

-- name: delete_records
-- The row of the batch stays: that it was there, and when it went, is history.
DELETE FROM ingest.proofs WHERE batch_id = :batch_id;
DELETE FROM ingest.manifest WHERE batch_id = :batch_id;
DELETE FROM ingest.batch_state WHERE batch_id = :batch_id;
DELETE FROM ingest.rejects WHERE batch_id = :batch_id;
DELETE FROM ingest.notices WHERE batch_id = :batch_id;
UPDATE ingest.batches SET state = 'reset', reset_at = clock_timestamp(), version = NULL WHERE id = :batch_id

-- name: execute_reset
SELECT ingest.execute_reset(:batch_id) AS removed

-- name: find_references
SELECT a.relnamespace::regnamespace || '.' || quote_ident(a.relname) AS "table",
    t.relnamespace::regnamespace || '.' || quote_ident(t.relname) AS target, r.rows
FROM (
    SELECT app, target, sum(referencing)::bigint AS rows FROM ingest.find_references(false) GROUP BY app, target
) r
JOIN pg_class a ON a.oid = r.app
JOIN pg_class t ON t.oid = r.target
ORDER BY 1, 2

-- name: list_keys
-- Keys of the manifest: of the shards whose upload is marked, or of the others.
SELECT m.recognition_id, array_remove(m.object_keys, NULL) AS keys_of_photos
FROM ingest.manifest m
WHERE m.batch_id = :batch_id AND m.recognition_id > :after AND :sent = EXISTS (
    SELECT FROM ingest.batch_state s WHERE s.batch_id = m.batch_id AND s.step = 'upload' AND s.shard = m.shard
)
ORDER BY m.recognition_id
LIMIT :count

-- name: list_lost
-- Recognitions of a batch that others loaded anew or took over, and whose images name objects of it, or will again with
-- the reset of a later batch.
SELECT DISTINCT m.recognition_id
FROM ingest.manifest m
JOIN ingest.batches b ON b.id = m.batch_id
JOIN public.images i ON i.recognition_id = m.recognition_id
WHERE m.batch_id = :batch_id
    AND NOT EXISTS (SELECT FROM pg_temp.affected t WHERE t.recognition_id = m.recognition_id)
    AND (i.storage_path = ANY (m.object_keys) OR NOT b.adopted AND EXISTS (
        SELECT FROM ingest.adopted_rows k
        WHERE k.relation = 'public.images' AND k.id = i.id AND k.content ->> 'storage_path' = ANY (m.object_keys)))
ORDER BY m.recognition_id

-- name: list_stale
-- Rows that go, by table, in the order in which they are listed.
SELECT n.nspname || '.' || c.relname AS name, d.going
FROM (SELECT relation, count(*) AS going FROM pg_temp.stale GROUP BY relation) d
JOIN pg_class c ON c.oid = d.relation
JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY 1

-- name: list_returning
-- Of how many recognitions an earlier batch's version comes back.
SELECT former.batch_id, count(DISTINCT t.recognition_id) AS recognitions
FROM pg_temp.affected t
JOIN ingest.manifest m ON m.batch_id = :batch_id AND m.recognition_id = t.recognition_id
CROSS JOIN LATERAL (
    SELECT t.batch_id WHERE m.cameras IS NULL
    UNION SELECT t.qwen_batch_ids[camera] FROM unnest(m.cameras) AS camera
) former (batch_id)
JOIN ingest.batches b ON b.id = former.batch_id
JOIN ingest.batches gone ON gone.id = m.batch_id AND b.version < gone.version
GROUP BY former.batch_id
ORDER BY former.batch_id

-- name: mark_resetting
UPDATE ingest.batches SET state = 'resetting' WHERE id = :batch_id

-- name: plan_reset
-- A plan that is carried out takes locks: work that begins then waits for the reset.
SELECT ingest.plan_reset(:batch_id, :locks)
