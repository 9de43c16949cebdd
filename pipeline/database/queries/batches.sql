-- Batches, markers, locks, and what is told of them.

-- name: count_marked
-- How many recognitions there are, and of how many the shard has the marker of a step.
SELECT count(*) AS total,
    count(*) FILTER (WHERE EXISTS (
        SELECT FROM ingest.batch_state s WHERE s.batch_id = m.batch_id AND s.step = :step AND s.shard = m.shard
    )) AS marked
FROM ingest.manifest m
WHERE m.batch_id = :batch_id

-- name: count_markers
SELECT count(*) AS done FROM ingest.batch_state WHERE batch_id = :batch_id AND step = :step

-- name: count_new_versions
-- The recognitions of a batch that another one has already.
SELECT count(*) AS recognitions
FROM ingest.manifest m
CROSS JOIN LATERAL ingest.newest_version(m.recognition_id, m.batch_id) former (batch_id)
WHERE m.batch_id = :batch_id AND NOT m.rejected AND former.batch_id IS NOT NULL

-- name: count_notices
SELECT code, count(*) AS notices FROM ingest.notices WHERE batch_id = :batch_id GROUP BY code ORDER BY code

-- name: count_processed
-- What the shards with the marker of a step have.
SELECT s.step, count(*) AS recognitions, sum(cardinality(m.photo_paths))::bigint AS images
FROM ingest.batch_state s
JOIN ingest.manifest m ON m.batch_id = s.batch_id AND m.shard = s.shard
WHERE s.batch_id = :batch_id
GROUP BY s.step

-- name: count_rejects
SELECT code, count(*) AS rejects FROM ingest.rejects WHERE batch_id = :batch_id GROUP BY code ORDER BY code

-- name: count_rows
SELECT
    (SELECT count(*) FROM public.recognitions) AS recognitions,
    (SELECT count(*) FROM public.images) AS images,
    (SELECT count(*) FROM public.menus) AS menus,
    (SELECT count(*) FROM public.menu_items) AS menu_items,
    (SELECT count(*) FROM public.recipes) AS recipes,
    (SELECT count(*) FROM public.recipe_lines) AS recipe_lines,
    (SELECT count(*) FROM public.recipe_line_options) AS recipe_line_options,
    (SELECT count(*) FROM public.initial_tray_items) AS initial_tray_items,
    (SELECT count(*) FROM public.initial_annotations) AS initial_annotations

-- name: count_recognitions
SELECT count(*) AS recognitions FROM ingest.manifest WHERE batch_id = :batch_id AND shard = ANY (CAST(:shards AS integer[]))

-- name: delete_claims_rejected
DELETE FROM ingest.claims
WHERE kind = :kind AND batch_id = :batch_id AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]))

-- name: delete_marker
DELETE FROM ingest.batch_state WHERE batch_id = :batch_id AND step = :step AND shard = :shard

-- name: delete_told
DELETE FROM ingest.notifications WHERE command = :command AND problem = ANY (CAST(:problems AS text[]))

-- name: describe_batch
-- A batch, as its summary names its columns.
SELECT id AS batch_id, kind, state, source, recognition_limit AS "limit", force, changed, strict, bucket, coordinates,
    exif_turned, true AS batch_made, coalesce(changed_since_load, 0) AS changed_since_load,
    coalesce(known_rejects, 0) AS known_rejects, version, created_at, finished_at, reset_at, held_reason, released_at, shards, found, already_loaded, held_elsewhere,
    held_by, superseded_copies, beyond_limit, bytes, adopted, adopted_from,
    recognitions AS recognitions_processed, photos AS images_processed, detections AS detections_processed,
    ingest.files_of(b) AS files
FROM ingest.batches b
LEFT JOIN (
    SELECT batch_id AS look_id, changed AS changed_since_load, known_rejects FROM ingest.looks
) look ON look_id = id
WHERE id = :batch_id

-- name: describe_newest
-- How many batches there are, and how old what readers see is.
SELECT (SELECT count(*) FROM ingest.batches) AS batches,
    (SELECT max(captured_on) FROM public.recognitions) AS captured_on,
    (SELECT max(finished_at) FROM ingest.batches WHERE state = 'done') AS finished_at

-- name: end_backend
-- End a connection that its client lost: the server itself would notice after a minute.
SELECT pg_terminate_backend(pid) AS ended
FROM pg_stat_activity
WHERE pid = :pid AND backend_start = :backend_start AND application_name = :application

-- name: find_backend
-- The server's process for this connection, as long as the transaction is open.
SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()

-- name: find_batch
SELECT id, kind, state, source, recognition_limit AS "limit", force, changed, bucket, bucket_created_at, coordinates,
    exif_turned, shards, recognitions, photos, created_at, reset_at, held_reason, released_at, adopted, metrics,
    EXISTS (SELECT FROM ingest.batch_state s WHERE s.batch_id = b.id AND s.step = 'load' AND s.shard = 0) AS marked,
    clock_timestamp() AS now
FROM ingest.batches b
WHERE id = :batch_id

-- name: find_look
SELECT * FROM ingest.looks WHERE batch_id = :batch_id

