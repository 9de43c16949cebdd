-- Discovery of an annotations file: entries in temporary tables, then boxes, claims, manifest and raw rows.

-- name: create_photos
ANALYZE pg_temp.entries;
ANALYZE pg_temp.detections;
-- The photos in the annotations file, and what stands in the way of annotating each. Of a photo that is in the file
-- several times, the key that sorts last in natural order counts, and of equal keys the last. A suspect is annotated, by
-- the batch that is `former` or by another tool, and perhaps with other values. An unusable one changed, and is not taken.
-- Values that the batch `other` loaded for another photo are left out until they change.
CREATE TEMP TABLE photos ON COMMIT DROP AS
SELECT e.*, i.id AS image_id, i.sha256, i.width, i.height, i.orientation, annotated.there AS loaded, c.batch_id AS holder,
    known.of_others, known.lacks_size, known.former, known.other,
    annotated.there AND record.former_digest IS DISTINCT FROM e.digest AND known.other IS NULL
        AND num_nulls(i.width, i.height) = 0 AND ingest.is_on_record(e.recognition_id) AS is_suspect,
    false AS is_changed, false AS is_unusable,
    i.id IS NOT NULL AND NOT annotated.there AND c.batch_id IS NULL AND NOT known.of_others AND NOT known.lacks_size
        AND known.other IS NULL AS is_free
FROM (
    SELECT DISTINCT ON (recognition_id, camera_number) *
    FROM pg_temp.entries
    ORDER BY recognition_id, camera_number, detections IS NULL, rank COLLATE "C" DESC, number DESC
) e
LEFT JOIN ingest.claims c ON c.kind = 'qwen' AND c.recognition_id = e.recognition_id AND c.batch_id <> :batch_id
-- OFFSET 0: each photo is a look-up in an index, whatever the statistics say, and each value is worked out once.
LEFT JOIN LATERAL (
    SELECT image.* FROM public.images image
    WHERE image.recognition_id = e.recognition_id AND image.camera_number = e.camera_number OFFSET 0
) i ON true
CROSS JOIN LATERAL (
    SELECT NOT :force AND EXISTS (SELECT FROM public.initial_annotations a
        WHERE a.image_id = i.id AND a.source = 'MODEL') AS there OFFSET 0
) annotated
CROSS JOIN LATERAL (
    SELECT (array_agg(m.batch_id ORDER BY m.version DESC) FILTER (WHERE m.is_same))[1] AS former,
        (array_agg(m.digest ORDER BY m.version DESC) FILTER (WHERE m.is_same))[1] AS former_digest,
        CASE WHEN NOT coalesce(bool_or(m.is_same) FILTER (WHERE m.digest = e.digest), true)
            THEN max(m.batch_id COLLATE "C") FILTER (WHERE m.digest = e.digest) END AS other
    FROM (
        SELECT a.version, (a.entry).batch_id, (a.entry).sha256s[array_position((a.entry).cameras, e.camera_number)] AS digest,
            ingest.is_same_photo(a.entry, e.camera_number, i.sha256, i.width, i.height, i.orientation) AS is_same
        FROM ingest.annotations_of(e.recognition_id, e.camera_number, '') a
        WHERE i.id IS NOT NULL
    ) m
) record
CROSS JOIN LATERAL (
    SELECT i.id IS NOT NULL AND NOT annotated.there AND NOT ingest.is_on_record(e.recognition_id) AS of_others,
        i.id IS NOT NULL AND NOT annotated.there AND num_nulls(i.width, i.height) > 0 AS lacks_size,
        CASE WHEN annotated.there THEN record.former END AS former,
        CASE WHEN NOT :force AND e.detections > 0 THEN record.other END AS other
    OFFSET 0
) known;
ANALYZE pg_temp.photos

-- name: count_changed_photos
-- Photos whose values are no longer those of their annotations, and those of them that are to be loaded and others hold.
-- What is not usable of the others is counted by its rejects.
SELECT count(*) FILTER (WHERE CASE WHEN :changed THEN s.number IS NOT NULL ELSE p.holder IS NULL AND NOT p.is_unusable END)
        AS changed,
    count(*) FILTER (WHERE :changed AND p.holder IS NOT NULL) AS held
FROM pg_temp.photos p
LEFT JOIN pg_temp.staged s USING (number)
WHERE p.is_changed

