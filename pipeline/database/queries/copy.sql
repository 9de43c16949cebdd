-- COPY of a shard: documents and receipts.

-- name: copy_known
-- Copy what the database has already: what is known of the photos of a shard, and the menus that another shard of the
-- batch has, as most have that of the same day. It returns which menus those are.
WITH shard AS (
    SELECT * FROM ingest.manifest WHERE batch_id = :batch_id AND shard = :shard
), files AS (
    INSERT INTO raw.photos (batch_id, recognition_id, camera_number, captured_on, source_path, object_key,
        width, height, orientation, byte_size, sha256)
    SELECT batch_id, recognition_id, camera, captured_on, photo_paths[camera], object_keys[camera],
        widths[camera], heights[camera], orientations[camera], photo_sizes[camera], sha256s[camera]
    FROM shard
    CROSS JOIN (VALUES (1), (2)) AS cameras (camera)
    ORDER BY recognition_id, camera
)
INSERT INTO raw.menus (batch_id, shard, sha256, content)
SELECT :batch_id, :shard, wanted.sha256, known.content
FROM (SELECT DISTINCT menu_sha256 AS sha256 FROM shard) AS wanted
CROSS JOIN LATERAL (
    SELECT content FROM raw.menus WHERE batch_id = :batch_id AND sha256 = wanted.sha256 LIMIT 1
) AS known
RETURNING sha256

-- name: leave_out_copy
-- The photos are in the bucket already: the commit removes them. What discovery passed over stays so.
DELETE FROM raw.photos
WHERE batch_id = :batch_id AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]));
DELETE FROM ingest.notices
WHERE batch_id = :batch_id AND step <> 'discover' AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]));
UPDATE ingest.manifest SET rejected = true
WHERE batch_id = :batch_id AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]));
DELETE FROM ingest.claims
WHERE kind = 'load' AND batch_id = :batch_id AND recognition_id = ANY (CAST(:recognition_ids AS bigint[]))

-- name: notice_prices
-- Recognitions of a shard whose menu has a price that is none: the first such entry. Most are plain numbers, which the
-- first condition tells.
INSERT INTO ingest.notices (batch_id, recognition_id, path, code, message, step, shard)
SELECT m.batch_id, m.recognition_id, m.menu_path, 'price_unknown', 'entry ' || unknown.position || ' of the menu has the Price '
    || CASE WHEN length(unknown.price) > 60 THEN left(unknown.price, 60) || '…' || right(unknown.price, 1)
        ELSE unknown.price END || ', which is no amount', 'copy', m.shard
FROM (
    SELECT DISTINCT ON (u.sha256) u.sha256, entry.position, (entry.item -> 'Price')::text AS price
    FROM raw.menus u
    CROSS JOIN LATERAL jsonb_array_elements(ingest.array_of(u.content)) WITH ORDINALITY AS entry (item, position)
    WHERE u.batch_id = :batch_id AND u.shard = :shard AND entry.item ->> 'Price' !~ '^[0-9]{1,7}([.][0-9]{1,2})?$'
        AND ingest.price_of(entry.item -> 'Price') IS NULL
    ORDER BY u.sha256, entry.position
) unknown
JOIN ingest.manifest m ON m.menu_sha256 = unknown.sha256
WHERE m.batch_id = :batch_id AND m.shard = :shard AND NOT m.rejected
ORDER BY m.recognition_id

-- name: list_documents
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
