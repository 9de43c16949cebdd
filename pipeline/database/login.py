"""What a refused login means, by the words of libpq and the server: the one place that reads them.

libpq gives no SQLSTATE for a connection that failed, and Supavisor sends XX000 for most refusals. The words are those
of PostgreSQL (src/backend/libpq/auth.c, src/backend/utils/init/), libpq (src/interfaces/libpq/fe-*.c), PgBouncer
(src/client.c, src/objects.c) and Supavisor (lib/supavisor/errors/, before that lib/supavisor/client_handler/error.ex).
A server with another `lc_messages` is not understood; its message is shown as it is.
"""

from __future__ import annotations

import re

from pipeline.errors import AccessDenied, DatabaseUnavailable, PipelineError, SettingsError

_PARAMETER = (
    "Correct or remove it in DATABASE_URL or, if it is not there, in the environment (PGOPTIONS, PGSSLMODE …). "
    "sslmode=require encrypts without checking a certificate."
)
_BLOCKED = "The pooler blocks logins for minutes: check the password in DATABASE_URL, and of other clients, then wait."
_FULL = "Close other clients, lower connection_pool_size, or use the transaction pooler's address (port 6543)."
_STARTING = "Run the same command again once it has started."
_TENANT = (
    "The user for a pooler is postgres.<project>, and its host is that of the project's region: copy both from Connect "
    "in the dashboard. A paused or banned project is unknown, too."
)
_ENCRYPT = "Add sslmode=require to DATABASE_URL; if it is there, let this machine's address in, in pg_hba.conf."
_ADDRESS = "Let the address of this machine in: Network Restrictions in the dashboard, else pg_hba.conf."
_NO_SSL = "Remove sslmode from DATABASE_URL, or set up SSL on the server."
_CERTIFICATE = (
    "Name the root certificate of the server with sslrootcert, and the certificate and key of the user with sslcert "
    "and sslkey, in DATABASE_URL; sslmode=require does not check the server's."
)
_DEMAND = "Remove the parameter of DATABASE_URL that demands it, or name another server."
_DATABASE = (
    "Correct the name of the database in DATABASE_URL (on Supabase it is postgres), or let this user in: "
    "ALTER DATABASE … ALLOW_CONNECTIONS true, GRANT CONNECT ON DATABASE …, ALTER ROLE … LOGIN."
)
_PASSWORD = "Check the user and the password in DATABASE_URL, and percent-encode special characters."
_ANSWERED = "The server answers: look at its log, and check user, password, database and parameters in DATABASE_URL."

#: The first match decides. A circuit breaker or a full pooler is transient: it passes without a change of settings.
_REFUSALS: tuple[tuple[str, type[PipelineError], str], ...] = (
    ("^(connection to .*? failed: )?(invalid |weak |require_auth )", SettingsError, _PARAMETER),
    ("^(connection to .*? failed: )?could not (parse|match) ", SettingsError, _PARAMETER),
    ("service file|definition of service", SettingsError, _PARAMETER),
    ('(configuration|startup|for|set) parameter|parameter "" cannot|command-line argument', SettingsError, _PARAMETER),
    ("ECIRCUITBREAKER|circuit breaker open", DatabaseUnavailable, _BLOCKED),
    ("EMAXCONN|max clients reached|max client connections reached|max pools count", DatabaseUnavailable, _FULL),
    ("too many clients|connection slots are reserved|too many connections for", DatabaseUnavailable, _FULL),
    ("no more connections allowed|unable to check out", DatabaseUnavailable, _FULL),
    ("the database system is", DatabaseUnavailable, _STARTING),
    ("ENOTFOUND|tenant or user not found|tenant identifier|tenant is banned", AccessDenied, _TENANT),
    ("invalid format for user", AccessDenied, _TENANT),
    ("ESSLREQUIRED|SSL (connection is )?required|no encryption|SSL off|is insecure", AccessDenied, _ENCRYPT),
    ("EADDRNOTALLOWED|not in tenant allow_list|pg_hba.conf", AccessDenied, _ADDRESS),
    ("server does not support SSL", AccessDenied, _NO_SSL),
    ("certificate|private key", AccessDenied, _CERTIFICATE),
    ("channel binding|authentication method|GSSAPI encryption required", AccessDenied, _DEMAND),
    ("session is (not )?read-only|in hot standby mode", AccessDenied, _DEMAND),
    ('database "" (does not exist|is disabled)', AccessDenied, _DATABASE),
    ("no such database|permission denied for database", AccessDenied, _DATABASE),
    ("not currently accepting connections|is not permitted to log in", AccessDenied, _DATABASE),
    ("authentication (failed|error|query)|auth failed|EAUTHQUERY|password", AccessDenied, _PASSWORD),
    ('no such user|user not found|no user|role "" does not exist', AccessDenied, _PASSWORD),
)


def login_refusal(message: str, *, is_answer: bool = False) -> PipelineError | None:
    """Return the error for what libpq or a server says to a login, None for an outage.

    An answer of a server in other words, or in another language, is no outage of the network.
    """
    words = re.sub('"[^"]*"', '""', message)  # without the names of hosts, users and databases
    for pattern, kind, hint in _REFUSALS:
        if re.search(pattern, words, re.IGNORECASE):
            if kind is SettingsError:
                return kind(f"A parameter of the connection is refused: {message.rpartition(' failed: ')[2]}", hint)
            what = "PostgreSQL refuses the login" if kind is AccessDenied else "PostgreSQL takes no connection now"
            return kind(f"{what}: {message}", hint)
    return DatabaseUnavailable(f"PostgreSQL takes no connection now: {message}", _ANSWERED) if is_answer else None
