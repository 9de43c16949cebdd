SELECT
    (SELECT count(*) FROM public.recognitions) AS recognitions,
    (SELECT count(*) FROM public.images) AS images,
    (SELECT count(*) FROM public.menus) AS menus,
    (SELECT count(*) FROM public.menu_items) AS menu_items,
    (SELECT count(*) FROM public.recipes) AS recipes,
    (SELECT count(*) FROM public.recipe_lines) AS recipe_lines,
    (SELECT count(*) FROM public.recipe_line_options) AS recipe_line_options,
    (SELECT count(*) FROM public.initial_tray_items) AS initial_tray_items,
    (SELECT count(*) FROM public.initial_annotations) AS initial_annotations
