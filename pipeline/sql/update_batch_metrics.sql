UPDATE ingest.batches SET metrics = CAST(:metrics AS jsonb) WHERE id = :batch_id
