-- What stands in the way of the migrations.

-- name: find_missing_rights
-- What this role may not do and `migrate` does: make schemas, and make objects in those that are there.
SELECT format('The role %s may not create schemas in the database %s.', current_user, current_database()) AS message
WHERE NOT has_database_privilege(current_database(), 'CREATE')
UNION ALL
SELECT format('The role %s may not create objects in the schema %s.', current_user, nspname)
FROM pg_namespace
WHERE nspname IN ('ingest', 'raw', 'public')
    AND NOT (has_schema_privilege(oid, 'CREATE') AND has_schema_privilege(oid, 'USAGE'))
UNION ALL
SELECT format('The role %s does not own the table public.%s, and cannot add columns to it.', current_user, relname)
FROM pg_class
WHERE relnamespace = to_regnamespace('public') AND relkind IN ('r', 'p') AND NOT pg_has_role(relowner, 'USAGE')
    AND relname IN ('recognitions', 'images', 'recipes', 'recipe_lines', 'recipe_line_options', 'initial_tray_items',
        'initial_annotations')

-- name: find_obstacles
-- Where what is there is not like what is needed, which the schemas with the prefix shape_ have. The migrations add the
-- columns in :added.
WITH needed AS (
    SELECT c.oid, substr(n.nspname, 7) AS schema, c.relname, c.relkind, to_regnamespace(substr(n.nspname, 7)) AS namespace
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname IN ('shape_ingest', 'shape_raw', 'shape_public') AND c.relkind IN ('r', 'v')
), found AS (
    SELECT n.schema || '.' || n.relname AS name, n.oid AS needed, c.oid, c.relkind IN ('r', 'p') AS is_table,
        (c.relkind IN ('r', 'p') OR c.relkind = n.relkind) AND NOT (
            (n.schema = 'raw' OR n.relname IN ('menus', 'menu_items')) AND to_regclass('ingest.batches') IS NULL) AS fits
    FROM needed AS n
    JOIN pg_class AS c ON c.relnamespace = n.namespace AND c.relname = n.relname
), columns AS (
    SELECT f.name AS relation, a.attrelid = f.needed AS is_needed, a.attname AS name,
        replace(replace(format_type(a.atttypid, a.atttypmod), 'shape_public.', ''), 'public.', '') AS type,
        a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AS is_required
    FROM found AS f
    JOIN pg_attribute AS a ON a.attrelid IN (f.needed, f.oid)
    WHERE f.fits AND a.attnum > 0 AND NOT a.attisdropped AND a.attname <> 'created_at'
), keys AS (
    SELECT f.name, f.oid, ARRAY(
        SELECT a.attname::text FROM pg_attribute AS a WHERE a.attrelid = f.needed AND a.attnum = ANY (c.conkey) ORDER BY 1
    ) AS columns
    FROM found AS f
    JOIN pg_constraint AS c ON c.conrelid = f.needed AND c.contype IN ('p', 'u')
    WHERE f.fits
    UNION ALL
    SELECT name, oid, ARRAY['external_id', 'recognition_id']
    FROM found WHERE name = 'public.recognition_active_menu_items' AND is_table
)
SELECT 'name' AS kind, format('%s is in the way: the loader needs a table of its own under that name.', name) AS message
FROM found
WHERE NOT fits
UNION ALL
SELECT 'name', format('The type %s.%s is in the way: the loader needs a table under that name.', n.schema, n.relname)
FROM needed AS n
JOIN pg_type AS t ON t.typnamespace = n.namespace AND t.typname = n.relname AND t.typrelid = 0
UNION ALL
SELECT 'name', format('The type public.%s is not an enum, and the loader needs one under that name.', n.typname)
FROM pg_type AS n
JOIN pg_type AS t ON t.typnamespace = to_regnamespace('public') AND t.typname = n.typname AND t.typtype <> 'e'
WHERE n.typnamespace = to_regnamespace('shape_public') AND n.typtype = 'e'
UNION ALL
SELECT 'label', format('The enum public.%s has no label %s.', n.typname, label.enumlabel)
FROM pg_type AS n
JOIN pg_enum AS label ON label.enumtypid = n.oid
JOIN pg_type AS t ON t.typnamespace = to_regnamespace('public') AND t.typname = n.typname AND t.typtype = 'e'
WHERE n.typnamespace = to_regnamespace('shape_public')
    AND NOT EXISTS (SELECT FROM pg_enum AS e WHERE e.enumtypid = t.oid AND e.enumlabel = label.enumlabel)
UNION ALL
SELECT 'name', format('The function %s is in the way: the loader needs one of its own under that name.', f.oid::regprocedure)
FROM pg_proc AS n
JOIN pg_proc AS f ON f.pronamespace = to_regnamespace('ingest') AND f.proname = n.proname
    AND replace(oidvectortypes(n.proargtypes), 'shape_', '') = oidvectortypes(f.proargtypes)
WHERE n.pronamespace = to_regnamespace('shape_ingest') AND (
    replace(pg_get_function_result(n.oid), 'shape_', '') <> pg_get_function_result(f.oid)
    OR n.proargnames IS DISTINCT FROM f.proargnames OR n.prokind <> f.prokind OR NOT pg_has_role(f.proowner, 'USAGE'))
UNION ALL
SELECT 'column', format('The table %s has no column %s (%s).', n.relation, n.name, n.type)
FROM columns AS n
WHERE n.is_needed AND n.relation || '.' || n.name <> ALL (:added) AND NOT EXISTS (
    SELECT FROM columns AS c WHERE c.relation = n.relation AND c.name = n.name AND NOT c.is_needed)
UNION ALL
SELECT 'type', format('The column %s.%s is %s, and the loader needs %s.', n.relation, n.name, c.type, n.type)
FROM columns AS n
JOIN columns AS c ON c.relation = n.relation AND c.name = n.name AND c.type <> n.type
WHERE n.is_needed AND NOT c.is_needed
UNION ALL
SELECT 'required', format('The column %s.%s needs a value, and the loader does not know it.', c.relation, c.name)
FROM columns AS c
WHERE NOT c.is_needed AND c.is_required AND NOT EXISTS (
    SELECT FROM columns AS n WHERE n.relation = c.relation AND n.name = c.name AND n.is_needed)
UNION ALL
SELECT 'key', format('The table %s has no unique key (%s).', k.name, array_to_string(k.columns, ', '))
FROM keys AS k
WHERE NOT EXISTS (
    SELECT FROM pg_index AS i
    WHERE i.indrelid = k.oid AND i.indisunique AND i.indpred IS NULL AND i.indexprs IS NULL AND k.columns = ARRAY(
        SELECT a.attname::text FROM pg_attribute AS a
        WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey) ORDER BY 1))
ORDER BY 2
