-- Each recognition has two images, and each image is the object that its batch has on record.
SELECT r.batch_id, 'recognition ' || r.id || ', camera ' || c AS what,
    CASE WHEN i.id IS NULL THEN 'has no image'
        ELSE 'names ' || i.storage_path || ', which is not what batch ' || r.batch_id || ' sent' END AS message
FROM public.recognitions r
CROSS JOIN generate_series(1, 2) AS c
LEFT JOIN public.images i ON i.recognition_id = r.id AND i.camera_number = c
LEFT JOIN ingest.manifest m ON m.batch_id = r.batch_id AND m.recognition_id = r.id
WHERE (i.storage_path, i.byte_size, i.sha256, i.width, i.height)
    IS DISTINCT FROM (m.object_keys[c], m.photo_sizes[c], m.sha256s[c], m.widths[c], m.heights[c])
    OR i.id IS NULL
