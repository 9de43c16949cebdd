-- The server's process behind this transaction, and what it takes the client's name to be.
SELECT pg_backend_pid() AS pid, current_setting('application_name') AS application
