-- Which of these keys a batch's manifest has now.
SELECT key FROM ingest.manifest m CROSS JOIN unnest(m.object_keys) AS key
WHERE m.batch_id = :batch_id AND key = ANY (CAST(:keys AS text[]))
