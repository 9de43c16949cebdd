-- Of how many recognitions an earlier batch's version comes back.
SELECT former AS batch_id, count(*) AS recognitions
FROM (SELECT CASE WHEN :kind = 'load' THEN batch_id ELSE qwen_batch_id END AS former FROM pg_temp.touched) t
WHERE former IS NOT NULL
GROUP BY former
ORDER BY former