-- name: count_annotated
-- Photos in the annotations file, loaded or not; superseded are entries of a photo that has another one.
SELECT count(*) AS found,
    count(*) FILTER (WHERE loaded) AS already_loaded,
    count(*) FILTER (WHERE NOT loaded AND is_held) AS held_elsewhere,
    coalesce(array_agg(DISTINCT holder) FILTER (WHERE is_held), '{}') AS held_by,
    (SELECT count(*) FROM pg_temp.entries) - count(*) AS superseded_copies
FROM pg_temp.photos
CROSS JOIN LATERAL (
    SELECT image_id IS NOT NULL AND holder IS NOT NULL AND other IS NULL AS is_held
) held

-- name: create_boxes
-- The boxes of the photos to annotate, in pixels of the photo as it is stored: scaled from the frame that the model
-- saw, turned back as the EXIF orientation says, rounded, and clipped at the edges. A box that overhangs by more than
-- 2 % of a side is not clipped. Equal boxes of one label are one, of the first detection. OFFSET 0: each value is worked out
-- once, and not again in each expression that has it.
CREATE TEMP TABLE boxes ON COMMIT DROP AS
WITH scaled AS (
    SELECT p.number, d.detection, d.label, p.width, p.height, turn.orientation,
        coalesce(d.x1 * seen.width / :frame_width, d.x1) AS x1, coalesce(d.y1 * seen.height / :frame_height, d.y1) AS y1,
        coalesce(d.x2 * seen.width / :frame_width, d.x2) AS x2, coalesce(d.y2 * seen.height / :frame_height, d.y2) AS y2
    FROM pg_temp.photos p
    JOIN pg_temp.detections d USING (number)
    CROSS JOIN LATERAL (SELECT CASE WHEN :exif_turned THEN p.orientation ELSE 1 END AS orientation) turn
    CROSS JOIN LATERAL (
        SELECT CASE WHEN turn.orientation >= 5 THEN p.height ELSE p.width END AS width,
            CASE WHEN turn.orientation >= 5 THEN p.width ELSE p.height END AS height
    ) seen
    WHERE p.is_free OR p.is_suspect
    OFFSET 0
), placed AS (
    SELECT number, detection, label, width, height,
        round(CASE WHEN orientation IN (2, 3) THEN width - x2 WHEN orientation IN (5, 6) THEN y1
            WHEN orientation IN (7, 8) THEN width - y2 ELSE x1 END, 3) AS x1,
        round(CASE WHEN orientation IN (3, 4) THEN height - y2 WHEN orientation IN (5, 8) THEN x1
            WHEN orientation IN (6, 7) THEN height - x2 ELSE y1 END, 3) AS y1,
        round(CASE WHEN orientation IN (2, 3) THEN width - x1 WHEN orientation IN (5, 6) THEN y2
            WHEN orientation IN (7, 8) THEN width - y1 ELSE x2 END, 3) AS x2,
        round(CASE WHEN orientation IN (3, 4) THEN height - y1 WHEN orientation IN (5, 8) THEN x2
            WHEN orientation IN (6, 7) THEN height - x1 ELSE y2 END, 3) AS y2
    FROM scaled
    OFFSET 0
), judged AS (
    SELECT *, x2 <= 0 OR y2 <= 0 OR x1 >= width OR y1 >= height OR greatest(-x1, x2 - width) > 0.02 * width
        OR greatest(-y1, y2 - height) > 0.02 * height AS is_outside
    FROM placed
    OFFSET 0
), clipped AS (
    SELECT number, detection, label, is_outside, least(x1, y1) < 0 OR x2 > width OR y2 > height AS is_clipped,
        trim_scale(CASE WHEN is_outside THEN x1 ELSE greatest(x1, 0) END) AS x1,
        trim_scale(CASE WHEN is_outside THEN y1 ELSE greatest(y1, 0) END) AS y1,
        trim_scale(CASE WHEN is_outside THEN x2 ELSE least(x2, width) END) AS x2,
        trim_scale(CASE WHEN is_outside THEN y2 ELSE least(y2, height) END) AS y2
    FROM judged
    OFFSET 0
)
SELECT number, min(detection) AS detection, label, x1, y1, x2, y2, is_outside, bool_or(is_clipped) AS is_clipped,
    NOT is_outside AND x1 < x2 AND y1 < y2 AS is_usable, count(*) - 1 AS repeats
FROM clipped
GROUP BY number, label, x1, y1, x2, y2, is_outside;
ANALYZE pg_temp.boxes

