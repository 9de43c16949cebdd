-- Our tables that this role does not own, may not COPY into, or may not write; these questions need no privilege.
SELECT
    namespace.nspname || '.' || class.relname AS name,
    pg_has_role(class.relowner, 'USAGE') AS owned,
    row_security_active(class.oid) AS filtered,
    has_schema_privilege(namespace.oid, 'USAGE') AND has_table_privilege(class.oid, 'SELECT')
        AND has_table_privilege(class.oid, 'INSERT') AND has_table_privilege(class.oid, 'UPDATE')
        AND has_table_privilege(class.oid, 'DELETE') AS writable
FROM pg_class AS class
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
WHERE class.relkind IN ('r', 'p')
    AND (
        namespace.nspname IN ('ingest', 'raw')
        OR namespace.nspname = 'public' AND class.relname IN (
            'menus', 'menu_items', 'recognitions', 'images', 'recipes', 'recipe_lines', 'recipe_line_options',
            'initial_tray_items', 'initial_annotations'
        )
    )
ORDER BY 1
