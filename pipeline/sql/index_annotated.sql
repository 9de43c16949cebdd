CREATE UNIQUE INDEX annotated_recognition ON pg_temp.annotated (recognition_id)