-- name: create_entries
-- One row an entry of the annotations file, numbered in its order; detections is NULL where none of it can be used.
CREATE TEMP TABLE entries (
    number bigint NOT NULL,
    recognition_id bigint NOT NULL,
    camera_number smallint NOT NULL,
    path text NOT NULL,
    rank text NOT NULL,
    size bigint NOT NULL,
    digest text NOT NULL, -- of what of it can be used, and of the options
    detections bigint
) ON COMMIT DROP;
-- One row a usable detection, numbered from 1 in its entry.
CREATE TEMP TABLE detections (
    number bigint NOT NULL,
    detection integer NOT NULL,
    label text NOT NULL,
    x1 numeric NOT NULL,
    y1 numeric NOT NULL,
    x2 numeric NOT NULL,
    y2 numeric NOT NULL
) ON COMMIT DROP

-- name: create_staged_annotations
-- A photo without any detection is loaded only to take the place of a former version.
CREATE TEMP TABLE staged ON COMMIT DROP AS
SELECT p.recognition_id, p.camera_number, p.number, p.path, p.size, NULL::text AS identity
FROM pg_temp.photos p
LEFT JOIN (SELECT DISTINCT b.number FROM pg_temp.boxes b WHERE b.is_usable) usable USING (number)
WHERE p.is_free AND (usable.number IS NOT NULL OR ((:force OR p.loaded) AND p.detections = 0));
-- Recognitions with photos that this look did not inspect: held by other batches, or changed and not taken; and annotated
-- already, of which it repeats nothing that the batch of the annotations recorded.
CREATE TEMP TABLE passed_by ON COMMIT DROP AS
SELECT recognition_id, CASE WHEN holder IS NULL AND NOT is_changed THEN former END AS batch_id
FROM pg_temp.photos
WHERE image_id IS NOT NULL AND NOT is_free

-- name: drop_late_annotations
-- Another batch may have committed since the candidates were chosen. A recognition without any photo left is given up.
WITH late AS (
    DELETE FROM pg_temp.staged s
    USING pg_temp.photos p
    WHERE p.number = s.number AND NOT :force
        AND EXISTS (
            SELECT FROM public.initial_annotations a WHERE a.image_id = p.image_id AND a.source = 'MODEL')
        AND NOT (p.loaded AND p.former IS NOT DISTINCT FROM (
            SELECT v FROM ingest.annotations_of_photo(
                p.recognition_id, p.camera_number, p.sha256, p.width, p.height, p.orientation, '') v))
    RETURNING s.recognition_id, s.number
), counted AS (
    UPDATE ingest.batches SET already_loaded = already_loaded + (SELECT count(*) FROM late) WHERE id = :batch_id
)
DELETE FROM ingest.claims c
USING late
WHERE c.kind = 'qwen' AND c.batch_id = :batch_id AND c.recognition_id = late.recognition_id
    AND NOT EXISTS (
        SELECT FROM pg_temp.staged s
        WHERE s.recognition_id = c.recognition_id AND s.number NOT IN (SELECT number FROM late)
    );
SELECT count(*) AS claims FROM ingest.claims WHERE batch_id = :batch_id

-- name: add_unusable
-- What is wrong with photos that are not looked at this time is not told.
WITH skipped AS (
    DELETE FROM pg_temp.found f
    USING pg_temp.entries e
    JOIN pg_temp.photos p USING (recognition_id, camera_number)
    WHERE e.number = f.number AND NOT p.is_free AND NOT p.is_unusable
)
UPDATE pg_temp.found f
SET taken = false, number = p.number
FROM pg_temp.entries e
JOIN pg_temp.photos p USING (recognition_id, camera_number)
WHERE e.number = f.number AND p.is_unusable;
-- A photo of a recognition that is not loaded is a reject of its own; so is one that was adopted without its size.
INSERT INTO pg_temp.found (recognition_id, path, code, message)
SELECT e.recognition_id, e.path, reject.code, reject.message
FROM pg_temp.entries e
JOIN pg_temp.photos p USING (recognition_id, camera_number)
CROSS JOIN LATERAL (
    SELECT 'recognition_unknown', 'the recognition ' || e.recognition_id || coalesce((
            SELECT CASE b.state WHEN 'held' THEN format(' is in batch %s, which is held: publish', b.id)
                ELSE format(' is in batch %s, which is unfinished: finish', b.id) END
                || format(' %s, then load the annotations again', b.id)
            FROM ingest.claims c JOIN ingest.batches b ON b.id = c.batch_id
            WHERE c.kind = 'load' AND c.recognition_id = e.recognition_id AND b.state IN ('held', 'loading')
        ), ' is not loaded')
    WHERE p.image_id IS NULL
    UNION ALL
    SELECT 'photo_size_unknown', 'the image of the photo has no width or no height' WHERE p.lacks_size
) reject (code, message);
INSERT INTO pg_temp.found (recognition_id, path, code, message, is_notice)
SELECT recognition_id, path, 'annotations_other_photo', 'the values are left out: ' || other || ' loaded them for another '
    'photo than the one that is there now (SHA-256 ' || coalesce(left(sha256, 12), 'unknown') || '); load-qwen --force loads them', true
