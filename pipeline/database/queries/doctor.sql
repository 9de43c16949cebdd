-- What `status --check` asks PostgreSQL.

-- name: examine_backend
-- The server's process behind this transaction, and what it takes the client's name to be.
SELECT pg_backend_pid() AS pid, current_setting('application_name') AS application

-- name: examine_server
-- What a server says of itself and of the role that asks. Settings are those that a session begins with (reset_val), in
-- milliseconds, past what our own transactions set for themselves.
SELECT
    current_setting('server_version_num')::int AS version,
    session_user::text AS role,
    pg_is_in_recovery() AS replica,
    EXISTS (
        SELECT FROM pg_settings WHERE name = 'default_transaction_read_only' AND reset_val = 'on'
    ) AS read_only,
    has_database_privilege(current_database(), 'TEMPORARY') AS temporary,
    (SELECT reset_val::bigint FROM pg_settings WHERE name = 'statement_timeout') AS statement_timeout,
    (SELECT reset_val::bigint FROM pg_settings WHERE name = 'transaction_timeout') AS transaction_timeout,
    (
        SELECT sum(CASE WHEN name = 'max_connections' THEN setting::int ELSE -setting::int END)::int
        FROM pg_settings
        WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')
    ) AS server_slots,
    (SELECT count(*) FROM pg_stat_activity WHERE datid IS NOT NULL) AS server_used,
    (SELECT rolconnlimit FROM pg_roles WHERE rolname = session_user) AS role_slots,
    (SELECT count(*) FROM pg_stat_activity WHERE usename = session_user) AS role_used,
    (SELECT datconnlimit FROM pg_database WHERE datname = current_database()) AS database_slots,
    (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()) AS database_used,
    pg_database_size(current_database()) AS bytes

-- name: examine_tables
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
            'recognition_active_menu_items', 'initial_tray_items', 'initial_annotations'
        )
    )
ORDER BY 1

-- name: find_older_photo
-- Before our migrations, any photo of the app is another tool's.
SELECT storage_path AS key FROM public.images WHERE storage_path ~ '^recognitions/[0-9]+/camera[12]\.jpg$' LIMIT 1

-- name: find_unadopted_photo
SELECT i.storage_path AS key
FROM public.images i
WHERE i.storage_path ~ '^recognitions/[0-9]+/camera[12]\.jpg$'
    AND NOT EXISTS (SELECT FROM ingest.manifest m WHERE m.recognition_id = i.recognition_id)
LIMIT 1

-- name: has_images
SELECT to_regclass('public.images') IS NOT NULL AS there
