-- The histories of migrations: the Supabase CLI's, and ours.

-- name: create_cli_history
-- As the Supabase CLI makes it; an early one made the table with its first column only.
CREATE SCHEMA IF NOT EXISTS supabase_migrations;
CREATE TABLE IF NOT EXISTS supabase_migrations.schema_migrations (version text NOT NULL PRIMARY KEY);
ALTER TABLE supabase_migrations.schema_migrations
    ADD COLUMN IF NOT EXISTS statements text[],
    ADD COLUMN IF NOT EXISTS name text

-- name: find_histories
-- Which tables are there, whether the CLI's has names, and whether the schema public has tables or views of anyone.
SELECT
    to_regclass('supabase_migrations.schema_migrations') IS NOT NULL AS cli,
    (
        SELECT count(*) = 2 FROM pg_attribute
        WHERE attrelid = to_regclass('supabase_migrations.schema_migrations') AND attname IN ('name', 'statements')
    ) AS has_names,
    to_regclass('ingest.schema_migrations') IS NOT NULL AS own,
    EXISTS (
        SELECT FROM pg_class AS class
        WHERE class.relnamespace = to_regnamespace('public') AND class.relkind IN ('r', 'p', 'v', 'm', 'f')
            AND NOT EXISTS (
                SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = class.oid AND deptype = 'e')
    ) AS is_used

-- name: find_others
-- Also in a table of an early CLI, which has no names.
SELECT EXISTS (
    SELECT FROM supabase_migrations.schema_migrations AS one
    WHERE coalesce(to_jsonb(one) ->> 'name', '') <> ALL (:names)
) AS there

-- name: list_cli_history
-- One replace() for each character takes a quarter of the time of translate().
SELECT
    version, name, true AS is_cli,
    encode(sha256(convert_to(
        replace(replace(replace(replace(replace(
            array_to_string(statements, ''), ' ', ''), E'\n', ''), ';', ''), E'\t', ''), E'\r', ''),
        'UTF8')), 'hex') AS checksum
FROM supabase_migrations.schema_migrations
WHERE name = ANY (:names)

-- name: list_history
SELECT version, name, false AS is_cli, checksum FROM ingest.schema_migrations

-- name: lock_migrations
-- One migrator at a time; the lock ends with the transaction. The number spells "migr".
SELECT pg_advisory_xact_lock(1835624306)

-- name: record_cli_migration
INSERT INTO supabase_migrations.schema_migrations (version, name, statements)
VALUES (:version, :name, :statements)

-- name: record_migration
INSERT INTO ingest.schema_migrations (version, name, checksum)
VALUES (:version, :name, :checksum)

-- name: release_history
WITH ours AS (
    SELECT * FROM unnest(:versions, :names, :checksums) AS one (version, name, checksum)
), moved AS (
    DELETE FROM supabase_migrations.schema_migrations AS one
    USING ours WHERE one.version = ours.version AND one.name = ours.name
    RETURNING ours.*
), kept AS (
    INSERT INTO ingest.schema_migrations (version, name, checksum) SELECT * FROM moved
    ON CONFLICT (name) DO NOTHING
)
SELECT version, name FROM moved ORDER BY version

-- name: shorten_lock_waits
-- A change that waits for a table makes all others wait behind it, such as the readers of an app.
SELECT set_config('lock_timeout', '1s', true)