FROM pg_temp.photos
WHERE other IS NOT NULL;
INSERT INTO pg_temp.found (recognition_id, path, code, message, is_notice)
SELECT recognition_id, path, 'not_adopted', :message, true FROM pg_temp.photos WHERE of_others;
-- The messages have the numbers of the file, where they can be searched for.
INSERT INTO pg_temp.found (number, taken, recognition_id, path, code, message)
SELECT p.number, p.is_free, p.recognition_id, p.path, CASE WHEN b.is_outside THEN 'box_outside' ELSE 'box_malformed' END,
    'the box ' || concat_ws(', ', d.x1, d.y1, d.x2, d.y2) || ' of ' || b.label
        || CASE WHEN b.repeats > 0 THEN ', which is there ' || b.repeats + 1 || ' times,' ELSE '' END || CASE
        WHEN b.is_outside THEN ' lies outside the photo of ' || p.width || ' x ' || p.height || ' pixels'
            || CASE WHEN p.orientation > 1 AND NOT :exif_turned THEN ', which its EXIF data turns: see --exif-turned'
                ELSE '' END
        ELSE ' has no area in the photo' END
FROM pg_temp.boxes b
JOIN pg_temp.photos p USING (number)
JOIN pg_temp.detections d USING (number, detection)
WHERE NOT b.is_usable AND (p.is_free OR p.is_unusable)

-- name: find_changed_photos
-- Compare the boxes of suspects with those on record: in order with those of a batch, in any order with those of another
-- tool, whose labels are on the items.
WITH given AS (
    SELECT b.number, array_agg(concat_ws(' ', b.label, b.x1, b.y1, b.x2, b.y2) ORDER BY b.detection) AS boxes
    FROM pg_temp.boxes b
    WHERE b.is_usable
    GROUP BY b.number
), recorded AS (
    SELECT p.number, array_agg(concat_ws(' ', d.label, d.x1, d.y1, d.x2, d.y2) ORDER BY d.detection) AS boxes
    FROM pg_temp.photos p
    JOIN raw.detections d ON d.batch_id = p.former AND d.recognition_id = p.recognition_id
        AND d.camera_number = p.camera_number
    WHERE p.is_suspect
    GROUP BY p.number
    UNION ALL
    SELECT p.number, array_agg(concat_ws(' ', coalesce(a.label, item.metadata ->> 'qwen_label',
            'dish_' || line.line_number - 1, CASE item.item_type WHEN 'PLATE' THEN 'plate' END),
        trim_scale(box.x), trim_scale(box.y), trim_scale(box.x + box.w), trim_scale(box.y + box.h)))
    FROM pg_temp.photos p
    JOIN public.initial_annotations a ON a.image_id = p.image_id AND a.source = 'MODEL'
    JOIN public.initial_tray_items item ON item.id = a.initial_tray_item_id
    LEFT JOIN public.recipe_line_options option ON option.id = item.recipe_line_option_id
    LEFT JOIN public.recipe_lines line ON line.id = coalesce(item.recipe_line_id, option.recipe_line_id)
    -- What others wrote may be anything: what is no number is not there.
    CROSS JOIN LATERAL jsonb_to_record((
        SELECT coalesce(jsonb_object_agg(side, a.bbox -> side), '{}')
        FROM unnest(ARRAY['x', 'y', 'w', 'h']) AS side
        WHERE jsonb_typeof(a.bbox -> side) = 'number'
    )) AS box (x numeric, y numeric, w numeric, h numeric)
    WHERE p.is_suspect AND p.former IS NULL
    GROUP BY p.number
)
UPDATE pg_temp.photos p
SET is_changed = true, is_free = :changed AND p.holder IS NULL,
    is_unusable = NOT :changed AND p.holder IS NULL AND given.boxes IS NULL AND p.detections IS DISTINCT FROM 0
FROM pg_temp.photos s
LEFT JOIN given USING (number)
LEFT JOIN recorded USING (number)
WHERE s.number = p.number AND s.is_suspect AND CASE WHEN s.former IS NULL
    THEN ARRAY(SELECT unnest(given.boxes) ORDER BY 1) <> ARRAY(SELECT unnest(recorded.boxes) ORDER BY 1)
    ELSE given.boxes IS DISTINCT FROM recorded.boxes END

