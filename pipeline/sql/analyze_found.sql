ANALYZE pg_temp.found
