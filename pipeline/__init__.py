"""Load datasets of canteen-tray photos into Supabase, in batches, exactly once."""
