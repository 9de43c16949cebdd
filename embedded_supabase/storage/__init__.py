"""A server of the Supabase Storage protocol that keeps its objects as files: `python -m embedded_supabase.storage`."""
