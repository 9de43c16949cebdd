SELECT count(*) AS beyond FROM pg_temp.candidates WHERE recognition_id > :after
