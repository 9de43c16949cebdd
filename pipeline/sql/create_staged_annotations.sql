-- A recognition without any detection is loaded only to take the place of a former version.
CREATE TEMP TABLE staged ON COMMIT DROP AS
SELECT recognition_id, cameras, paths, positions, sizes, md5s
FROM pg_temp.annotated
WHERE known AND NOT loaded AND holder IS NULL AND (detections > 0 OR (:force AND detections = 0))
