-- An early Supabase CLI made the table with its first column only.
ALTER TABLE supabase_migrations.schema_migrations
    ADD COLUMN IF NOT EXISTS statements text[],
    ADD COLUMN IF NOT EXISTS name text
