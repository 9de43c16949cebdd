INSERT INTO ingest.batches (id, kind, state, source, recognition_limit, force, strict, bucket, found, already_loaded,
    held_elsewhere, held_by, superseded_copies, beyond_limit)
VALUES (:batch_id, :kind, 'loading', :source, :recognition_limit, :force, :strict, :bucket, :found, :already_loaded,
    :held_elsewhere, :held_by, :superseded_copies, :beyond_limit)
ON CONFLICT (id) DO UPDATE
    SET kind = excluded.kind, state = 'loading', source = excluded.source,
        recognition_limit = excluded.recognition_limit, force = excluded.force, strict = excluded.strict,
        bucket = excluded.bucket, found = excluded.found, already_loaded = excluded.already_loaded,
        held_elsewhere = excluded.held_elsewhere, held_by = excluded.held_by,
        superseded_copies = excluded.superseded_copies, beyond_limit = excluded.beyond_limit, version = NULL,
        created_at = clock_timestamp(), finished_at = NULL, reset_at = NULL, metrics = '{}'
    WHERE batches.state = 'reset'
