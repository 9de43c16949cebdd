-- End a connection that its client lost: the server itself would notice after a minute.
SELECT pg_terminate_backend(pid) AS ended
FROM pg_stat_activity
WHERE pid = :pid AND backend_start = :backend_start AND application_name = :application
