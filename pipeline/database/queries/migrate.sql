-- The history of migrations.

-- name: complete_history
-- An early Supabase CLI made the table with its first column only.
ALTER TABLE supabase_migrations.schema_migrations
    ADD COLUMN IF NOT EXISTS statements text[],
    ADD COLUMN IF NOT EXISTS name text

-- name: create_history
-- As the Supabase CLI makes it.
CREATE TABLE IF NOT EXISTS supabase_migrations.schema_migrations (
    version text NOT NULL PRIMARY KEY,
    statements text[],
    name text
)

-- name: create_history_schema
CREATE SCHEMA IF NOT EXISTS supabase_migrations

-- name: find_history
SELECT to_regclass('supabase_migrations.schema_migrations') IS NOT NULL AS there

-- name: find_migration
SELECT EXISTS (SELECT FROM supabase_migrations.schema_migrations WHERE version = :version) AS there

-- name: list_history
SELECT version FROM supabase_migrations.schema_migrations ORDER BY version

-- name: lock_migrations
-- One migrator at a time; the lock ends with the transaction. The number spells "migr".
SELECT pg_advisory_xact_lock(1835624306)

-- name: record_migration
INSERT INTO supabase_migrations.schema_migrations (version, name, statements)
VALUES (:version, :name, :statements)
