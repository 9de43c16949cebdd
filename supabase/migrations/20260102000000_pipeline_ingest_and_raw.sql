-- The pipeline's own bookkeeping (schema ingest) and what the datasets said, batch by batch (schema raw).

-- This file and those after it change nothing when they run again, as where the Supabase CLI applies an exported copy of
-- what `migrate` applied. A table that somebody else made under a name of ours is not taken over.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'raw.photos', 'raw.receipts', 'raw.menus', 'raw.detections', 'public.menus', 'public.menu_items']
    LOOP
        IF to_regclass(name) IS NOT NULL AND to_regclass('ingest.batches') IS NULL THEN
            RAISE EXCEPTION '% is in the way: the loader needs a table of its own under that name', name
                USING HINT = 'Rename it, or move it to another schema.', ERRCODE = 'duplicate_table';
        END IF;
    END LOOP;
END
$$;

CREATE SCHEMA IF NOT EXISTS ingest;
CREATE SCHEMA IF NOT EXISTS raw;

COMMENT ON SCHEMA ingest IS 'Bookkeeping of the batch loader: batches, markers, manifests, rejects.';
COMMENT ON SCHEMA raw IS 'What the datasets said, one set of rows per batch; append-only.';

CREATE TABLE IF NOT EXISTS ingest.schema_migrations (
    version text NOT NULL,
    name text PRIMARY KEY,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE ingest.schema_migrations IS
    'The migrations that `migrate` applied where the history of the Supabase CLI is an app''s; SHA-256 of their text.';

CREATE TABLE IF NOT EXISTS ingest.batches (
    id text PRIMARY KEY CHECK (id ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$' AND id !~ '\.\.'),
    kind text NOT NULL CHECK (kind IN ('load', 'qwen')),
    state text NOT NULL CHECK (state IN ('loading', 'held', 'done', 'resetting', 'reset')),
    source text NOT NULL,
    recognition_limit bigint CHECK (recognition_limit > 0),
    force boolean NOT NULL DEFAULT false,
    -- Whether it takes what changed since it was loaded.
    changed boolean NOT NULL DEFAULT false,
    strict boolean NOT NULL DEFAULT false,
    bucket text NOT NULL,
    -- As Storage says it: with the bucket's id it tells one project's bucket from another's.
    bucket_created_at timestamptz,
    -- What the model's numbers mean, for annotations.
    coordinates text NOT NULL DEFAULT 'pixels',
    exif_turned boolean NOT NULL DEFAULT false,
    shards integer NOT NULL DEFAULT 0,
    recognitions bigint NOT NULL DEFAULT 0,
    photos bigint NOT NULL DEFAULT 0,
    bytes bigint NOT NULL DEFAULT 0,
    detections bigint NOT NULL DEFAULT 0,
    -- Discovery: what the dataset has beyond this batch.
    found bigint NOT NULL DEFAULT 0,
    already_loaded bigint NOT NULL DEFAULT 0,
    held_elsewhere bigint NOT NULL DEFAULT 0,
    held_by text[] NOT NULL DEFAULT '{}',
    superseded_copies bigint NOT NULL DEFAULT 0,
    beyond_limit bigint NOT NULL DEFAULT 0,
    -- Number of files below the source, by class: used, unchanged, not_taken, rejected, passed_over, clutter.
    files jsonb NOT NULL DEFAULT '{}',
    -- Why a batch that is complete was not published, and when it was released.
    held_reason text,
    released_at timestamptz,
    -- The order of commits: of two finished batches with one recognition, the higher version is what readers see.
    version bigint UNIQUE,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    reset_at timestamptz,
    -- Whether another tool loaded it, and the id that it had there, if any.
    adopted boolean NOT NULL DEFAULT false,
    adopted_from text,
    metrics jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX IF NOT EXISTS batches_created_at ON ingest.batches (created_at);
CREATE INDEX IF NOT EXISTS batches_unfinished ON ingest.batches (kind, source) WHERE state IN ('loading', 'held', 'resetting');

CREATE TABLE IF NOT EXISTS ingest.batch_state (
    batch_id text NOT NULL REFERENCES ingest.batches (id),
    step text NOT NULL,
    shard integer NOT NULL DEFAULT 0 CHECK (shard >= 0),
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    worker text NOT NULL DEFAULT '',
    metrics jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (batch_id, step, shard)
);
COMMENT ON TABLE ingest.batch_state IS
    'Markers: a row says that a step is done, for a shard (from 1) or for the whole batch (shard 0).';

CREATE TABLE IF NOT EXISTS ingest.manifest (
    batch_id text NOT NULL REFERENCES ingest.batches (id),
    recognition_id bigint NOT NULL CHECK (recognition_id >= 0),
    shard integer NOT NULL CHECK (shard > 0),
    captured_on date,
    -- Arrays of two: camera 1, camera 2. Paths are relative to the batch's source; an adopted batch has none, and NULL
    -- where a photo is missing.
    photo_paths text[] NOT NULL,
    photo_sizes bigint[] NOT NULL,
    photo_mtimes bigint[] NOT NULL,
    object_keys text[] NOT NULL,
    menu_path text,
    menu_size bigint,
    menu_mtime bigint,
    receipt_path text,
    receipt_size bigint,
    receipt_mtime bigint,
    -- Known when the photos have been read, that is with the marker of the shard's upload.
    widths integer[],
    heights integer[],
    orientations smallint[],
    sha256s text[], -- of annotations: of the values of the photos in the file
    md5s text[],
    menu_sha256 text,
    receipt_sha256 text,
    -- Of annotations: the cameras whose photos the batch annotates; NULL in a load, which has both. And the content of
    -- these photos, NULL where it is not known.
    cameras smallint[],
    photo_sha256s text[],
    -- As ingest.identity_of gives it, of the files that a later look found equal in content to what was loaded.
    seen text,
    -- Left out after its photos were uploaded; before the commit, its objects are removed and this row.
    rejected boolean NOT NULL DEFAULT false,
    PRIMARY KEY (batch_id, recognition_id)
) WITH (fillfactor = 60);
CREATE INDEX IF NOT EXISTS manifest_shard ON ingest.manifest (batch_id, shard);
CREATE INDEX IF NOT EXISTS manifest_recognition ON ingest.manifest (recognition_id);
CREATE INDEX IF NOT EXISTS manifest_rejected ON ingest.manifest (batch_id) WHERE rejected;
CREATE INDEX IF NOT EXISTS manifest_adopted ON ingest.manifest ((recognition_id::text) COLLATE "C") WHERE photo_paths = '{}';
COMMENT ON TABLE ingest.manifest IS 'What a batch contains, written before any upload. Times are nanoseconds since 1970.';

CREATE TABLE IF NOT EXISTS ingest.claims (
    kind text NOT NULL CHECK (kind IN ('load', 'qwen')),
    recognition_id bigint NOT NULL,
    batch_id text NOT NULL REFERENCES ingest.batches (id),
    PRIMARY KEY (kind, recognition_id)
);
CREATE INDEX IF NOT EXISTS claims_batch ON ingest.claims (batch_id);
COMMENT ON TABLE ingest.claims IS 'Which unfinished batch holds a recognition: at most one.';

CREATE OR REPLACE FUNCTION ingest.name_of(path text) RETURNS text
LANGUAGE sql IMMUTABLE
AS $$
-- A path from the folder of its recognition on, which is the same wherever the dataset is; else the path.
    SELECT coalesce(substring(path FROM '(?i)(?:^|/)((?:recognition_)?[0-9]+(?:/.*|$))'), path)
$$;

CREATE OR REPLACE FUNCTION ingest.content_of(is_notice boolean, path text, code text, message text) RETURNS text
LANGUAGE sql IMMUTABLE
AS $$
-- What makes two notices or two rejects of a recognition the same; NULL without a code.
    SELECT CASE WHEN code IS NOT NULL THEN CASE WHEN is_notice THEN path ELSE ingest.name_of(path) END || code || message END
$$;

CREATE OR REPLACE FUNCTION ingest.sizes_of(identity text) RETURNS text
LANGUAGE sql IMMUTABLE
AS $$
-- Size and name of each file of an identity, without its time and the place of the dataset.
    SELECT string_agg(split_part(file, ' ', 1) || ' ' || ingest.name_of(regexp_replace(file, '^[0-9]+ [0-9]+ ', '')), '//'
        ORDER BY position)
    FROM unnest(string_to_array(identity, '//')) WITH ORDINALITY AS f (file, position)
$$;

CREATE TABLE IF NOT EXISTS ingest.rejects (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    batch_id text NOT NULL REFERENCES ingest.batches (id),
    recognition_id bigint,
    path text NOT NULL,
    code text NOT NULL,
    message text NOT NULL,
    step text NOT NULL,
    shard integer NOT NULL DEFAULT 0,
    -- As ingest.identity_of gives it, of a recognition whose files are not worth reading again until they change.
    identity text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- When a later look at the source no longer found it, or a later batch loaded the recognition.
    over_at timestamptz
);
CREATE INDEX IF NOT EXISTS rejects_batch ON ingest.rejects (batch_id, step, shard);
CREATE INDEX IF NOT EXISTS rejects_recognition ON ingest.rejects (recognition_id);
COMMENT ON TABLE ingest.rejects IS 'Inputs that a batch left out, each with its reason.';

CREATE TABLE IF NOT EXISTS ingest.notices (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- A batch, or a look that made none.
    batch_id text NOT NULL,
    recognition_id bigint,
    path text NOT NULL,
    code text NOT NULL,
    message text NOT NULL,
    step text NOT NULL,
    shard integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- When a later look at the source no longer found it.
    over_at timestamptz
);
CREATE INDEX IF NOT EXISTS notices_batch ON ingest.notices (batch_id, step, shard);
-- Equal notices of earlier looks. By hash, since a path may be longer than an entry of a B-tree.
CREATE INDEX IF NOT EXISTS notices_other_photo ON ingest.notices (recognition_id)
    WHERE code = 'annotations_other_photo' AND over_at IS NULL;
CREATE INDEX IF NOT EXISTS notices_content ON ingest.notices USING hash ((path || code || message));
COMMENT ON TABLE ingest.notices IS
    'Inputs that were passed over, or used in a way that a person should know of, each with its reason.';

CREATE TABLE IF NOT EXISTS ingest.looks (
    -- The id that the load request was resolved to; where there was nothing to load, no batch has it.
    batch_id text PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('load', 'qwen')),
    source text NOT NULL,
    bucket text NOT NULL,
    looked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    batch_made boolean NOT NULL,
    -- Recognitions, of annotations photos: what the source has, and what of it is loaded, also in another form.
    found bigint NOT NULL,
    already_loaded bigint NOT NULL,
    changed bigint NOT NULL,
    -- Inputs that cannot be used, those that an earlier look recorded apart.
    rejected bigint NOT NULL,
    known_rejects bigint NOT NULL,
    -- The last day on which a recognition of the source was captured.
    newest date,
    -- The options, and further numbers.
    seen jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX IF NOT EXISTS looks_looked_at ON ingest.looks (looked_at);
COMMENT ON TABLE ingest.looks IS 'What each discovery saw; one that found nothing to load made no batch.';

CREATE TABLE IF NOT EXISTS ingest.proofs (
    batch_id text NOT NULL REFERENCES ingest.batches (id) ON DELETE CASCADE,
    recognition_id bigint NOT NULL,
    camera_number smallint NOT NULL CHECK (camera_number IN (1, 2)),
    read_at timestamptz NOT NULL,
    PRIMARY KEY (batch_id, recognition_id, camera_number)
);
CREATE INDEX IF NOT EXISTS proofs_read_at ON ingest.proofs (read_at);
COMMENT ON TABLE ingest.proofs IS
    'When `verify --deep` last read an object and found the content on record; an object without a row was never read.';

CREATE TABLE IF NOT EXISTS ingest.adopted_rows (
    relation text NOT NULL,
    id bigint NOT NULL,
    recognition_id bigint NOT NULL,
    -- NULL for a row that was not there.
    content jsonb,
    -- Of an annotation, which belongs to an item that may be gone.
    label text,
    deleted boolean NOT NULL DEFAULT false,
    PRIMARY KEY (relation, id)
);
CREATE INDEX IF NOT EXISTS adopted_rows_recognition ON ingest.adopted_rows (recognition_id);
COMMENT ON TABLE ingest.adopted_rows IS
    'What adopted recognitions looked like before a batch of ours changed them, for the reset of that batch.';

CREATE OR REPLACE FUNCTION ingest.identity_of(m ingest.manifest) RETURNS text
LANGUAGE sql STABLE
AS $$
-- The files of a recognition as discovery saw them: size, time and path of each. A path has no two slashes in a row.
-- `Recognition.identity` in pipeline/dataset/records.py is the same.
    SELECT concat_ws('//', m.photo_sizes[1] || ' ' || m.photo_mtimes[1] || ' ' || m.photo_paths[1],
        m.photo_sizes[2] || ' ' || m.photo_mtimes[2] || ' ' || m.photo_paths[2],
        m.menu_size || ' ' || m.menu_mtime || ' ' || m.menu_path,
        m.receipt_size || ' ' || m.receipt_mtime || ' ' || m.receipt_path)
$$;

CREATE TABLE IF NOT EXISTS ingest.notifications (
    command text NOT NULL,
    problem text NOT NULL,
    told_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (command, problem)
);
COMMENT ON TABLE ingest.notifications IS 'Problems of commands that NOTIFY_URLS was told of, until they are over.';

-- The files of a batch by class. Until its commit, what discovery used and an upload or a copy rejected is rejected.
CREATE OR REPLACE FUNCTION ingest.files_of(batch ingest.batches) RETURNS jsonb
LANGUAGE sql STABLE
SET search_path = ''
AS $$
    SELECT CASE WHEN batch.state IN ('loading', 'held') AND batch.files ? 'used'
        THEN batch.files || jsonb_build_object('used', m.files,
            'rejected', (batch.files -> 'rejected')::bigint + (batch.files -> 'used')::bigint - m.files)
        ELSE batch.files END
    FROM (
        SELECT coalesce(sum(cardinality(photo_paths) + num_nonnulls(menu_path, receipt_path)), 0)::bigint AS files
        FROM ingest.manifest
        WHERE batch_id = batch.id AND NOT rejected
    ) m
$$;

CREATE TABLE IF NOT EXISTS raw.photos (
    batch_id text NOT NULL,
    recognition_id bigint NOT NULL,
    camera_number smallint NOT NULL CHECK (camera_number IN (1, 2)),
    captured_on date,
    source_path text NOT NULL,
    object_key text NOT NULL,
    width integer NOT NULL,
    height integer NOT NULL,
    orientation smallint NOT NULL,
    byte_size bigint NOT NULL,
    sha256 text NOT NULL,
    PRIMARY KEY (batch_id, recognition_id, camera_number)
);

CREATE TABLE IF NOT EXISTS raw.receipts (
    batch_id text NOT NULL,
    recognition_id bigint NOT NULL,
    receipt jsonb,
    menu_sha256 text,
    PRIMARY KEY (batch_id, recognition_id)
);
COMMENT ON TABLE raw.receipts IS 'One row a recognition: its till receipt, and the hash of its menu file in raw.menus.';

CREATE TABLE IF NOT EXISTS raw.menus (
    batch_id text NOT NULL,
    shard integer NOT NULL,
    sha256 text NOT NULL,
    content jsonb NOT NULL,
    PRIMARY KEY (batch_id, sha256, shard)
);
COMMENT ON TABLE raw.menus IS 'Each distinct menu file once a shard, by the SHA-256 of its bytes.';

CREATE TABLE IF NOT EXISTS raw.detections (
    batch_id text NOT NULL,
    recognition_id bigint NOT NULL,
    camera_number smallint NOT NULL CHECK (camera_number IN (1, 2)),
    detection integer NOT NULL CHECK (detection > 0),
    label text NOT NULL,
    x1 numeric NOT NULL,
    y1 numeric NOT NULL,
    x2 numeric NOT NULL,
    y2 numeric NOT NULL,
    PRIMARY KEY (batch_id, recognition_id, camera_number, detection)
);
COMMENT ON TABLE raw.detections IS
    'One row a detection, numbered from 1 on its photo; corners in pixels of the photo as it is stored, to 3 decimals.';

ALTER TABLE ingest.schema_migrations ENABLE ROW LEVEL SECURITY;
ALTER TABLE ingest.batches ENABLE ROW LEVEL SECURITY;
ALTER TABLE ingest.batch_state ENABLE ROW LEVEL SECURITY;
ALTER TABLE ingest.manifest ENABLE ROW LEVEL SECURITY;
ALTER TABLE ingest.claims ENABLE ROW LEVEL SECURITY;
ALTER TABLE ingest.notices ENABLE ROW LEVEL SECURITY;
ALTER TABLE ingest.rejects ENABLE ROW LEVEL SECURITY;
ALTER TABLE ingest.looks ENABLE ROW LEVEL SECURITY;
ALTER TABLE ingest.adopted_rows ENABLE ROW LEVEL SECURITY;
ALTER TABLE ingest.notifications ENABLE ROW LEVEL SECURITY;
ALTER TABLE ingest.proofs ENABLE ROW LEVEL SECURITY;
ALTER TABLE raw.photos ENABLE ROW LEVEL SECURITY;
ALTER TABLE raw.receipts ENABLE ROW LEVEL SECURITY;
ALTER TABLE raw.menus ENABLE ROW LEVEL SECURITY;
ALTER TABLE raw.detections ENABLE ROW LEVEL SECURITY;
