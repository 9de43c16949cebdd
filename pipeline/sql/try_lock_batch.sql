-- One run of a batch at a time; the lock ends with the transaction.
SELECT pg_try_advisory_xact_lock(hashtextextended('pipeline.batch:' || :batch_id, 0)) AS locked
