-- Adoption: what the bucket and the domain have, the plan, and putting it on record as finished batches.

-- name: create_listed
CREATE TEMP TABLE listed (key text NOT NULL, size bigint NOT NULL, md5 text) ON COMMIT DROP

-- name: create_adopting
CREATE UNIQUE INDEX ON pg_temp.listed (key);
ANALYZE pg_temp.listed;
-- Recognitions that no batch has on record, each with its photos: arrays of two, NULL where there is none. An object
-- belongs to a photo if the row names it, and the key has the form that the older script gives it; those of a batch of ours
-- stay its own. What a finished batch had, and others loaded anew or took over, needs a newer version than that has.
CREATE TEMP TABLE adopting ON COMMIT DROP AS
SELECT r.id AS recognition_id, coalesce(r.batch_id, '') AS former_id,
    ARRAY[one.key, two.key] AS object_keys, ARRAY[one.size, two.size] AS sizes, ARRAY[one.md5, two.md5] AS md5s,
    ARRAY[a.width, b.width] AS widths, ARRAY[a.height, b.height] AS heights,
    ARRAY[a.storage_path, b.storage_path] AS paths, coalesce(known.keys, '{}') AS sent,
    known.version IS NOT NULL AND coalesce(known.version >= (
        SELECT k.version FROM ingest.batches k
        WHERE k.adopted AND coalesce(k.adopted_from, '') = coalesce(r.batch_id, '')
        ORDER BY k.version DESC NULLS FIRST LIMIT 1), false) AS is_again
FROM public.recognitions r
LEFT JOIN public.images a ON a.recognition_id = r.id AND a.camera_number = 1
LEFT JOIN public.images b ON b.recognition_id = r.id AND b.camera_number = 2
LEFT JOIN pg_temp.listed one ON one.key = a.storage_path AND one.key = 'recognitions/' || r.id || '/camera1.jpg'
LEFT JOIN pg_temp.listed two ON two.key = b.storage_path AND two.key = 'recognitions/' || r.id || '/camera2.jpg'
CROSS JOIN LATERAL (
    SELECT max(k.version) AS version, array_agg(key) FILTER (WHERE NOT k.adopted) AS keys,
        coalesce(bool_and(k.state = 'done'), true) AS is_finished
    FROM ingest.manifest m
    JOIN ingest.batches k ON k.id = m.batch_id AND k.kind = 'load'
    CROSS JOIN unnest(m.object_keys) AS key
    WHERE m.recognition_id = r.id
) known
WHERE known.is_finished AND NOT ingest.is_on_record(r.id);
CREATE UNIQUE INDEX ON pg_temp.adopting (recognition_id);
ANALYZE pg_temp.adopting;
-- An id of the older script stays if it can be one of ours and is free; without one, and else, it is adopted_<n>.
CREATE TEMP TABLE adopted_batches ON COMMIT DROP AS
WITH former AS (
    SELECT former_id, is_again, count(*) AS recognitions FROM pg_temp.adopting GROUP BY former_id, is_again
), named AS (
    SELECT f.*, coalesce(b.id, CASE WHEN f.former_id ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$' AND f.former_id !~ '\.\.'
        AND f.former_id <> 'recognitions' AND NOT EXISTS (SELECT FROM ingest.batches k WHERE k.id = f.former_id)
        THEN f.former_id END) AS id
    FROM former f
    LEFT JOIN LATERAL (
        SELECT k.id FROM ingest.batches k
        WHERE k.adopted AND coalesce(k.adopted_from, '') = f.former_id AND NOT f.is_again
        ORDER BY k.version DESC NULLS FIRST LIMIT 1
    ) b ON true
)
SELECT former_id, is_again, recognitions, coalesce(id, 'adopted_' || taken.highest + row_number() OVER (
    PARTITION BY id IS NULL ORDER BY former_id COLLATE "C")) AS id
FROM named
CROSS JOIN (
    SELECT coalesce(max(substring(id FROM '^adopted_([0-9]{1,9})$')::bigint), 0) AS highest
    FROM (SELECT id FROM ingest.batches UNION SELECT former_id FROM former) ids
) taken

