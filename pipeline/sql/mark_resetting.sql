UPDATE ingest.batches SET state = 'resetting' WHERE id = :batch_id
