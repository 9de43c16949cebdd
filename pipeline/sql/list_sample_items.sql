-- What is on the trays of some recognitions, at most so many items each.
SELECT *
FROM (
    SELECT t.recognition_id, t.id, t.item_type, t.source, t.line_number, t.ordinal,
        coalesce(o.name, t.metadata ->> 'label') AS name, l.has_ambiguity,
        row_number() OVER (PARTITION BY t.recognition_id ORDER BY t.item_type, t.line_number, t.ordinal, t.id) AS nth
    FROM public.initial_tray_items t
    LEFT JOIN public.recipe_line_options o ON o.id = t.recipe_line_option_id
    LEFT JOIN public.recipe_lines l ON l.id = o.recipe_line_id
    WHERE t.recognition_id = ANY (:recognition_ids)
) item
WHERE nth <= :count
ORDER BY recognition_id, nth
