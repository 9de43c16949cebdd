"""A server of the Supabase Storage API that stores objects as files: `python -m embedded_supabase.storage`."""
