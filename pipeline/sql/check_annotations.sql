-- Each detection of the newest finished annotations of a recognition is one annotation, and there is no other.
SELECT newest.batch_id, 'recognition ' || r.id AS what,
    'has ' || found.annotations || ' annotations instead of ' || wanted.detections AS message
FROM public.recognitions r
LEFT JOIN LATERAL ingest.newest_version('qwen', r.id, '') newest (batch_id) ON true
CROSS JOIN LATERAL (
    SELECT count(*) AS detections
    FROM raw.qwen_annotations q
    WHERE q.batch_id = newest.batch_id AND q.recognition_id = r.id
) wanted
CROSS JOIN LATERAL (
    SELECT count(*) AS annotations
    FROM public.images i JOIN public.initial_annotations a ON a.image_id = i.id
    WHERE i.recognition_id = r.id
) found
WHERE found.annotations <> wanted.detections
UNION ALL
SELECT r.batch_id, 'tray item ' || i.id, 'is of the model, and no annotation shows it'
FROM public.initial_tray_items i
JOIN public.recognitions r ON r.id = i.recognition_id
WHERE i.source = 'MODEL'
    AND NOT EXISTS (SELECT FROM public.initial_annotations a WHERE a.initial_tray_item_id = i.id)
