-- What is wrong with photos that are not looked at this time is not told.
DELETE FROM pg_temp.found f
USING pg_temp.annotated a
WHERE a.recognition_id = f.recognition_id AND (NOT a.known OR a.loaded OR a.holder IS NOT NULL)
