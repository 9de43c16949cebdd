"""Facts that one part of the doctor finds and another part needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pipeline.doctor.clock import Offset


@dataclass
class Facts:
    """Facts, each written by one part only.

    Attributes:
        pool_size: maximum connections of a worker process.
        max_age: hours after which the last look at a source is a problem, None for never.
        offsets: of the services' clocks.
        bucket: the bucket's settings, None if it does not exist or is unknown.
        bucket_missing: the bucket does not exist.
        recorded: batches with objects in the bucket, and when it was created.
        unfinished: number of unfinished batches.
        older_photo: key of a photo that another tool stored, and that no batch has on record.
    """

    pool_size: int
    max_age: float | None = None
    offsets: dict[str, Offset] = field(default_factory=dict)
    bucket: dict[str, Any] | None = None
    bucket_missing: bool = False
    recorded: dict[str, datetime | None] = field(default_factory=dict)
    unfinished: int = 0
    older_photo: str = ""
