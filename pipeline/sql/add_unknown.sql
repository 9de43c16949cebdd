-- A photo of a recognition that is not loaded is a reject of its own.
INSERT INTO pg_temp.found (recognition_id, path, code, message)
SELECT e.recognition_id, e.path, 'recognition_unknown', 'the recognition ' || e.recognition_id || ' is not loaded'
FROM pg_temp.entries e
JOIN pg_temp.annotated a USING (recognition_id)
WHERE NOT a.known