-- name: find_marker
-- A look that found nothing to load completes all steps.
SELECT EXISTS (
    SELECT FROM ingest.batch_state WHERE batch_id = :batch_id AND step = :step AND shard = :shard
) OR :shard = 0 AND EXISTS (
    SELECT FROM ingest.looks WHERE batch_id = :batch_id AND NOT batch_made
) AS done

-- name: find_newest_done
-- A look is no longer true once a batch of its source is reset: what that one loaded is to be loaded again.
SELECT l.*
FROM ingest.looks l
LEFT JOIN ingest.batches b ON b.id = l.batch_id
WHERE l.kind = :kind AND l.source = :source AND (l.kind <> 'load' OR l.bucket = :bucket)
    AND l.seen @> CAST(:options AS jsonb) AND (NOT l.batch_made OR b.state = 'done')
    AND NOT EXISTS (
        SELECT FROM ingest.batches r
        WHERE r.kind = l.kind AND r.source = l.source AND (r.state = 'resetting' OR r.reset_at > l.looked_at))
ORDER BY l.looked_at DESC
LIMIT 1

-- name: find_photo
SELECT storage_path AS key FROM public.images LIMIT 1

-- name: find_project
-- Which database of which server this is: the same for everybody, by whatever address or pooler they come.
SELECT left(md5(system_identifier || '/' || current_database()), 8) AS id FROM pg_control_system()

-- name: find_unfinished
-- The newest unfinished batch that the same command would have made.
SELECT id
FROM ingest.batches
WHERE state = 'loading' AND kind = :kind AND source = :source AND force = :force AND changed = :changed
    AND (kind <> 'load' OR bucket = :bucket) AND coordinates = :coordinates AND exif_turned = :exif_turned
    AND recognition_limit IS NOT DISTINCT FROM CAST(:limit AS bigint)
ORDER BY created_at DESC, id DESC
LIMIT 1

-- name: hold_batch
-- Keep a reset, or the commit, from passing while a shard's transaction is open.
SELECT id FROM ingest.batches WHERE id = :batch_id FOR SHARE

-- name: insert_marker
INSERT INTO ingest.batch_state (batch_id, step, shard, started_at, worker, metrics)
VALUES (:batch_id, :step, :shard, :started_at, :worker, CAST(:metrics AS jsonb))

-- name: insert_told
INSERT INTO ingest.notifications (command, problem)
SELECT :command, unnest(CAST(:problems AS text[]))
ON CONFLICT DO NOTHING

-- name: is_taken
-- Whether a batch or a look has an id.
SELECT EXISTS (SELECT FROM ingest.batches WHERE id = :batch_id)
    OR EXISTS (SELECT FROM ingest.looks WHERE batch_id = :batch_id) AS taken

-- name: list_batches
-- All or the unfinished batches, those that changed last first, as the status names their columns.
SELECT id AS batch_id, kind, state, source, recognition_limit AS "limit", force, changed, coordinates, exif_turned, recognitions,
    bytes, detections, created_at, finished_at, reset_at, held_reason, adopted
FROM ingest.batches
WHERE state IN ('loading', 'held', 'resetting') OR NOT :unfinished
ORDER BY coalesce(reset_at, finished_at, created_at) DESC, id DESC
LIMIT :count

-- name: list_last_loads
-- The last finished batch of each kind.
SELECT DISTINCT ON (kind) kind, id AS batch_id, finished_at, recognitions
FROM ingest.batches
WHERE state = 'done' AND NOT adopted
ORDER BY kind, version DESC

-- name: list_looks
-- The last look at a source of each kind, its age, the mean time between it and the five before it, and the whole of that.
SELECT DISTINCT ON (l.kind) l.*, extract(epoch FROM clock_timestamp() - l.looked_at)::float8 AS age_seconds,
    recent.interval_seconds, recent.span_seconds
FROM ingest.looks l
JOIN (
    SELECT kind, extract(epoch FROM avg(gap))::float8 AS interval_seconds,
        extract(epoch FROM sum(gap))::float8 AS span_seconds
    FROM (
        SELECT kind, looked_at - lag(looked_at) OVER (PARTITION BY kind ORDER BY looked_at) AS gap,
            row_number() OVER (PARTITION BY kind ORDER BY looked_at DESC) AS nth
        FROM ingest.looks
    ) one
    WHERE nth <= 5
    GROUP BY kind
) recent ON recent.kind = l.kind
ORDER BY l.kind, l.looked_at DESC

-- name: list_marked
SELECT step, shard FROM ingest.batch_state WHERE batch_id = :batch_id

-- name: list_markers
SELECT step, shard, started_at, finished_at, worker, metrics
FROM ingest.batch_state
WHERE batch_id = :batch_id
ORDER BY started_at, step, shard

-- name: list_pending_shards
-- Those of the given shards without a marker. The planner counts the array: a few are looked up one by one.
SELECT s.shard
FROM unnest(CAST(:shards AS integer[])) AS s (shard)
WHERE NOT EXISTS (
    SELECT FROM ingest.batch_state m WHERE m.batch_id = :batch_id AND m.step = :step AND m.shard = s.shard
)
ORDER BY s.shard

