"""When `verify --deep` last read the objects of a bucket, and so proved that they are what was sent."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any, NamedTuple

from pipeline.config import command_line
from pipeline.database import Connection
from pipeline.units import counted, moment


class Proofs(NamedTuple):
    """How many objects there are, how many were read, when the longest unread of these was, and the database's time."""

    objects: int
    proven: int
    oldest: datetime | None
    now: datetime

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        oldest = self.oldest.isoformat() if self.oldest else None
        days = (self.now - self.oldest).total_seconds() / 86400 if self.oldest else None
        return {"objects": self.objects, "never_read": self.objects - self.proven, "oldest": oldest, "days": days}


def find_proofs(connection: Connection, bucket: str, batch_id: str | None = None) -> Proofs:
    """Return the proofs of the finished batches in a bucket, or of one batch."""
    return Proofs(*connection.one("count_proofs", bucket=bucket, batch_id=batch_id))


def describe_proofs(proofs: dict[str, Any], production: bool) -> str:
    """Return the values of `as_dict` as a sentence, empty without objects."""
    objects, never, oldest = proofs["objects"], proofs["never_read"], proofs["oldest"]
    if not objects:
        return ""
    if never:
        others = f"; the oldest proof of the others is of {moment(oldest)}" if oldest else ""
        command = command_line("verify --deep --minutes 20", production)
        which = f"{never} of {counted(objects, 'object')} not" if oldest else "no object was"
        return f"{which} read back yet{others}: `{command}`"
    days = math.ceil(proofs["days"])
    within = f"{days} days" if days > 1 else "day"
    return f"every object was read within the last {within}; the oldest proof is of {moment(oldest)}"
