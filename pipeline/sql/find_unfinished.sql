-- The newest unfinished batch that the same command would have made.
SELECT id
FROM ingest.batches
WHERE state = 'loading' AND kind = :kind AND source = :source AND force = :force
    AND (kind <> 'load' OR bucket = :bucket)
    AND recognition_limit IS NOT DISTINCT FROM CAST(:recognition_limit AS bigint)
ORDER BY created_at DESC, id DESC
LIMIT 1
