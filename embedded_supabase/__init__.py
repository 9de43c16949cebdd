"""PostgreSQL and Supabase Storage for a machine that has nothing but pip."""
