"""What a refused login means, by the words of the server: the one place that reads them.

libpq gives no SQLSTATE for a connection that failed, and Supavisor sends XX000 for most refusals. The words are those
of PostgreSQL (src/backend/libpq/auth.c, src/backend/utils/init/), libpq (src/interfaces/libpq/fe-*.c), PgBouncer
(src/client.c, src/objects.c) and Supavisor (lib/supavisor/errors/, before that lib/supavisor/client_handler/error.ex).
A server with another `lc_messages` is not understood; its message is shown as it is.
"""

from __future__ import annotations

import re

from pipeline.errors import AccessDenied, DatabaseUnavailable, PipelineError

_BLOCKED = (
    "The pooler blocks logins for some minutes: check the password in DATABASE_URL and those of other clients, then "
    "wait before the next try."
)
_FULL = "Close other clients, lower connection_pool_size, or use the transaction pooler's address (port 6543)."
_TENANT = (
    "The user for a pooler is postgres.<project>, and its host is that of the project's region: copy both from Connect "
    "in the dashboard. A paused project is unknown, too."
)
_ENCRYPT = "Add sslmode=require to DATABASE_URL; if it is there, let this machine's address in, in pg_hba.conf."
_ADDRESS = "Let the address of this machine in: Network Restrictions in the dashboard, else pg_hba.conf."
_NO_SSL = "Remove sslmode from DATABASE_URL, or set up SSL on the server."
_CERTIFICATE = "Name the root certificate of the server with sslrootcert, or use sslmode=require, in DATABASE_URL."
_CLIENT = "Name the certificate and key of the user with sslcert and sslkey in DATABASE_URL."
_DEMAND = "Remove the parameter of DATABASE_URL that demands it."
_DATABASE = "Correct the name of the database in DATABASE_URL; on Supabase it is postgres."
_CLOSED = "Use another database, or let connections in: ALTER DATABASE … ALLOW_CONNECTIONS true."
_CONNECT = "GRANT CONNECT ON DATABASE … to the role, or name another user in DATABASE_URL."
_LOGIN = "ALTER ROLE … LOGIN, or name another user in DATABASE_URL."
_PASSWORD = "Check the user and the password in DATABASE_URL, and percent-encode special characters."
_BANNED = "Look at the project in the dashboard."
_STARTING = "Run the same command again once it has started."

#: The first match decides. A circuit breaker or a full pooler is transient: it passes without a change of settings.
_REFUSALS: tuple[tuple[str, type[PipelineError], str], ...] = (
    ("ECIRCUITBREAKER|circuit breaker open", DatabaseUnavailable, _BLOCKED),
    ("EMAXCONN|max clients reached|max client connections reached|max pools count", DatabaseUnavailable, _FULL),
    ("too many clients|connection slots are reserved|too many connections for", DatabaseUnavailable, _FULL),
    ("no more connections allowed|unable to check out", DatabaseUnavailable, _FULL),
    ("the database system is", DatabaseUnavailable, _STARTING),
    ("ENOTFOUND|tenant or user not found|no tenant identifier|invalid format for user", AccessDenied, _TENANT),
    ("tenant is banned", AccessDenied, _BANNED),
    ("ESSLREQUIRED|SSL connection is required|SSL required|no encryption|SSL off", AccessDenied, _ENCRYPT),
    ("EADDRNOTALLOWED|not in tenant allow_list|pg_hba.conf", AccessDenied, _ADDRESS),
    ("server does not support SSL", AccessDenied, _NO_SSL),
    ("client certificate", AccessDenied, _CLIENT),
    ("certificate", AccessDenied, _CERTIFICATE),
    ("channel binding|authentication method|GSSAPI encryption required", AccessDenied, _DEMAND),
    ('database "" does not exist|no such database', AccessDenied, _DATABASE),
    ("not currently accepting connections", AccessDenied, _CLOSED),
    ("permission denied for database", AccessDenied, _CONNECT),
    ("is not permitted to log in", AccessDenied, _LOGIN),
    ("authentication failed|password|no such user|user not found", AccessDenied, _PASSWORD),
    ('role "" does not exist', AccessDenied, _PASSWORD),
)


def login_refusal(message: str) -> PipelineError | None:
    """Return the error for what a server says to a login, None if it says something else."""
    words = re.sub('"[^"]*"', '""', message)  # without the names of hosts, users and databases
    for pattern, kind, hint in _REFUSALS:
        if re.search(pattern, words, re.IGNORECASE):
            what = "PostgreSQL refuses the login" if kind is AccessDenied else "PostgreSQL takes no connection now"
            return kind(f"{what}: {message}", hint)
    return None
