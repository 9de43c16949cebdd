SELECT EXISTS (SELECT FROM supabase_migrations.schema_migrations WHERE version = :version) AS there
