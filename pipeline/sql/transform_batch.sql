SELECT operation, rows_written, seconds FROM ingest.transform_batch(:batch_id)
