"""Supabase Storage: the client, its errors, its transport and the limit of concurrent requests."""

from pipeline.storage.client import PAGE, Storage, StoredObject

__all__ = ["PAGE", "Storage", "StoredObject"]
