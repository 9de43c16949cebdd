-- Whoever writes a marker, or removes what its absence allows to remove, goes alone until the end of the transaction.
SELECT pg_advisory_xact_lock(hashtextextended('pipeline.step:' || :batch_id || '/' || :step || '/' || :shard, 0))
