-- The page about a batch.

-- name: count_shards
SELECT shard, count(*) AS recognitions FROM ingest.manifest WHERE batch_id = :batch_id GROUP BY shard

-- name: list_sample
-- Recognitions of a batch for people to look at, each time the same: in turn from some of the shards with the marker of
-- a step, spread evenly over them; those with annotations first.
WITH ready AS (
    SELECT shard, row_number() OVER (ORDER BY shard) AS nth, count(*) OVER () AS shards
    FROM ingest.batch_state
    WHERE batch_id = :batch_id AND step = :step AND shard > 0
)
SELECT one.recognition_id
FROM ready
CROSS JOIN LATERAL (
    SELECT found.*, row_number() OVER (ORDER BY found.annotated DESC, found.position) AS turn
    FROM (
        SELECT m.recognition_id, md5(m.recognition_id::text) AS position, EXISTS (
            SELECT FROM public.images i
            JOIN public.initial_annotations a ON a.image_id = i.id
            WHERE i.recognition_id = m.recognition_id
        ) AS annotated
        FROM ingest.manifest m
        WHERE m.batch_id = :batch_id AND m.shard = ready.shard AND NOT m.rejected
        ORDER BY annotated DESC, position
        LIMIT :count
    ) found
) one
WHERE ready.nth * :count / ready.shards <> (ready.nth - 1) * :count / ready.shards
ORDER BY one.annotated DESC, one.turn, one.position
LIMIT :count

-- name: list_sample_boxes
-- The boxes on some photos, at most so many each, and how many there are.
SELECT *
FROM (
    SELECT a.image_id, a.initial_tray_item_id, a.bbox,
        row_number() OVER (PARTITION BY a.image_id ORDER BY a.id) AS nth,
        count(*) OVER (PARTITION BY a.image_id) AS boxes
    FROM public.initial_annotations a
    WHERE a.image_id = ANY (:image_ids)
) box
WHERE nth <= :count
ORDER BY image_id, nth

-- name: list_sample_items
-- What is on the trays of some recognitions, at most so many items each.
SELECT *
FROM (
    SELECT t.recognition_id, t.id, t.item_type, t.source, t.line_number, t.ordinal,
        coalesce(o.name, l.raw_name, t.metadata ->> 'name', t.metadata ->> 'qwen_label') AS name, l.has_ambiguity,
        row_number() OVER (PARTITION BY t.recognition_id ORDER BY t.item_type, t.line_number, t.ordinal, t.id) AS nth
    FROM public.initial_tray_items t
    LEFT JOIN public.recipe_line_options o ON o.id = t.recipe_line_option_id
    LEFT JOIN public.recipe_lines l ON l.id = coalesce(t.recipe_line_id, o.recipe_line_id)
    WHERE t.recognition_id = ANY (:recognition_ids)
) item
WHERE nth <= :count
ORDER BY recognition_id, nth

-- name: list_sample_photos
-- The photos of some recognitions of a batch: as that batch has them where it holds photos itself, else as readers see
-- them. image_id is NULL where readers see another photo, of the batch shown_batch_id, or none.
SELECT m.recognition_id, camera.number AS camera_number, r.batch_id AS shown_batch_id,
    coalesce(m.object_keys[camera.number], i.storage_path) AS object_key,
    coalesce(m.sha256s[camera.number], i.sha256) AS sha256,
    coalesce(m.orientations[camera.number], i.orientation) AS orientation,
    CASE WHEN i.storage_path = coalesce(m.object_keys[camera.number], i.storage_path) THEN i.id END AS image_id
FROM (
    -- Annotations have neither: their arrays are of the cameras that they are for, and the digests of their boxes.
    SELECT batch_id, recognition_id, object_keys, CASE WHEN cameras IS NULL THEN sha256s END AS sha256s,
        CASE WHEN cameras IS NULL THEN orientations END AS orientations
    FROM ingest.manifest
) m
CROSS JOIN (VALUES (1), (2)) AS camera (number)
LEFT JOIN public.recognitions r ON r.id = m.recognition_id
LEFT JOIN public.images i ON i.recognition_id = m.recognition_id AND i.camera_number = camera.number
WHERE m.batch_id = :batch_id AND m.recognition_id = ANY (:recognition_ids)
ORDER BY m.recognition_id, camera.number
