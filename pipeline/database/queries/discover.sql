-- Discovery of a dataset: folders in temporary tables, then batch, claims and manifest.

-- name: add_found
-- Recognitions that are there and that no finished batch has: they stay as they are.
INSERT INTO pg_temp.found (recognition_id, path, code, message, is_notice)
SELECT recognition_id, paths[1], 'not_adopted', :message, true FROM pg_temp.candidates WHERE of_others;
-- Recognitions that were loaded from this source and are not in a folder that cannot be read.
INSERT INTO pg_temp.found (recognition_id, path, code, message, is_notice)
SELECT r.id, regexp_replace(m.photo_paths[1], '(/photos)?/[^/]*$', '', 'i'), 'folder_vanished', 'the folder is gone from the dataset; what was loaded of it stays', true
FROM ingest.batches b
JOIN ingest.manifest m ON m.batch_id = b.id
JOIN public.recognitions r ON r.id = m.recognition_id AND r.batch_id = b.id
WHERE b.kind = 'load' AND b.source = :source
    AND NOT EXISTS (SELECT FROM pg_temp.candidates c WHERE c.recognition_id = r.id)
    AND NOT EXISTS (
        SELECT FROM pg_temp.found f
        WHERE f.code IS NOT NULL AND NOT f.is_notice AND starts_with(m.photo_paths[1], f.path || '/')
    )

-- name: add_other_source
-- What is loaded anew, and was loaded from another source.
INSERT INTO pg_temp.found (recognition_id, path, code, message, is_notice)
SELECT s.recognition_id, regexp_replace(s.photo_paths[1], '(/photos)?/[^/]*$', '', 'i'), 'other_source',
    'the recognition is loaded anew, since it differs from what batch ' || b.id || ' loaded from ' || b.source, true
FROM pg_temp.staged s
JOIN ingest.batches b ON b.id = s.former
WHERE s.changed AND b.source <> :source AND NOT b.adopted

-- name: create_candidates
ANALYZE pg_temp.found;
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
) known;
CREATE UNIQUE INDEX candidates_recognition ON pg_temp.candidates (recognition_id);
-- Without it, each page of list_candidates is a sort of all that follow.
ANALYZE pg_temp.candidates

-- name: insert_claims
ANALYZE pg_temp.staged;
-- The primary key decides between two discoveries at once; in order, so that they cannot wait for each other.
INSERT INTO ingest.claims (kind, recognition_id, batch_id)
SELECT :kind, s.recognition_id, :batch_id FROM pg_temp.staged s ORDER BY s.recognition_id
ON CONFLICT (kind, recognition_id) DO NOTHING

-- name: count_beyond
SELECT count(*) AS beyond
FROM pg_temp.candidates
WHERE recognition_id > :after AND NOT loaded AND NOT of_others AND holder IS NULL

-- name: count_changed
-- Of how many recognitions the files are no longer what was loaded, and how many files those are.
SELECT count(*) AS changed, coalesce(sum(cardinality(photo_paths) + num_nonnulls(menu_path, receipt_path)), 0)::bigint AS files
FROM pg_temp.staged
WHERE changed

-- name: count_found
-- What the dataset holds, and why some of it is not taken. A folder whose number or name cannot be used is a recognition.
SELECT count(*) + (
        SELECT count(*) FROM pg_temp.found WHERE NOT is_notice AND code IN ('id_invalid', 'path_encoding')
    ) AS found,
    coalesce(sum(cardinality(paths) - 1), 0)::bigint AS superseded_copies,
    count(*) FILTER (WHERE loaded) AS already_loaded,
    count(*) FILTER (WHERE NOT loaded AND NOT of_others AND holder IS NOT NULL) AS held_elsewhere,
    coalesce(array_agg(DISTINCT holder) FILTER (WHERE holder IS NOT NULL), '{}') AS held_by
FROM pg_temp.candidates

-- name: count_found_notices
SELECT code, count(*) AS notices FROM pg_temp.found WHERE is_notice GROUP BY code ORDER BY code

-- name: count_found_rejects
SELECT code, count(*) AS rejects FROM pg_temp.found WHERE code IS NOT NULL AND NOT is_notice AND taken GROUP BY code ORDER BY code

