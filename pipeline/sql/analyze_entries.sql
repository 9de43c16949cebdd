ANALYZE pg_temp.entries
