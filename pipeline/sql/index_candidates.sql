CREATE UNIQUE INDEX candidates_recognition ON pg_temp.candidates (recognition_id)
