ANALYZE pg_temp.staged
