SELECT code, count(*) AS rejects FROM pg_temp.found WHERE code IS NOT NULL GROUP BY code ORDER BY code
