-- The photos of some recognitions of a batch: as that batch has them where it holds photos itself, else as readers see
-- them. image_id is NULL where readers see another photo, of the batch shown_batch_id, or none.
SELECT m.recognition_id, camera.number AS camera_number, r.batch_id AS shown_batch_id,
    coalesce(m.object_keys[camera.number], i.storage_path) AS object_key,
    coalesce(m.sha256s[camera.number], i.sha256) AS sha256,
    coalesce(m.orientations[camera.number], i.orientation) AS orientation,
    CASE WHEN i.storage_path = coalesce(m.object_keys[camera.number], i.storage_path) THEN i.id END AS image_id
FROM ingest.manifest m
CROSS JOIN (VALUES (1), (2)) AS camera (number)
LEFT JOIN public.recognitions r ON r.id = m.recognition_id
LEFT JOIN public.images i ON i.recognition_id = m.recognition_id AND i.camera_number = camera.number
WHERE m.batch_id = :batch_id AND m.recognition_id = ANY (:recognition_ids)
ORDER BY m.recognition_id, camera.number
