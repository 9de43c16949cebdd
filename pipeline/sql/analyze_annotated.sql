ANALYZE pg_temp.annotated
