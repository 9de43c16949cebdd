SELECT
    (SELECT count(*) FROM raw.recognition_files WHERE batch_id = :batch_id) AS recognition_files,
    (SELECT count(*) FROM raw.recipes WHERE batch_id = :batch_id) AS recipes,
    (SELECT count(*) FROM raw.menus WHERE batch_id = :batch_id) AS menus,
    (SELECT count(*) FROM raw.qwen_annotations WHERE batch_id = :batch_id) AS qwen_annotations
