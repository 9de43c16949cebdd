-- Lines and their items are those of the receipt that the shown version has.
SELECT r.batch_id, 'recognition ' || r.id AS what,
    'has ' || found.lines || ' receipt lines with ' || found.items || ' items instead of ' || wanted.lines || ' with '
        || wanted.items AS message
FROM public.recognitions r
CROSS JOIN LATERAL (
    SELECT count(*) AS lines, coalesce(sum((line ->> 'Count')::bigint), 0)::bigint AS items
    FROM raw.recipes w CROSS JOIN jsonb_array_elements(w.receipt) AS line
    WHERE w.batch_id = r.batch_id AND w.recognition_id = r.id
) wanted
CROSS JOIN LATERAL (
    SELECT
        (SELECT count(*) FROM public.recipes p JOIN public.recipe_lines l ON l.recipe_id = p.id
         WHERE p.recognition_id = r.id) AS lines,
        (SELECT count(*) FROM public.initial_tray_items i
         WHERE i.recognition_id = r.id AND i.source = 'RECIPE_LINE_OPTION') AS items
) found
WHERE (found.lines, found.items) IS DISTINCT FROM (wanted.lines, wanted.items)
