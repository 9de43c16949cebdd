-- Upload: the manifest of a shard, and what the upload learned of it.

-- name: create_facts
CREATE TEMP TABLE facts (
    recognition_id bigint PRIMARY KEY,
    widths integer[],
    heights integer[],
    orientations smallint[],
    sha256s text[],
    md5s text[],
    menu_sha256 text,
    receipt_sha256 text
) ON COMMIT DROP

-- name: delete_manifest_rejected
DELETE FROM ingest.manifest
WHERE batch_id = :batch_id AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]))

-- name: delete_upload_notices
-- Of a former upload of the shard, which was rolled back.
DELETE FROM ingest.notices WHERE batch_id = :batch_id AND step = 'upload' AND shard = :shard

-- name: find_upload
-- Whether the upload of a shard is marked, and the recognitions that it has.
SELECT EXISTS (
        SELECT FROM ingest.batch_state WHERE batch_id = :batch_id AND step = 'upload' AND shard = :shard
    ) AS marked,
    ARRAY(SELECT recognition_id FROM ingest.manifest WHERE batch_id = :batch_id AND shard = :shard AND NOT rejected)
        AS recognition_ids

-- name: list_kept
-- The objects that the batch of an id has of recognitions. One that is being reset has none; nor has one that was started
-- at the time :invalid while the shard is not marked.
SELECT m.object_keys
FROM ingest.batches b
JOIN ingest.manifest m ON m.batch_id = b.id
WHERE b.id = :batch_id AND b.state <> 'resetting' AND NOT m.rejected
    AND m.recognition_id = ANY (CAST(:recognition_ids AS bigint[]))
    AND (b.created_at <> CAST(:invalid AS timestamptz) OR EXISTS (
        SELECT FROM ingest.batch_state s WHERE s.batch_id = b.id AND s.step = 'upload' AND s.shard = :shard)) IS NOT FALSE

-- name: list_manifest
-- In a batch that takes what changed, with the photos of the version that readers see: what did not change is copied.
SELECT m.recognition_id, m.photo_paths, m.photo_sizes, m.photo_mtimes, m.object_keys,
    m.menu_path, m.menu_size, m.menu_mtime, m.receipt_path, m.receipt_size, m.receipt_mtime,
    f.object_keys AS former_keys, coalesce(f.sha256s, '{NULL,NULL}') AS former_sha256s, coalesce(f.md5s, '{NULL,NULL}') AS former_md5s
FROM ingest.manifest m
JOIN ingest.batches b ON b.id = m.batch_id
LEFT JOIN LATERAL (
    SELECT k.object_keys, k.sha256s, k.md5s
    FROM ingest.newest_version(m.recognition_id, m.batch_id) newest (batch_id)
    JOIN ingest.manifest k ON k.batch_id = newest.batch_id AND k.recognition_id = m.recognition_id
    JOIN ingest.batches o ON o.id = k.batch_id AND (o.bucket, o.bucket_created_at) = (b.bucket, b.bucket_created_at)
) f ON b.changed
WHERE m.batch_id = :batch_id AND m.shard = :shard
ORDER BY m.recognition_id::text COLLATE "C"

-- name: note_rejected
-- What rejects of a shard are worth no second look until their files change; one that a limit of the machine, of Storage
-- or of the file system explains is looked at again.
UPDATE ingest.rejects r
SET identity = ingest.identity_of(m)
FROM ingest.manifest m
WHERE r.batch_id = :batch_id AND r.step = :step AND r.shard = :shard
    AND m.batch_id = r.batch_id AND m.recognition_id = r.recognition_id
    AND r.code !~ '_(vanished|changed|unreadable|too_large)$'

-- name: update_manifest_facts
UPDATE ingest.manifest m
SET widths = f.widths, heights = f.heights, orientations = f.orientations, sha256s = f.sha256s, md5s = f.md5s,
    menu_sha256 = f.menu_sha256, receipt_sha256 = f.receipt_sha256
FROM pg_temp.facts f
WHERE m.batch_id = :batch_id AND m.shard = :shard AND m.recognition_id = f.recognition_id
