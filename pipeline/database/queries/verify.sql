-- Verification: what has to be there, and statements that find a broken promise. They pass over recognitions that no
-- batch on record has: the app had them before, or another tool loaded them.

-- name: check_annotations
-- Each detection of the newest finished annotations that are for a photo is one annotation, and the model has no other.
-- Items without ordinal, or of other types, are of others.
SELECT coalesce(newest.batch_id, shown.batch_id) AS batch_id, 'recognition ' || i.recognition_id || ', camera ' || i.camera_number AS what,
    'has ' || found.annotations || ' annotations instead of ' || wanted.detections AS message
FROM public.images i
JOIN public.recognitions r ON r.id = i.recognition_id
JOIN LATERAL ingest.newest_version(r.id, '') shown (batch_id) ON true
LEFT JOIN LATERAL ingest.annotations_of_photo(
    i.recognition_id, i.camera_number, i.sha256, i.width, i.height, i.orientation, '') newest (batch_id) ON true
CROSS JOIN LATERAL (
    SELECT count(*) AS detections
    FROM raw.detections q
    WHERE q.batch_id = newest.batch_id AND q.recognition_id = i.recognition_id AND q.camera_number = i.camera_number
) wanted
CROSS JOIN LATERAL (
    SELECT count(*) AS annotations FROM public.initial_annotations a WHERE a.image_id = i.id AND a.source = 'MODEL'
) found
WHERE found.annotations <> wanted.detections
    -- Photos that no batch annotates have the annotations of the adopted version, if there is one.
    AND (newest.batch_id IS NOT NULL OR NOT ingest.was_adopted(r.id, ''))
UNION ALL
SELECT r.batch_id, 'tray item ' || i.id, 'is of the model, and no annotation shows it'
FROM public.initial_tray_items i
JOIN public.recognitions r ON r.id = i.recognition_id
JOIN ingest.batches shown ON shown.id = r.batch_id AND NOT shown.adopted
WHERE i.source = 'MODEL' AND i.item_type IN ('FOOD', 'PLATE') AND i.ordinal IS NOT NULL
    AND NOT EXISTS (SELECT FROM public.initial_annotations a WHERE a.initial_tray_item_id = i.id)

-- name: check_images
-- Each recognition has two images, and each image is the object that its batch has on record; of what was adopted, as
-- many as were there.
SELECT shown.id AS batch_id, 'recognition ' || r.id || ', camera ' || c AS what,
    CASE WHEN i.id IS NULL THEN 'has no image'
        ELSE 'names ' || i.storage_path || ', which is not what batch ' || shown.id || ' sent' END AS message
FROM public.recognitions r
JOIN LATERAL ingest.newest_version(r.id, '') newest (batch_id) ON true
JOIN ingest.batches shown ON shown.id = newest.batch_id
CROSS JOIN generate_series(1, 2) AS c
LEFT JOIN public.images i ON i.recognition_id = r.id AND i.camera_number = c
LEFT JOIN ingest.manifest m ON m.batch_id = shown.id AND m.recognition_id = r.id
WHERE CASE WHEN shown.adopted
    THEN m.object_keys[c] IS NOT NULL
        AND (i.storage_path, i.width, i.height) IS DISTINCT FROM (m.object_keys[c], m.widths[c], m.heights[c])
    ELSE i.id IS NULL OR (i.storage_path, i.byte_size, i.sha256, i.width, i.height)
        IS DISTINCT FROM (m.object_keys[c], m.photo_sizes[c], m.sha256s[c], m.widths[c], m.heights[c]) END

-- name: check_markers
-- A finished batch has all its markers and no claim; a batch that was reset has left nothing but its own row.
SELECT b.id AS batch_id, 'batch ' || b.id AS what, problem.message
FROM ingest.batches b
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE s.step IN ('discover', 'transform') AND s.shard = 0) AS whole,
        count(*) FILTER (WHERE s.step = 'upload') AS uploads, count(*) FILTER (WHERE s.step = 'copy') AS copies,
        count(*) AS markers
    FROM ingest.batch_state s WHERE s.batch_id = b.id
) m
CROSS JOIN LATERAL (
    SELECT 'is done and lacks a marker' AS message
    WHERE b.state = 'done'
        AND (m.whole <> 2 OR m.copies <> b.shards OR (b.kind = 'load' AND m.uploads <> b.shards))
    UNION ALL
    SELECT 'is reset and has markers left' WHERE b.state = 'reset' AND m.markers > 0
    UNION ALL
    SELECT 'is reset and has a manifest left'
    WHERE b.state = 'reset' AND EXISTS (SELECT FROM ingest.manifest f WHERE f.batch_id = b.id)
    UNION ALL
    SELECT 'is ' || b.state || ' and holds recognitions'
    WHERE b.state NOT IN ('loading', 'held') AND EXISTS (SELECT FROM ingest.claims c WHERE c.batch_id = b.id)
) problem

