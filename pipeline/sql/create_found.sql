CREATE TEMP TABLE found (
    recognition_id bigint,
    path text NOT NULL,
    code text,
    message text
) ON COMMIT DROP
