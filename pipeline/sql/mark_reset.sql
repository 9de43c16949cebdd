-- The row stays: that the batch was there, and when it went, is history.
UPDATE ingest.batches SET state = 'reset', reset_at = clock_timestamp(), version = NULL WHERE id = :batch_id