-- name: check_menus
-- Every menu is some recognition's.
SELECT NULL::text AS batch_id, 'menu ' || m.id AS what, 'belongs to no recognition' AS message
FROM public.menus m
WHERE NOT EXISTS (SELECT FROM public.recognitions r WHERE r.menu_id = m.id)

-- name: check_raw
-- The raw schema holds what finished batches have, and of unfinished ones what their markers say.
SELECT b.id AS batch_id, 'batch ' || b.id AS what,
    CASE WHEN b.recognitions <> b.wanted
        THEN 'recognitions in raw: ' || b.recognitions || ' instead of ' || b.wanted
        ELSE 'photos in raw: ' || b.photos || ' instead of ' || 2 * b.wanted END AS message
FROM (
    SELECT batch_id AS id, sum(recognitions) AS recognitions, sum(photos) AS photos, sum(wanted) AS wanted
    FROM (
        SELECT batch_id, count(*) AS recognitions, 0 AS photos, 0 AS wanted FROM raw.receipts GROUP BY batch_id
        UNION ALL
        SELECT batch_id, 0, count(*), 0 FROM raw.photos GROUP BY batch_id
        UNION ALL
        SELECT m.batch_id, 0, 0, count(*)
        FROM ingest.manifest m
        JOIN ingest.batch_state s ON s.batch_id = m.batch_id AND s.step = 'copy' AND s.shard = m.shard
        JOIN ingest.batches k ON k.id = m.batch_id AND k.kind = 'load' AND k.state <> 'resetting' AND NOT k.adopted
        WHERE NOT m.rejected
        GROUP BY m.batch_id
    ) counted
    GROUP BY batch_id
) b
WHERE b.recognitions <> b.wanted OR b.photos <> 2 * b.wanted
UNION ALL
SELECT q.batch_id, 'batch ' || q.batch_id, 'has annotations in raw, and is not there'
FROM (SELECT DISTINCT batch_id FROM raw.detections) q
LEFT JOIN ingest.batches b ON b.id = q.batch_id AND b.kind = 'qwen' AND b.state IN ('loading', 'held', 'done')
WHERE b.id IS NULL
UNION ALL
SELECT m.batch_id, 'batch ' || m.batch_id, 'has menus in raw, and is not there'
FROM (SELECT DISTINCT batch_id FROM raw.menus) m
LEFT JOIN ingest.batches b ON b.id = m.batch_id AND b.kind = 'load' AND b.state IN ('loading', 'held', 'done')
WHERE b.id IS NULL

-- name: check_receipts
-- Lines and their items are those of the receipt that the shown version has. Items without ordinal are of others; a person
-- may have changed the type of ours.
SELECT r.batch_id, 'recognition ' || r.id AS what,
    'has ' || found.lines || ' receipt lines with ' || found.items || ' items instead of ' || wanted.lines || ' with '
        || wanted.items AS message
FROM public.recognitions r
JOIN ingest.batches shown ON shown.id = r.batch_id AND NOT shown.adopted
CROSS JOIN LATERAL (
    SELECT count(*) AS lines, coalesce(sum(ingest.quantity_of(line -> 'Count')), 0) AS items
    FROM raw.receipts w CROSS JOIN jsonb_array_elements(ingest.array_of(w.receipt)) AS line
    WHERE w.batch_id = r.batch_id AND w.recognition_id = r.id
) wanted
CROSS JOIN LATERAL (
    SELECT
        (SELECT count(*) FROM public.recipes p JOIN public.recipe_lines l ON l.recipe_id = p.id
         WHERE p.recognition_id = r.id) AS lines,
        (SELECT count(*) FROM public.initial_tray_items i
         WHERE i.recognition_id = r.id AND i.source = 'RECIPE_LINE_OPTION' AND i.ordinal IS NOT NULL) AS items
) found
WHERE (found.lines, found.items) IS DISTINCT FROM (wanted.lines, wanted.items)

-- name: check_versions
-- Readers see each recognition in the version of the newest finished batch that holds it, and nothing else.
SELECT coalesce(newest.batch_id, r.batch_id) AS batch_id, 'recognition ' || coalesce(newest.recognition_id, r.id) AS what,
    CASE WHEN r.id IS NULL THEN 'is in finished batch ' || newest.batch_id || ' and not in the domain'
        WHEN newest.batch_id IS NULL THEN 'is in the domain and in no finished batch'
        ELSE 'is shown as batch ' || r.batch_id || ' has it, not as batch ' || newest.batch_id END AS message
