-- One row a photo in the annotations file; detections is NULL where its value is of no use.
CREATE TEMP TABLE entries (
    recognition_id bigint NOT NULL,
    camera_number smallint NOT NULL,
    path text NOT NULL,
    position bigint NOT NULL,
    size bigint NOT NULL,
    md5 text NOT NULL,
    detections bigint
) ON COMMIT DROP
