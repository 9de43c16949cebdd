"""When `verify --deep` last read the objects of a bucket, and so proved that they are what was sent."""

from __future__ import annotations

import math
from typing import Any

from pipeline.config import command_line
from pipeline.units import counted, moment


def describe_proofs(proofs: dict[str, Any], production: bool) -> str:
    """Return a row of count_proofs as a sentence, empty without objects; its values are those of JSON."""
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