-- name: count_adopting
SELECT count(*) AS recognitions,
    coalesce(sum(num_nonnulls(object_keys[1], object_keys[2])), 0)::bigint AS photos,
    coalesce(sum((
        SELECT count(paths[c]) FROM generate_series(1, 2) AS c WHERE object_keys[c] IS NULL AND paths[c] <> ALL (sent)
    )), 0)::bigint AS photos_missing,
    coalesce(sum(num_nulls(paths[1], paths[2])), 0)::bigint AS rows_without_photo,
    (SELECT count(*) FROM pg_temp.listed l
     WHERE NOT EXISTS (SELECT FROM public.images i WHERE i.storage_path = l.key)) AS objects_without_row
FROM pg_temp.adopting

-- name: list_adopted_batches
SELECT id, nullif(former_id, '') AS former_id, recognitions
FROM pg_temp.adopted_batches
ORDER BY id COLLATE "C"

-- name: find_resetting
-- Adopted batches whose reset was interrupted: what is left of them must go first.
SELECT b.id FROM ingest.batches b JOIN pg_temp.adopted_batches USING (id) WHERE b.state = 'resetting' ORDER BY b.id

-- name: insert_adopted
-- What others loaded anew is no longer of the batch that it was adopted with.
DELETE FROM ingest.adopted_rows k USING pg_temp.adopting a WHERE k.recognition_id = a.recognition_id;
WITH former AS (
    DELETE FROM ingest.manifest m
    USING pg_temp.adopting a, ingest.batches k
    WHERE m.recognition_id = a.recognition_id AND k.id = m.batch_id AND k.adopted
    RETURNING m.batch_id, m.recognition_id, num_nonnulls(m.object_keys[1], m.object_keys[2]) AS photos,
        coalesce(m.photo_sizes[1], 0) + coalesce(m.photo_sizes[2], 0) AS bytes
), proofs AS (
    DELETE FROM ingest.proofs p USING former f WHERE (p.batch_id, p.recognition_id) = (f.batch_id, f.recognition_id)
)
UPDATE ingest.batches b
SET recognitions = b.recognitions - f.recognitions, found = b.found - f.recognitions, photos = b.photos - f.photos,
    bytes = b.bytes - f.bytes, metrics = '{}'
FROM (
    SELECT batch_id, count(*) AS recognitions, sum(photos)::bigint AS photos, sum(bytes)::bigint AS bytes
    FROM former GROUP BY batch_id
) f
WHERE b.id = f.batch_id;
-- A batch that was reset and is there again becomes a new version.
INSERT INTO ingest.batches
    (id, kind, state, source, bucket, bucket_created_at, version, finished_at, adopted, adopted_from)
SELECT a.id, 'load', 'done', 'adopted', :bucket, CAST(:bucket_created_at AS timestamptz),
    (SELECT coalesce(max(version), 0) FROM ingest.batches) + row_number() OVER (ORDER BY a.id COLLATE "C"),
    clock_timestamp(), true, nullif(a.former_id, '')
FROM pg_temp.adopted_batches a
ORDER BY a.id COLLATE "C"
ON CONFLICT (id) DO UPDATE
    SET state = 'done', version = coalesce(batches.version, excluded.version), finished_at = excluded.finished_at,
        reset_at = NULL, metrics = '{}', shards = CASE batches.state WHEN 'reset' THEN 0 ELSE batches.shards END,
        bucket = CASE batches.state WHEN 'reset' THEN excluded.bucket ELSE batches.bucket END,
        bucket_created_at = CASE batches.state WHEN 'reset' THEN excluded.bucket_created_at
            ELSE batches.bucket_created_at END;
INSERT INTO ingest.manifest (batch_id, recognition_id, shard, photo_paths, photo_sizes, photo_mtimes, object_keys,
    widths, heights, sha256s, md5s)
SELECT b.id, a.recognition_id, k.shards + (row_number() OVER (
        PARTITION BY b.id ORDER BY a.recognition_id::text COLLATE "C") - 1) / :shard_size + 1,
    '{}', a.sizes, '{}', a.object_keys, a.widths, a.heights, '{NULL,NULL}', a.md5s
