-- Discovery of a dataset: folders in temporary tables, then batch, claims and manifest.

-- name: add_lost
-- What another discovery took, or another batch loaded, while this one looked.
WITH lost AS (
    SELECT count(*) FILTER (WHERE c.batch_id IS NULL) AS loaded,
        count(*) FILTER (WHERE c.batch_id IS NOT NULL) AS held,
        coalesce(array_agg(DISTINCT c.batch_id) FILTER (WHERE c.batch_id IS NOT NULL), '{}') AS holders
    FROM pg_temp.staged s
    LEFT JOIN ingest.claims c ON c.kind = :kind AND c.recognition_id = s.recognition_id
    WHERE c.batch_id IS DISTINCT FROM :batch_id
)
UPDATE ingest.batches b
SET already_loaded = b.already_loaded + lost.loaded, held_elsewhere = b.held_elsewhere + lost.held,
    held_by = ARRAY(SELECT DISTINCT holder FROM unnest(b.held_by || lost.holders) AS holder ORDER BY holder)
FROM lost
WHERE b.id = :batch_id
RETURNING b.already_loaded, b.held_elsewhere, b.held_by

-- name: add_not_adopted
-- Recognitions that are there and that no finished batch has: they stay as they are.
INSERT INTO pg_temp.found (recognition_id, path, code, message, is_notice)
SELECT recognition_id, paths[1], 'not_adopted', :message, true FROM pg_temp.candidates WHERE of_others

-- name: add_vanished
-- Recognitions that were loaded from this source and are not in a folder that cannot be read; each is told once.
INSERT INTO pg_temp.found (recognition_id, path, code, message, is_notice)
SELECT r.id, m.photo_paths[1], 'folder_vanished', 'the folder is gone from the dataset; what was loaded of it stays', true
FROM ingest.batches b
JOIN ingest.manifest m ON m.batch_id = b.id
JOIN public.recognitions r ON r.id = m.recognition_id AND r.batch_id = b.id
WHERE b.kind = 'load' AND b.source = :source
    AND NOT EXISTS (SELECT FROM pg_temp.candidates c WHERE c.recognition_id = r.id)
    AND NOT EXISTS (
        SELECT FROM pg_temp.found f
        WHERE f.code IS NOT NULL AND NOT f.is_notice AND starts_with(m.photo_paths[1], f.path || '/')
    )
    AND NOT EXISTS (SELECT FROM ingest.notices n WHERE n.recognition_id = r.id AND n.code = 'folder_vanished')

-- name: analyze_found
ANALYZE pg_temp.found

-- name: analyze_staged
ANALYZE pg_temp.staged

-- name: count_beyond
SELECT count(*) AS beyond
FROM pg_temp.candidates
WHERE recognition_id > :after AND NOT loaded AND NOT of_others AND holder IS NULL

-- name: count_claims
SELECT count(*) AS claims FROM ingest.claims WHERE batch_id = :batch_id

-- name: count_found
-- What the dataset holds, and why some of it is not taken.
SELECT count(*) AS found,
    coalesce(sum(cardinality(paths) - 1), 0)::bigint AS superseded_copies,
    count(*) FILTER (WHERE loaded) AS already_loaded,
    count(*) FILTER (WHERE NOT loaded AND NOT of_others AND holder IS NOT NULL) AS held_elsewhere,
    coalesce(array_agg(DISTINCT holder) FILTER (WHERE NOT loaded AND NOT of_others AND holder IS NOT NULL), '{}')
        AS held_by
FROM pg_temp.candidates

-- name: count_found_notices
SELECT code, count(*) AS notices FROM pg_temp.found WHERE is_notice GROUP BY code ORDER BY code

-- name: count_found_rejects
SELECT code, count(*) AS rejects FROM pg_temp.found WHERE code IS NOT NULL AND NOT is_notice GROUP BY code ORDER BY code

-- name: create_candidates
-- Each recognition with its folders, the newest first, and what stands in the way of loading it.
CREATE TEMP TABLE candidates ON COMMIT DROP AS
SELECT f.recognition_id, f.paths, known.loaded, c.batch_id AS holder,
    NOT known.loaded AND ingest.is_there(f.recognition_id) AND NOT ingest.is_on_record(f.recognition_id) AS of_others
FROM (
    SELECT recognition_id, array_agg(path ORDER BY rank, path COLLATE "C" DESC) AS paths
    FROM pg_temp.found
    WHERE code IS NULL
    GROUP BY recognition_id
) f
LEFT JOIN ingest.claims c ON c.kind = 'load' AND c.recognition_id = f.recognition_id AND c.batch_id <> :batch_id
CROSS JOIN LATERAL (
    SELECT NOT :force AND EXISTS (SELECT FROM public.recognitions r WHERE r.id = f.recognition_id) AS loaded
) known

