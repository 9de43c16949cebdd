-- Another batch may have committed since the candidates were chosen.
DELETE FROM ingest.claims c
WHERE c.batch_id = :batch_id AND NOT :force
    AND EXISTS (SELECT FROM public.recognitions r WHERE r.id = c.recognition_id)