-- name: count_retried
-- What an upload or a copy rejected, and a load tries again.
SELECT count(*) AS retried, coalesce(sum(size), 0)::bigint AS retried_bytes
FROM pg_temp.staged s
CROSS JOIN LATERAL (SELECT sum(one) AS size FROM unnest(s.photo_sizes) AS one) photos
WHERE EXISTS (
    SELECT FROM pg_temp.earlier e
    WHERE e.recognition_id = s.recognition_id AND NOT e.is_notice AND e.step <> 'discover')

-- name: count_staged
SELECT count(*) AS staged FROM pg_temp.staged

-- name: create_documents
CREATE TEMP TABLE IF NOT EXISTS documents (recognition_id bigint NOT NULL, receipt jsonb, menu jsonb) ON COMMIT DROP

-- name: mark_over
-- What earlier looks had and the newest since then still had: notices of this source, and rejects wherever the dataset was.
-- A look inspects its own source, and of what a batch loaded only the folders.
CREATE TEMP TABLE earlier ON COMMIT DROP AS
SELECT n.id, n.batch_id, true AS is_notice, n.recognition_id, ingest.content_of(true, n.path, n.code, n.message) AS content, n.path, n.step,
    NULL AS identity, n.code ~ '^folder_' OR NOT EXISTS (
        SELECT FROM ingest.manifest m WHERE m.batch_id = n.batch_id AND m.recognition_id = n.recognition_id) AS is_inspected
FROM ingest.looks l
JOIN ingest.notices n ON n.batch_id = l.batch_id
WHERE l.kind = :kind AND l.source = :source AND n.step IN ('discover', 'transform') AND n.over_at IS NULL
UNION ALL
SELECT r.id, r.batch_id, false, r.recognition_id, ingest.content_of(false, r.path, r.code, r.message), r.path, r.step, r.identity,
    b.source = :source
FROM ingest.batches b
JOIN ingest.rejects r ON r.batch_id = b.id
WHERE b.kind = :kind AND r.over_at IS NULL;
ANALYZE pg_temp.earlier, pg_temp.found;
-- What an earlier look at the source had and this one no longer finds. The commit decides on what an upload, a copy or a
-- commit found of what is loaded again, with files of the same size.
WITH gone AS MATERIALIZED (
    SELECT e.id, e.is_notice
    FROM pg_temp.earlier e
    WHERE e.is_inspected
        AND NOT EXISTS (
            SELECT FROM pg_temp.found f
            WHERE f.content = e.content AND f.is_notice = e.is_notice AND f.recognition_id IS NOT DISTINCT FROM e.recognition_id)
        AND NOT EXISTS (
            SELECT FROM pg_temp.staged s
            WHERE s.recognition_id = e.recognition_id AND e.step <> 'discover'
                AND (e.identity IS NULL OR ingest.sizes_of(e.identity) = ingest.sizes_of(s.identity)))
        AND NOT EXISTS (
            SELECT FROM pg_temp.passed_by p
            WHERE p.recognition_id = e.recognition_id AND (p.batch_id IS NULL OR p.batch_id = e.batch_id))
        AND NOT EXISTS (
            SELECT FROM pg_temp.found f WHERE f.code = 'folder_unreadable' AND starts_with(e.path, f.path || '/'))
), notices AS (
    UPDATE ingest.notices SET over_at = clock_timestamp() WHERE id = ANY (ARRAY(SELECT id FROM gone WHERE is_notice))
)
UPDATE ingest.rejects SET over_at = clock_timestamp() WHERE id = ANY (ARRAY(SELECT id FROM gone WHERE NOT is_notice))

-- name: create_found
-- Folders of recognitions, whose code is NULL, rejects and notices; a lower rank is a newer export.
CREATE TEMP TABLE found (
    number bigint, -- of the entry of an annotations file
    recognition_id bigint,
    path text NOT NULL,
    code text,
    message text,
    is_notice boolean NOT NULL DEFAULT false,
    taken boolean NOT NULL DEFAULT true, -- false for a reject of what changed and stays as it is
    rank integer NOT NULL DEFAULT 0,
    content text GENERATED ALWAYS AS (ingest.content_of(is_notice, path, code, message)) STORED
) ON COMMIT DROP

