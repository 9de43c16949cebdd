SELECT ingest.execute_reset(:batch_id) AS removed
