"""Batches on record: their state, lock and summary, and which one a load request means."""