-- name: insert_annotation_notices
-- What is unusual about the boxes of the photos in the manifest, photo by photo.
INSERT INTO ingest.notices (batch_id, recognition_id, path, code, message, step)
SELECT :batch_id, s.recognition_id, s.path, notice.code, notice.message, :step
FROM (
    SELECT number, count(*) FILTER (WHERE is_clipped) AS clipped, count(*) FILTER (WHERE repeats > 0) AS boxes,
        sum(repeats) AS repeats
    FROM pg_temp.boxes
    WHERE is_usable AND (is_clipped OR repeats > 0)
    GROUP BY number
) unusual
JOIN pg_temp.staged s USING (number)
-- OFFSET 0: a look-up in an index, since there are no statistics of these claims yet.
CROSS JOIN LATERAL (
    SELECT FROM ingest.claims c
    WHERE c.kind = 'qwen' AND c.recognition_id = s.recognition_id AND c.batch_id = :batch_id OFFSET 0
) mine
CROSS JOIN LATERAL (
    SELECT 'box_clipped', 'boxes that reach over the edge of the photo by 2 % of its side or less, and were clipped: '
        || clipped
    WHERE clipped > 0
    UNION ALL
    SELECT 'box_repeated', 'boxes that were there several times with the same label: ' || boxes
        || ', left out copies: ' || repeats
    WHERE boxes > 0
) notice (code, message)
ORDER BY s.recognition_id, s.camera_number

-- name: insert_annotations
-- The boxes of the photos in the manifest.
INSERT INTO raw.detections (batch_id, recognition_id, camera_number, detection, label, x1, y1, x2, y2)
SELECT :batch_id, s.recognition_id, s.camera_number, row_number() OVER (PARTITION BY b.number ORDER BY b.detection),
    b.label, b.x1, b.y1, b.x2, b.y2
FROM pg_temp.staged s
JOIN ingest.claims c ON c.kind = 'qwen' AND c.recognition_id = s.recognition_id AND c.batch_id = :batch_id
JOIN pg_temp.boxes b USING (number)
WHERE b.is_usable

-- name: insert_manifest_annotations
-- All of a batch's annotations are one shard: discovery copies them itself. They are for these photos.
INSERT INTO ingest.manifest (batch_id, recognition_id, shard, cameras, photo_paths, photo_sizes, photo_mtimes,
    object_keys, photo_sha256s, widths, heights, orientations, sha256s)
SELECT :batch_id, s.recognition_id, 1, array_agg(s.camera_number ORDER BY s.camera_number),
    array_agg(s.path ORDER BY s.camera_number), array_agg(s.size ORDER BY s.camera_number), '{}', '{}',
    array_agg(p.sha256 ORDER BY s.camera_number), array_agg(p.width ORDER BY s.camera_number),
    array_agg(p.height ORDER BY s.camera_number), array_agg(p.orientation ORDER BY s.camera_number), array_agg(p.digest ORDER BY s.camera_number)
FROM pg_temp.staged s
JOIN pg_temp.photos p USING (number)
JOIN ingest.claims c ON c.kind = 'qwen' AND c.recognition_id = s.recognition_id AND c.batch_id = :batch_id
GROUP BY s.recognition_id

-- name: remember_seen_photos
-- Values that say the same as those that were loaded.
UPDATE ingest.manifest m
SET sha256s[array_position(m.cameras, :camera)] = p.digest
FROM pg_temp.photos p
WHERE p.is_suspect AND NOT p.is_changed AND p.camera_number = :camera
    AND m.batch_id = p.former AND m.recognition_id = p.recognition_id

-- name: weigh_frame
-- The farthest corner of all boxes in the file, and those of them that are on large photos; `free` are photos to annotate,
-- `empty` those of them without any detection.
SELECT max(greatest(d.x2, d.y2)) AS farthest,
    count(*) FILTER (WHERE greatest(p.width, p.height) > :large) AS boxes,
    count(DISTINCT p.number) FILTER (WHERE greatest(p.width, p.height) > :large) AS photos,
    (SELECT count(*) FROM pg_temp.photos WHERE is_free) AS free,
    (SELECT count(*) FROM pg_temp.photos WHERE is_free AND detections = 0) AS empty
FROM pg_temp.detections d
LEFT JOIN pg_temp.photos p USING (number)
