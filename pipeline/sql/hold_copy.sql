-- Hold the batch and its COPY of a shard. Each statement sees what was committed before it began, so that whatever comes
-- next sees what these waited for. Right after a bulk load there are no statistics of the batch, and a scan of all batches
-- looks cheap.
SELECT set_config('enable_seqscan', 'off', true);
SELECT FROM ingest.batches WHERE id = :batch_id FOR SHARE;
SELECT pg_advisory_xact_lock(hashtextextended('pipeline.step:' || :batch_id || '/copy/' || :shard, 0))
