CREATE SCHEMA IF NOT EXISTS supabase_migrations
