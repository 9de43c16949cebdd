-- Rows that go, by table, in the order in which they are listed.
SELECT n.nspname || '.' || c.relname AS name, d.going
FROM (SELECT relation, count(*) AS going FROM pg_temp.doomed GROUP BY relation) d
JOIN pg_class c ON c.oid = d.relation
JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY 1
