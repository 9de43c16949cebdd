SELECT count(*) FILTER (WHERE known) AS found,
    count(*) FILTER (WHERE known AND loaded) AS already_loaded,
    count(*) FILTER (WHERE known AND NOT loaded AND holder IS NOT NULL) AS held_elsewhere,
    coalesce(array_agg(DISTINCT holder) FILTER (WHERE known AND NOT loaded AND holder IS NOT NULL), '{}') AS held_by,
    (SELECT count(*) FROM pg_temp.entries)::bigint - coalesce(sum(photos), 0)::bigint AS superseded_copies
FROM pg_temp.annotated
