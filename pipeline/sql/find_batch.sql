SELECT id, kind, state, source, recognition_limit, force, strict, bucket, shards, recognitions, photos, bytes,
    detections, found, already_loaded, held_elsewhere, held_by, superseded_copies, beyond_limit, version,
    created_at, finished_at, reset_at, metrics
FROM ingest.batches
WHERE id = :batch_id