-- name: create_found
-- Folders of recognitions, whose code is NULL, rejects and notices; a lower rank is a newer export.
CREATE TEMP TABLE found (
    number bigint, -- of the entry of an annotations file
    recognition_id bigint,
    path text NOT NULL,
    code text,
    message text,
    is_notice boolean NOT NULL DEFAULT false,
    rank integer NOT NULL DEFAULT 0
) ON COMMIT DROP

-- name: create_staged
CREATE TEMP TABLE staged (
    recognition_id bigint PRIMARY KEY,
    captured_on date,
    photo_paths text[],
    photo_sizes bigint[],
    photo_mtimes bigint[],
    menu_path text,
    menu_size bigint,
    menu_mtime bigint,
    receipt_path text,
    receipt_size bigint,
    receipt_mtime bigint
) ON COMMIT DROP

-- name: drop_late_claims
-- Another batch may have committed since the candidates were chosen.
DELETE FROM ingest.claims c
WHERE c.batch_id = :batch_id AND NOT :force
    AND EXISTS (SELECT FROM public.recognitions r WHERE r.id = c.recognition_id)

-- name: drop_in_use
-- Their photos are not sent; their files are not taken.
WITH left_out AS (
    DELETE FROM pg_temp.staged s
    USING unnest(CAST(:recognition_ids AS bigint[]), CAST(:messages AS text[])) AS u (recognition_id, message)
    WHERE s.recognition_id = u.recognition_id
    RETURNING s.recognition_id, s.photo_paths[1] AS path, u.message
)
INSERT INTO pg_temp.found (recognition_id, path, code, message, is_notice)
SELECT recognition_id, regexp_replace(path, '(/photos)?/[^/]*$', '', 'i'), 'in_use', message, true FROM left_out

-- name: find_in_use
SELECT f.recognition_id, n.nspname || '.' || c.relname AS "table", f.referencing
FROM ingest.find_in_use(:batch_id) f
JOIN pg_class c ON c.oid = f.app
JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY f.recognition_id, 2

-- name: index_candidates
CREATE UNIQUE INDEX candidates_recognition ON pg_temp.candidates (recognition_id)

-- name: insert_batch
INSERT INTO ingest.batches (id, kind, state, source, recognition_limit, force, strict, bucket, bucket_created_at,
    coordinates, exif_turned, found, already_loaded, held_elsewhere, held_by, superseded_copies, beyond_limit)
VALUES (:batch_id, :kind, 'loading', :source, :limit, :force, :strict, :bucket, :bucket_created_at,
    :coordinates, :exif_turned, :found, :already_loaded, :held_elsewhere, :held_by, :superseded_copies, :beyond_limit)
ON CONFLICT (id) DO UPDATE
    SET kind = excluded.kind, state = 'loading', source = excluded.source,
        recognition_limit = excluded.recognition_limit, force = excluded.force, strict = excluded.strict,
        bucket = excluded.bucket, bucket_created_at = excluded.bucket_created_at,
        coordinates = excluded.coordinates, exif_turned = excluded.exif_turned, found = excluded.found,
        already_loaded = excluded.already_loaded, held_elsewhere = excluded.held_elsewhere, held_by = excluded.held_by,
        superseded_copies = excluded.superseded_copies, beyond_limit = excluded.beyond_limit, held_reason = NULL,
        released_at = NULL, version = NULL, created_at = clock_timestamp(), finished_at = NULL, reset_at = NULL,
        metrics = '{}'
    WHERE batches.state = 'reset'
RETURNING id

-- name: insert_claims
-- The primary key decides between two discoveries at once; in order, so that they cannot wait for each other.
INSERT INTO ingest.claims (kind, recognition_id, batch_id)
SELECT :kind, s.recognition_id, :batch_id FROM pg_temp.staged s ORDER BY s.recognition_id
ON CONFLICT (kind, recognition_id) DO NOTHING

-- name: insert_found_rejects
INSERT INTO ingest.rejects (batch_id, recognition_id, path, code, message, step)
SELECT :batch_id, recognition_id, path, code, message, 'discover'
FROM pg_temp.found
WHERE code IS NOT NULL AND NOT is_notice
ORDER BY path COLLATE "C", message COLLATE "C"

-- name: insert_found_notices
INSERT INTO ingest.notices (batch_id, recognition_id, path, code, message, step)
SELECT :batch_id, recognition_id, path, code, message, 'discover'
FROM pg_temp.found
WHERE is_notice
ORDER BY path COLLATE "C", message COLLATE "C"

-- name: insert_manifest
-- Shards are cut along the text order of the numbers, so that the keys of a shard are neighbours in the bucket.
INSERT INTO ingest.manifest (batch_id, recognition_id, shard, captured_on, photo_paths, photo_sizes, photo_mtimes,
    object_keys, menu_path, menu_size, menu_mtime, receipt_path, receipt_size, receipt_mtime)
