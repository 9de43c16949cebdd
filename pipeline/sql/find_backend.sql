-- The server's process for this connection, as long as the transaction is open.
SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()
