-- Every menu is some recognition's.
SELECT NULL::text AS batch_id, 'menu ' || m.id AS what, 'belongs to no recognition' AS message
FROM public.menus m
WHERE NOT EXISTS (SELECT FROM public.recognitions r WHERE r.menu_id = m.id)
