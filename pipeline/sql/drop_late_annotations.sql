-- Another batch may have committed since the candidates were chosen.
DELETE FROM ingest.claims c
WHERE c.kind = 'qwen' AND c.batch_id = :batch_id AND NOT :force
    AND EXISTS (
        SELECT FROM public.images i JOIN public.initial_annotations a ON a.image_id = i.id
        WHERE i.recognition_id = c.recognition_id
    )