FROM (
    SELECT DISTINCT ON (m.recognition_id) m.recognition_id, m.batch_id,
        CASE WHEN b.adopted THEN b.adopted_from ELSE b.id END AS shown_as
    FROM ingest.manifest m
    JOIN ingest.batches b ON b.id = m.batch_id
    WHERE b.kind = 'load' AND b.state = 'done'
    ORDER BY m.recognition_id, b.version DESC
) newest
FULL JOIN public.recognitions r ON r.id = newest.recognition_id
WHERE (r.id IS NULL OR newest.batch_id IS NULL OR coalesce(r.batch_id, '') <> coalesce(newest.shown_as, ''))
    AND (newest.batch_id IS NOT NULL OR EXISTS (SELECT FROM ingest.batches b WHERE b.id = r.batch_id))

-- name: list_expected
-- The objects that a shard of a finished batch has, in the order of their keys; named says that readers see them.
SELECT m.batch_id, m.object_keys[c] AS key, m.photo_paths[c] AS path, m.photo_sizes[c] AS size, m.sha256s[c] AS sha256,
    m.md5s[c] AS md5, coalesce(i.storage_path = m.object_keys[c], false) AS named
FROM ingest.manifest m
CROSS JOIN generate_series(1, 2) AS c
LEFT JOIN public.images i ON i.recognition_id = m.recognition_id AND i.camera_number = c
WHERE m.batch_id = :batch_id AND m.shard = :shard
ORDER BY m.recognition_id::text COLLATE "C", c

-- name: list_expected_adopted
-- As list_expected, a page of the adopted batches in a bucket, whose keys follow each other.
SELECT m.batch_id, m.object_keys[c] AS key, '' AS path, m.photo_sizes[c] AS size, m.sha256s[c] AS sha256,
    m.md5s[c] AS md5, coalesce(i.storage_path = m.object_keys[c], false) AS named, m.recognition_id
FROM (
    SELECT f.*
    FROM ingest.manifest f
    JOIN ingest.batches b ON b.id = f.batch_id
    WHERE f.photo_paths = '{}' AND f.recognition_id::text COLLATE "C" > :after AND b.adopted AND b.state = 'done'
        AND b.bucket = :bucket AND (CAST(:batch_id AS text) IS NULL OR b.id = :batch_id)
    ORDER BY f.recognition_id::text COLLATE "C"
    LIMIT :count
) m
CROSS JOIN generate_series(1, 2) AS c
LEFT JOIN public.images i ON i.recognition_id = m.recognition_id AND i.camera_number = c
ORDER BY m.recognition_id::text COLLATE "C", c

-- name: record_reads
-- That objects of finished batches were read and are as they should be, and the digests that adopted ones lacked. A
-- batch whose reset has begun is passed over.
WITH done AS (
    SELECT id FROM ingest.batches WHERE id = ANY (CAST(:batch_ids AS text[])) AND state = 'done' FOR SHARE SKIP LOCKED
), reads AS (
    SELECT u.batch_id, split_part(u.key, '/', -2)::bigint AS recognition_id,
        CASE WHEN u.key LIKE '%camera1.jpg' THEN 1 ELSE 2 END AS camera, u.digest
    FROM unnest(CAST(:batch_ids AS text[]), CAST(:keys AS text[]), CAST(:digests AS text[])) AS u (batch_id, key, digest)
    JOIN done ON done.id = u.batch_id
), learned AS (
    UPDATE ingest.manifest m
    SET sha256s = ARRAY[coalesce(m.sha256s[1], d.digests[1]), coalesce(m.sha256s[2], d.digests[2])]
    FROM (
        SELECT batch_id, recognition_id,
            ARRAY[max(digest) FILTER (WHERE camera = 1), max(digest) FILTER (WHERE camera = 2)] AS digests
        FROM reads
        GROUP BY batch_id, recognition_id
    ) d
    WHERE m.batch_id = d.batch_id AND m.recognition_id = d.recognition_id
        AND (m.sha256s[1] IS NULL AND d.digests[1] IS NOT NULL OR m.sha256s[2] IS NULL AND d.digests[2] IS NOT NULL)
)
INSERT INTO ingest.proofs (batch_id, recognition_id, camera_number, read_at)
SELECT batch_id, recognition_id, camera, now() FROM reads ORDER BY 1, 2, 3
ON CONFLICT (batch_id, recognition_id, camera_number) DO UPDATE SET read_at = excluded.read_at

