-- After discovery, and again at the commit, when uploads may have rejected some.
UPDATE ingest.batches b
SET shards = coalesce(m.shards, 0), recognitions = coalesce(m.recognitions, 0), photos = coalesce(m.photos, 0),
    bytes = coalesce(m.bytes, 0)
FROM (
    SELECT max(shard) AS shards, count(*) AS recognitions, 2 * count(*) AS photos,
        sum(photo_sizes[1] + photo_sizes[2])::bigint AS bytes
    FROM ingest.manifest WHERE batch_id = :batch_id
) m
WHERE b.id = :batch_id
RETURNING b.shards, b.recognitions, b.photos, b.bytes