-- name: create_passed_by
-- Recognitions that this look did not inspect: held by other batches, beyond the limit, or changed and not taken. Only
-- what `batch_id` recorded of one is not looked at where that is not NULL.
CREATE TEMP TABLE passed_by ON COMMIT DROP AS
SELECT recognition_id, NULL::text AS batch_id
FROM pg_temp.candidates
WHERE holder IS NOT NULL OR (NOT loaded AND NOT of_others AND recognition_id > :last)
UNION SELECT recognition_id, NULL FROM pg_temp.staged WHERE changed AND NOT :changed
UNION SELECT recognition_id, NULL FROM pg_temp.found WHERE NOT taken

-- name: create_staged
CREATE TEMP TABLE staged (
    recognition_id bigint PRIMARY KEY,
    captured_on date,
    identity text,
    changed boolean NOT NULL, -- since it was loaded, as the batch that is in `former`
    former text,
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
USING pg_temp.staged s, public.recognitions r
WHERE c.batch_id = :batch_id AND NOT :force AND s.recognition_id = c.recognition_id AND r.id = c.recognition_id
    AND (NOT s.changed OR r.batch_id IS DISTINCT FROM s.former);
SELECT count(*) AS claims FROM ingest.claims WHERE batch_id = :batch_id

-- name: drop_changed
DELETE FROM pg_temp.staged WHERE changed

-- name: drop_known
-- What the previous look had is not told again, but for notices of a forced load, and of what is loaded anew, since each
-- version has its notices.
WITH known AS (
    DELETE FROM pg_temp.found f
    USING (SELECT DISTINCT is_notice, recognition_id, content FROM pg_temp.earlier) e
    WHERE e.content = f.content AND e.is_notice = f.is_notice AND e.recognition_id IS NOT DISTINCT FROM f.recognition_id
        AND NOT (f.is_notice AND (:force OR EXISTS (
            SELECT FROM pg_temp.staged s WHERE s.recognition_id = f.recognition_id)))
    RETURNING f.is_notice
)
SELECT count(*) FILTER (WHERE NOT is_notice) AS rejects FROM known

-- name: drop_known_staged
-- Of a page: what an upload or a copy rejected, and is what it was then. It is a reject of this look.
WITH known AS (
    DELETE FROM pg_temp.staged s
    USING ingest.rejects e
    WHERE s.recognition_id > :after AND e.recognition_id = s.recognition_id AND e.identity = s.identity AND e.over_at IS NULL
    RETURNING s.recognition_id, e.path, e.code, e.message,
        cardinality(photo_paths) + num_nonnulls(menu_path, receipt_path) AS files
), rejected AS (
    INSERT INTO pg_temp.found (recognition_id, path, code, message)
    SELECT recognition_id, path, code, message FROM known
)
SELECT count(*) AS recognitions, coalesce(sum(files), 0)::bigint AS files FROM known

-- name: drop_not_taken
-- Rejects of what changed and is not taken, which a load that takes it would tell.
WITH dropped AS (
    DELETE FROM pg_temp.found WHERE NOT taken RETURNING coalesce(number, recognition_id) AS input
)
SELECT count(DISTINCT input) AS changed FROM dropped

-- name: drop_in_use
-- Their photos are not sent; their files are not taken.
WITH in_use AS MATERIALIZED (
    SELECT f.recognition_id, :in_use || string_agg(format('%s.%s (%s row%s)', n.nspname, c.relname, f.referencing, left('s', (f.referencing <> 1)::integer)),
        ', ' ORDER BY n.nspname || '.' || c.relname) AS message
    FROM ingest.find_in_use(:batch_id) f
    JOIN pg_class c ON c.oid = f.app
    JOIN pg_namespace n ON n.oid = c.relnamespace
    GROUP BY f.recognition_id
), left_out AS (
    DELETE FROM pg_temp.staged s USING in_use u
    WHERE s.recognition_id = u.recognition_id
    RETURNING s.recognition_id, s.photo_paths[1] AS path, u.message
)
INSERT INTO pg_temp.found (recognition_id, path, code, message, is_notice)
SELECT recognition_id, regexp_replace(path, '(/photos)?/[^/]*$', '', 'i'), 'in_use', message, true FROM left_out

-- name: insert_batch
INSERT INTO ingest.batches (id, kind, state, source, recognition_limit, force, changed, strict, bucket,
    bucket_created_at, coordinates, exif_turned, found, already_loaded, held_elsewhere, held_by, superseded_copies, beyond_limit,
    held_reason)
VALUES (:batch_id, :kind, 'loading', :source, :limit, :force, :changed, :strict, :bucket,
    :bucket_created_at, :coordinates, :exif_turned, :found, :already_loaded, :held_elsewhere, :held_by, :superseded_copies, :beyond_limit,
    :held_reason)
ON CONFLICT (id) DO UPDATE
    SET kind = excluded.kind, state = 'loading', source = excluded.source,
        recognition_limit = excluded.recognition_limit, force = excluded.force,
        changed = excluded.changed, strict = excluded.strict,
        bucket = excluded.bucket, bucket_created_at = excluded.bucket_created_at,
        coordinates = excluded.coordinates, exif_turned = excluded.exif_turned, found = excluded.found,
        already_loaded = excluded.already_loaded, held_elsewhere = excluded.held_elsewhere, held_by = excluded.held_by,
        superseded_copies = excluded.superseded_copies, beyond_limit = excluded.beyond_limit, held_reason = excluded.held_reason,
        released_at = NULL, version = NULL, created_at = clock_timestamp(), finished_at = NULL, reset_at = NULL,
        adopted = false, adopted_from = NULL, metrics = '{}'
    WHERE batches.state = 'reset'
RETURNING id

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

-- name: insert_look
INSERT INTO ingest.looks (batch_id, kind, source, bucket, batch_made, found, already_loaded, changed, rejected,
    known_rejects, newest, seen)
VALUES (:batch_id, :kind, :source, :bucket, :batch_made, :found, :already_loaded, :changed, :rejected, :known_rejects,
    :newest, CAST(:seen AS jsonb))
ON CONFLICT (batch_id) DO UPDATE
    SET kind = excluded.kind, source = excluded.source, bucket = excluded.bucket, looked_at = clock_timestamp(),
        batch_made = excluded.batch_made, found = excluded.found, already_loaded = excluded.already_loaded,
        changed = excluded.changed, rejected = excluded.rejected, known_rejects = excluded.known_rejects,
        newest = excluded.newest, seen = excluded.seen

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
WHERE code IS NOT NULL AND NOT is_notice AND taken
ORDER BY path COLLATE "C"
LIMIT :count

-- name: list_left
-- The recognitions that are not inspected as new: loaded, held by another batch, of others, or beyond the limit; and the
-- files that were loaded, or that an earlier look found equal, empty where another tool loaded them. OFFSET 0: each is a
-- look-up in an index; a merge join would begin with the first recognition for each page.
SELECT c.recognition_id, c.paths, c.loaded, c.holder, r.batch_id AS former, r.captured_on,
    coalesce(own.seen, adopted.seen) AS identity
FROM (
    SELECT recognition_id, paths, loaded, holder
    FROM pg_temp.candidates
    WHERE recognition_id > :after AND (loaded OR of_others OR holder IS NOT NULL OR recognition_id > :last)
    ORDER BY recognition_id
    LIMIT :count
) c
LEFT JOIN LATERAL (
    SELECT one.id, one.batch_id, one.captured_on
    FROM public.recognitions one WHERE one.id = c.recognition_id OFFSET 0
) r ON true
LEFT JOIN LATERAL (
    SELECT coalesce(m.seen, ingest.identity_of(m)) AS seen
    FROM ingest.manifest m WHERE m.batch_id = r.batch_id AND m.recognition_id = r.id OFFSET 0
) own ON true
LEFT JOIN LATERAL (
    SELECT coalesce(a.seen, '') AS seen
    FROM ingest.manifest a
    WHERE own.seen IS NULL AND a.recognition_id = r.id AND a.photo_paths = '{}' AND a.cameras IS NULL
    LIMIT 1
) adopted ON true
ORDER BY c.recognition_id

-- name: list_other_documents
-- Adopted recognitions whose receipt, or menu where the app has a table of entries, is not that of pg_temp.documents.
WITH d AS (
    DELETE FROM pg_temp.documents RETURNING *
)
SELECT d.recognition_id
FROM d
WHERE ARRAY(
        SELECT ingest.meaning_of(ingest.quantity_of(l.line -> 'Count'), ingest.options_of(l.line -> 'Dishes'))
        FROM jsonb_array_elements(ingest.array_of(d.receipt)) AS l (line)
        ORDER BY 1)
    <> ARRAY(
        SELECT ingest.meaning_of(l.quantity, coalesce((
            SELECT jsonb_agg(jsonb_build_array(o.external_id, o.name))
            FROM public.recipe_line_options o WHERE o.recipe_line_id = l.id), '[]'))
        FROM public.recipes p
        JOIN public.recipe_lines l ON l.recipe_id = p.id
        WHERE p.recognition_id = d.recognition_id
        ORDER BY 1)
    OR ingest.has_menu_table() AND ARRAY(
        SELECT DISTINCT ON (i.item ->> 'ExternalId')
            jsonb_build_array(i.item ->> 'ExternalId', coalesce(i.item ->> 'Name', ''))
        FROM jsonb_array_elements(ingest.array_of(d.menu)) WITH ORDINALITY AS i (item, position)
        ORDER BY i.item ->> 'ExternalId', i.position)
    <> ARRAY(
        SELECT jsonb_build_array(e.external_id, e.name)
        FROM public.recognition_active_menu_items e
        WHERE e.recognition_id = d.recognition_id
        ORDER BY e.external_id)

-- name: list_present
-- The inputs to load whose recognition is there already. OFFSET 0 as above.
SELECT s.recognition_id, s.receipt_path, s.receipt_size, s.receipt_mtime
FROM pg_temp.staged s
WHERE s.recognition_id > :after AND EXISTS (SELECT FROM public.recognitions r WHERE r.id = s.recognition_id OFFSET 0)
ORDER BY s.recognition_id
LIMIT :count

-- name: list_recorded
-- What is on record of recognitions: in the batch whose version readers see, or in that of another tool.
SELECT r.id AS recognition_id, m.batch_id, m.photo_paths = '{}' AS adopted, m.photo_sizes, m.sha256s, m.md5s,
    m.menu_sha256, m.receipt_sha256, m.captured_on, m.seen
FROM public.recognitions r
CROSS JOIN LATERAL (
    SELECT f.*
    FROM ingest.manifest f
    JOIN ingest.batches b ON b.id = f.batch_id
    WHERE f.recognition_id = r.id AND b.kind = 'load' AND b.state = 'done' AND (f.batch_id = r.batch_id OR b.adopted)
    ORDER BY f.batch_id IS DISTINCT FROM r.batch_id, b.version DESC
    LIMIT 1
) m
WHERE r.id = ANY (CAST(:recognition_ids AS bigint[])) AND ingest.is_on_record(r.id)

-- name: list_near_notices
-- What explains that no recognition was found.
SELECT path, message
FROM pg_temp.found
WHERE is_notice AND code IN ('folder_name', 'folder_nested', 'file_archive')
ORDER BY path COLLATE "C"
LIMIT :count

-- name: create_remembered
CREATE TEMP TABLE remembered (batch_id text, recognition_id bigint, identity text) ON COMMIT DROP

-- name: remember_seen
UPDATE ingest.manifest m
SET seen = u.identity
FROM pg_temp.remembered u
WHERE m.batch_id = u.batch_id AND m.recognition_id = u.recognition_id AND m.seen IS DISTINCT FROM u.identity

-- name: sample_manifest
-- Some photos of a shard as discovery saw them.
SELECT photo_paths, photo_sizes, photo_mtimes
FROM ingest.manifest
WHERE batch_id = :batch_id AND shard = :shard
LIMIT :count

-- name: update_batch_counts
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
WHERE b.id = :batch_id;
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
RETURNING b.shards, b.recognitions, b.photos, b.bytes, b.files, b.already_loaded, b.held_elsewhere, b.held_by
