"""SQL statements, one a file, that can be pasted into psql."""
