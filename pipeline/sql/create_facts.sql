CREATE TEMP TABLE facts (
    recognition_id bigint PRIMARY KEY,
    widths integer[],
    heights integer[],
    orientations smallint[],
    sha256s text[],
    md5s text[],
    menu_sha256 text,
    receipt_sha256 text
) ON COMMIT DROP
