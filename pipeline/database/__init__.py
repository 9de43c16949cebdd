"""PostgreSQL: connections, COPY, what errors mean, migrations, and the statements."""

from pipeline.database.connection import MINIMUM_VERSION, Connection, Database
from pipeline.database.copy import line_of
from pipeline.database.errors import address_of, connection_string

__all__ = ["MINIMUM_VERSION", "Connection", "Database", "address_of", "connection_string", "line_of"]
