-- After discovery; the commit counts again, when shards may have rejected some.
UPDATE ingest.batches b
SET shards = coalesce(m.shards, 0), recognitions = coalesce(m.recognitions, 0), photos = coalesce(m.photos, 0),
    bytes = coalesce(m.bytes, 0), detections = 0
FROM (
    SELECT max(shard) AS shards, count(*) AS recognitions, sum(cardinality(photo_paths)) AS photos,
        sum((SELECT sum(size) FROM unnest(photo_sizes) AS size))::bigint AS bytes
    FROM ingest.manifest WHERE batch_id = :batch_id
) m
WHERE b.id = :batch_id
RETURNING b.shards, b.recognitions, b.photos, b.bytes
