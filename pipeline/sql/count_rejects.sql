SELECT code, count(*) AS rejects FROM ingest.rejects WHERE batch_id = :batch_id GROUP BY code ORDER BY code
