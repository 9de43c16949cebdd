-- The primary key decides between two discoveries at once; in order, so that they cannot wait for each other.
INSERT INTO ingest.claims (kind, recognition_id, batch_id)
SELECT :kind, s.recognition_id, :batch_id FROM pg_temp.staged s ORDER BY s.recognition_id
ON CONFLICT (kind, recognition_id) DO NOTHING
