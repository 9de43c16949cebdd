-- Recognitions of a batch for people to look at, each time the same: in turn from some of the shards with the marker of
-- a step, spread evenly over them; those with annotations first.
WITH ready AS (
    SELECT shard, row_number() OVER (ORDER BY shard) AS nth, count(*) OVER () AS shards
    FROM ingest.batch_state
    WHERE batch_id = :batch_id AND step = :step AND shard > 0
)
SELECT one.recognition_id
FROM ready
CROSS JOIN LATERAL (
    SELECT found.*, row_number() OVER (ORDER BY found.annotated DESC, found.position) AS turn
    FROM (
        SELECT m.recognition_id, md5(m.recognition_id::text) AS position, EXISTS (
            SELECT FROM public.images i
            JOIN public.initial_annotations a ON a.image_id = i.id
            WHERE i.recognition_id = m.recognition_id
        ) AS annotated
        FROM ingest.manifest m
        WHERE m.batch_id = :batch_id AND m.shard = ready.shard AND NOT m.rejected
        ORDER BY annotated DESC, position
        LIMIT :count
    ) found
) one
WHERE ready.nth * :count / ready.shards <> (ready.nth - 1) * :count / ready.shards
ORDER BY one.annotated DESC, one.turn, one.position
LIMIT :count
