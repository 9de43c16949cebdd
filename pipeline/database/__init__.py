"""PostgreSQL: connections, COPY, what errors mean, migrations, and the statements."""

from pipeline.database.address import address_of, foreign_remark, override_remark, target_of
from pipeline.database.connection import Connection, Database
from pipeline.database.copy import line_of

__all__ = [
    "Connection",
    "Database",
    "address_of",
    "foreign_remark",
    "line_of",
    "override_remark",
    "target_of",
]
