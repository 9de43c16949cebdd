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

-- name: list_manifest
SELECT recognition_id, photo_paths, photo_sizes, photo_mtimes, object_keys,
    menu_path, menu_size, menu_mtime, receipt_path, receipt_size, receipt_mtime
FROM ingest.manifest
WHERE batch_id = :batch_id AND shard = :shard
ORDER BY recognition_id::text COLLATE "C"

-- name: update_manifest_facts
UPDATE ingest.manifest m
SET widths = f.widths, heights = f.heights, orientations = f.orientations, sha256s = f.sha256s, md5s = f.md5s,
    menu_sha256 = f.menu_sha256, receipt_sha256 = f.receipt_sha256
FROM pg_temp.facts f
WHERE m.batch_id = :batch_id AND m.shard = :shard AND m.recognition_id = f.recognition_id
