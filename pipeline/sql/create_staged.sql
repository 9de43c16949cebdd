CREATE TEMP TABLE staged (
    recognition_id bigint PRIMARY KEY,
    captured_on date,
    photo_paths text[],
    photo_sizes bigint[],
    photo_mtimes bigint[],
    menu_path text,
    menu_size bigint,
    menu_mtime bigint,
    receipt_path text,
    receipt_size bigint,
    receipt_mtime bigint
) ON COMMIT DROP
