SELECT a.relnamespace::regnamespace || '.' || quote_ident(a.relname) AS app,
    t.relnamespace::regnamespace || '.' || quote_ident(t.relname) AS target, r.referencing
FROM ingest.find_references(false) r
JOIN pg_class a ON a.oid = r.app
JOIN pg_class t ON t.oid = r.target
ORDER BY 1, 2
