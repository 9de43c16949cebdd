-- One migrator at a time; the lock ends with the transaction. The number spells "migr".
SELECT pg_advisory_xact_lock(1835624306)
