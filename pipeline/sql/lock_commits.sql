-- One batch commits at a time: versions follow the order of commits. The number spells "comm".
SELECT pg_advisory_xact_lock(1668246893)