-- name: list_notices
SELECT recognition_id, path, code, message, step
FROM ingest.notices
WHERE batch_id = :batch_id
ORDER BY id
LIMIT :count

-- name: list_rejects
SELECT recognition_id, path, code, message, step
FROM ingest.rejects
WHERE batch_id = :batch_id
ORDER BY id
LIMIT :count

-- name: list_running
-- Batches that a run is loading now: it holds the lock of try_lock_run. A key of 64 bits is in pg_locks as two
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

-- name: list_states
-- The unfinished batches of a kind.
SELECT id, state FROM ingest.batches WHERE state IN ('loading', 'held', 'resetting') AND kind LIKE :kind

-- name: list_told
SELECT problem FROM ingest.notifications WHERE command = :command

-- name: list_unfinished
SELECT id, kind, state, source, recognition_limit AS "limit", force, changed, bucket, bucket_created_at, coordinates,
    exif_turned, shards, recognitions, photos, created_at, reset_at, held_reason, released_at, adopted, metrics, false AS marked,
    clock_timestamp() AS now
FROM ingest.batches
WHERE state IN ('loading', 'held', 'resetting')
ORDER BY created_at, id

-- name: list_photos_of_others
-- Some photos that no batch sent: of the oldest and the newest of the project, so that its size does not matter.
SELECT i.storage_path AS key
FROM (
    (SELECT id, recognition_id, storage_path FROM public.images ORDER BY id LIMIT 100)
    UNION
    (SELECT id, recognition_id, storage_path FROM public.images ORDER BY id DESC LIMIT 100)
) i
WHERE NOT EXISTS (
    SELECT FROM ingest.manifest m JOIN ingest.batches b ON b.id = m.batch_id
    WHERE m.recognition_id = i.recognition_id AND i.storage_path = ANY (m.object_keys) AND NOT b.adopted)
ORDER BY i.id
LIMIT :count

-- name: list_other_buckets
-- Where the photos of finished batches are that are not in the configured bucket.
SELECT bucket, count(*) AS batches, min(id) AS batch_id
FROM ingest.batches
WHERE kind = 'load' AND state = 'done' AND bucket <> :bucket AND recognitions > 0
GROUP BY bucket
ORDER BY bucket

-- name: list_recorded_buckets
-- A batch for each bucket of a name that objects were sent to.
SELECT DISTINCT ON (bucket_created_at) id, bucket_created_at
FROM ingest.batches
WHERE kind = 'load' AND bucket = :bucket AND state <> 'reset'

-- name: lock_absent
-- Where there is no batch of an id, keep discovery from making one: it holds this lock of its step.
SELECT pg_advisory_xact_lock(hashtextextended('pipeline.step:' || :batch_id || '/discover/0', 0))
WHERE NOT EXISTS (SELECT FROM ingest.batches WHERE id = :batch_id)

-- name: lock_batch
SELECT id FROM ingest.batches WHERE id = :batch_id FOR UPDATE

-- name: lock_commits
-- One batch commits at a time: versions follow the order of commits. That of a large batch takes minutes. The number
-- spells "comm".
SELECT set_config('pipeline.lock_timeout', current_setting('lock_timeout'), true), set_config('lock_timeout', '1h', true);
SELECT pg_advisory_xact_lock(1668246893);
SELECT set_config('lock_timeout', current_setting('pipeline.lock_timeout'), true)

-- name: lock_step
-- Whoever writes a marker, or removes what its absence allows to remove, goes alone until the end of the transaction.
SELECT pg_advisory_xact_lock(hashtextextended('pipeline.step:' || :batch_id || '/' || :step || '/' || :shard, 0))

-- name: now
SELECT clock_timestamp() AS now, current_setting('server_version_num')::int AS version

-- name: prefer_indexes
-- Until the end of the transaction: right after a bulk load there are no statistics yet, and a scan looks cheap. Small
-- samples are enough for temporary tables.
SELECT set_config('enable_seqscan', 'off', true), set_config('default_statistics_target', '10', true)

-- name: try_lock_alone
-- What removes something of a batch runs beside no other; a lock ends with its transaction.
SELECT CASE WHEN pg_try_advisory_xact_lock(hashtextextended('pipeline.batch:' || :batch_id, 0))
    THEN pg_try_advisory_xact_lock(hashtextextended('pipeline.array:' || :batch_id, 0)) ELSE false END AS locked

-- name: try_lock_array
-- The processes of an array run beside each other, and beside one run.
SELECT pg_try_advisory_xact_lock_shared(hashtextextended('pipeline.array:' || :batch_id, 0)) AS locked

-- name: try_lock_run
-- One run of a batch at a time.
SELECT pg_try_advisory_xact_lock(hashtextextended('pipeline.batch:' || :batch_id, 0)) AS locked

-- name: update_batch_metrics
UPDATE ingest.batches SET metrics = CAST(:metrics AS jsonb) WHERE id = :batch_id

-- name: update_batch_released
UPDATE ingest.batches SET state = 'loading', released_at = clock_timestamp() WHERE id = :batch_id
