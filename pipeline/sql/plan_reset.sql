SELECT ingest.plan_reset(:batch_id)