-- name: delete_proofs_of
-- Of objects that differ: until they are repaired, they are read first.
DELETE FROM ingest.proofs p
USING unnest(CAST(:batch_ids AS text[]), CAST(:keys AS text[])) AS u (batch_id, key)
WHERE p.batch_id = u.batch_id AND p.recognition_id = split_part(u.key, '/', -2)::bigint
    AND p.camera_number = CASE WHEN u.key LIKE '%camera1.jpg' THEN 1 ELSE 2 END

-- name: count_proofs
-- The objects of finished batches in a bucket, or of one batch; how many of them were never read, and when the longest
-- unread of the others was, also in days before now.
SELECT coalesce(sum(b.photos), 0)::bigint AS objects,
    coalesce(sum(b.photos - coalesce(p.proven, 0)), 0)::bigint AS never_read,
    min(p.oldest) AS oldest, extract(epoch FROM clock_timestamp() - min(p.oldest))::float8 / 86400 AS days
FROM ingest.batches b
LEFT JOIN (
    SELECT batch_id, count(*) AS proven, min(read_at) AS oldest FROM ingest.proofs GROUP BY batch_id
) p ON p.batch_id = b.id
WHERE b.kind = 'load' AND b.state = 'done' AND b.bucket = :bucket AND (CAST(:batch_id AS text) IS NULL OR b.id = :batch_id)

-- name: list_unproven
-- Finished batches with objects that were never read, the oldest first.
SELECT b.id
FROM ingest.batches b
LEFT JOIN (SELECT batch_id, count(*) AS proven FROM ingest.proofs GROUP BY batch_id) p ON p.batch_id = b.id
WHERE b.kind = 'load' AND b.state = 'done' AND b.bucket = :bucket AND (CAST(:batch_id AS text) IS NULL OR b.id = :batch_id)
    AND b.photos > coalesce(p.proven, 0)
ORDER BY b.finished_at, b.id

-- name: list_never_read
-- As list_expected, a page of the objects of a batch that were never read.
SELECT m.batch_id, m.object_keys[c] AS key, m.photo_paths[c] AS path, m.photo_sizes[c] AS size, m.sha256s[c] AS sha256,
    m.md5s[c] AS md5, false AS named, m.recognition_id
FROM (
    SELECT f.*
    FROM ingest.manifest f
    WHERE f.batch_id = :batch_id AND f.recognition_id > :after AND num_nonnulls(f.object_keys[1], f.object_keys[2]) > (
        SELECT count(*) FROM ingest.proofs p WHERE p.batch_id = f.batch_id AND p.recognition_id = f.recognition_id)
    ORDER BY f.recognition_id
    LIMIT :count
) m
CROSS JOIN generate_series(1, 2) AS c
WHERE m.object_keys[c] IS NOT NULL AND NOT EXISTS (
    SELECT FROM ingest.proofs p
    WHERE p.batch_id = m.batch_id AND p.recognition_id = m.recognition_id AND p.camera_number = c)
ORDER BY m.recognition_id, c

-- name: list_oldest_read
-- As list_expected, a page of the objects in a bucket that were read before a time, the longest unread first.
SELECT m.batch_id, m.object_keys[p.camera_number] AS key, m.photo_paths[p.camera_number] AS path,
    m.photo_sizes[p.camera_number] AS size, m.sha256s[p.camera_number] AS sha256, m.md5s[p.camera_number] AS md5,
    false AS named, m.recognition_id
FROM (
    SELECT f.*
    FROM ingest.proofs f
    JOIN ingest.batches b ON b.id = f.batch_id
    WHERE f.read_at < :before AND b.state = 'done' AND b.bucket = :bucket
        AND (CAST(:batch_id AS text) IS NULL OR b.id = :batch_id)
    ORDER BY f.read_at
    LIMIT :count
) p
JOIN ingest.manifest m ON m.batch_id = p.batch_id AND m.recognition_id = p.recognition_id
ORDER BY p.read_at, m.batch_id, m.recognition_id, p.camera_number

-- name: list_known_keys
-- Which of these keys a batch's manifest has now, or an image names.
SELECT key FROM ingest.manifest m CROSS JOIN unnest(m.object_keys) AS key
WHERE m.batch_id = :batch_id AND :is_here AND key = ANY (CAST(:keys AS text[]))
UNION
SELECT storage_path FROM public.images WHERE storage_path = ANY (CAST(:keys AS text[]))

-- name: list_verifiable
-- All batches, in the order of their keys.
SELECT id, kind, state, source, bucket, bucket_created_at, shards, created_at, adopted
FROM ingest.batches
ORDER BY (id || '/') COLLATE "C"
