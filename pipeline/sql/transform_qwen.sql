SELECT operation, rows_written, seconds FROM ingest.transform_qwen(:batch_id)