SELECT :batch_id, s.recognition_id,
    ((row_number() OVER (ORDER BY s.recognition_id::text COLLATE "C") - 1) / :shard_size + 1)::integer,
    s.captured_on, s.photo_paths, s.photo_sizes, s.photo_mtimes,
    ARRAY[:batch_id || '/recognitions/' || s.recognition_id || '/camera1.jpg',
          :batch_id || '/recognitions/' || s.recognition_id || '/camera2.jpg'],
    s.menu_path, s.menu_size, s.menu_mtime, s.receipt_path, s.receipt_size, s.receipt_mtime
FROM pg_temp.staged s
JOIN ingest.claims c ON c.kind = 'load' AND c.recognition_id = s.recognition_id AND c.batch_id = :batch_id

-- name: list_candidates
SELECT recognition_id, paths
FROM pg_temp.candidates
WHERE recognition_id > :after AND NOT loaded AND NOT of_others AND holder IS NULL
ORDER BY recognition_id
LIMIT :count

-- name: list_found_rejects
SELECT recognition_id, path, code, message
FROM pg_temp.found
WHERE code IS NOT NULL AND NOT is_notice
ORDER BY path COLLATE "C"
LIMIT :count

-- name: list_left
-- The recognitions that are not inspected: loaded, held by another batch, of others, or beyond the limit; and a photo as
-- loaded.
SELECT c.recognition_id, c.paths, c.loaded, m.photo_paths[1] AS photo
FROM pg_temp.candidates c
LEFT JOIN public.recognitions r ON r.id = c.recognition_id
LEFT JOIN ingest.manifest m ON m.batch_id = r.batch_id AND m.recognition_id = r.id
WHERE c.recognition_id > :after AND (c.loaded OR c.of_others OR c.holder IS NOT NULL OR c.recognition_id > :last)
ORDER BY c.recognition_id
LIMIT :count

-- name: list_present
-- The inputs to load whose recognition is there already.
SELECT s.recognition_id, s.receipt_path, s.receipt_size, s.receipt_mtime
FROM pg_temp.staged s
WHERE s.recognition_id > :after AND EXISTS (SELECT FROM public.recognitions r WHERE r.id = s.recognition_id)
ORDER BY s.recognition_id
LIMIT :count

-- name: list_near_notices
-- What explains that no recognition was found.
SELECT path, message
FROM pg_temp.found
WHERE is_notice AND code IN ('folder_name', 'folder_nested', 'file_archive')
ORDER BY path COLLATE "C"
LIMIT :count

-- name: sample_manifest
-- Some photos of a shard as discovery saw them.
SELECT photo_paths, photo_sizes, photo_mtimes
FROM ingest.manifest
WHERE batch_id = :batch_id AND shard = :shard
LIMIT :count

-- name: insert_look
INSERT INTO ingest.looks
    (batch_id, kind, source, bucket, batch_made, found, already_loaded, changed, rejected, known_rejects, newest)
SELECT b.id, b.kind, b.source, b.bucket, true, b.found, b.already_loaded, 0, :rejected, 0, greatest(
    (SELECT max(captured_on) FROM ingest.manifest WHERE batch_id = b.id),
    (SELECT max(newest) FROM ingest.looks WHERE kind = b.kind AND source = b.source))
FROM ingest.batches b
WHERE b.id = :batch_id
ON CONFLICT (batch_id) DO UPDATE SET kind = excluded.kind, source = excluded.source, bucket = excluded.bucket,
    looked_at = excluded.looked_at, found = excluded.found, already_loaded = excluded.already_loaded,
    rejected = excluded.rejected, newest = excluded.newest

-- name: update_batch_counts
-- After discovery; the commit counts again, when shards may have rejected some. What another batch took in the meantime
-- was not taken.
UPDATE ingest.batches b
SET shards = coalesce(m.shards, 0), recognitions = coalesce(m.recognitions, 0), photos = coalesce(m.photos, 0),
    bytes = coalesce(m.bytes, 0), detections = 0,
    files = CASE WHEN b.kind = 'load' THEN given.files || jsonb_build_object('used', m.files,
        'not_taken', (given.files -> 'not_taken')::bigint + (given.files -> 'used')::bigint - m.files) ELSE '{}' END
FROM (
    SELECT max(shard) AS shards, count(*) AS recognitions, sum(cardinality(photo_paths)) AS photos,
        sum((SELECT sum(size) FROM unnest(photo_sizes) AS size))::bigint AS bytes,
        coalesce(sum(cardinality(photo_paths) + num_nonnulls(menu_path, receipt_path)), 0)::bigint AS files
    FROM ingest.manifest WHERE batch_id = :batch_id
) m
CROSS JOIN (SELECT CAST(:files AS jsonb) AS files) AS given
WHERE b.id = :batch_id
RETURNING b.shards, b.recognitions, b.photos, b.bytes, b.files
