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
