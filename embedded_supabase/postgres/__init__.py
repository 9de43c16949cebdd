"""PostgreSQL from a wheel, started on a unix socket for one user."""