FROM pg_temp.adopting a
JOIN pg_temp.adopted_batches b USING (former_id, is_again)
JOIN ingest.batches k ON k.id = b.id;
-- What a recognition lacks: verification passes over it.
INSERT INTO ingest.notices (batch_id, recognition_id, path, code, message, step)
SELECT b.id, a.recognition_id, lacks.path, lacks.code, lacks.message, 'adopt'
FROM pg_temp.adopting a
JOIN pg_temp.adopted_batches b USING (former_id, is_again)
CROSS JOIN generate_series(1, 2) AS c
CROSS JOIN LATERAL (
    SELECT coalesce(a.paths[c], 'recognitions/' || a.recognition_id || '/camera' || c || '.jpg') AS path,
        'adopted_without_photo' AS code,
        CASE WHEN a.paths[c] IS NULL THEN 'the recognition has no image of camera ' || c
            ELSE 'the bucket has no object that the image of camera ' || c || ' names' END AS message
    WHERE a.object_keys[c] IS NULL AND coalesce(a.paths[c] <> ALL (a.sent), true)
    UNION ALL
    SELECT a.paths[c], 'adopted_without_size', 'the image of camera ' || c || ' has no width or no height'
    WHERE a.paths[c] IS NOT NULL AND num_nulls(a.widths[c], a.heights[c]) > 0
) lacks
ORDER BY a.recognition_id, c;
INSERT INTO ingest.batch_state (batch_id, step, shard, started_at, worker)
SELECT b.id, marker.step, marker.shard, clock_timestamp(), 'adopt'
FROM pg_temp.adopted_batches b
CROSS JOIN LATERAL (
    SELECT whole AS step, 0 AS shard FROM unnest(ARRAY['discover', 'transform', 'load']) AS whole
    UNION ALL
    SELECT step, m.shard
    FROM (SELECT DISTINCT shard FROM ingest.manifest WHERE batch_id = b.id) m
    CROSS JOIN unnest(ARRAY['upload', 'copy']) AS step
) marker
ON CONFLICT (batch_id, step, shard) DO NOTHING;
UPDATE ingest.batches b
SET shards = m.shards, recognitions = m.recognitions, found = m.recognitions, photos = m.photos, bytes = m.bytes
FROM (
    SELECT batch_id, max(shard) AS shards, count(*) AS recognitions,
        coalesce(sum(num_nonnulls(object_keys[1], object_keys[2])), 0)::bigint AS photos,
        coalesce(sum(coalesce(photo_sizes[1], 0) + coalesce(photo_sizes[2], 0)), 0)::bigint AS bytes
    FROM ingest.manifest
    WHERE batch_id IN (SELECT id FROM pg_temp.adopted_batches)
    GROUP BY batch_id
) m
WHERE b.id = m.batch_id

-- name: find_over_adopted
-- Batches of ours that have adopted recognitions too, the last first.
SELECT b.id
FROM ingest.batches b
JOIN ingest.manifest m ON m.batch_id = b.id
WHERE NOT b.adopted AND EXISTS (
    SELECT FROM ingest.manifest a JOIN ingest.batches k ON k.id = a.batch_id
    WHERE a.recognition_id = m.recognition_id AND k.adopted AND coalesce(b.version > k.version, true))
GROUP BY b.id
ORDER BY b.version DESC NULLS FIRST, b.created_at DESC

-- name: list_adopted
SELECT id, adopted_from AS former_id, recognitions FROM ingest.batches WHERE adopted ORDER BY id COLLATE "C"

-- name: find_adopted_resetting
SELECT id FROM ingest.batches WHERE adopted AND state = 'resetting' ORDER BY id

-- name: forget_adopted
DELETE FROM ingest.manifest WHERE batch_id IN (SELECT id FROM ingest.batches WHERE adopted);
DELETE FROM ingest.batch_state WHERE batch_id IN (SELECT id FROM ingest.batches WHERE adopted);
DELETE FROM ingest.notices WHERE batch_id IN (SELECT id FROM ingest.batches WHERE adopted);
DELETE FROM ingest.batches WHERE adopted
