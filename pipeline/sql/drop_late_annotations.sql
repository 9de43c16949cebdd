-- Another batch may have committed since the candidates were chosen.
DELETE FROM ingest.claims c
WHERE c.kind = 'qwen' AND c.batch_id = :batch_id AND NOT :force
    AND (
        EXISTS (SELECT FROM public.initial_annotations a WHERE a.image_id = (
            SELECT i.id FROM public.images i WHERE i.recognition_id = c.recognition_id AND i.camera_number = 1))
        OR EXISTS (SELECT FROM public.initial_annotations a WHERE a.image_id = (
            SELECT i.id FROM public.images i WHERE i.recognition_id = c.recognition_id AND i.camera_number = 2))
    )
