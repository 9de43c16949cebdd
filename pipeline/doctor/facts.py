"""What one part of the examination learns and another one needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.doctor.clock import Offset


@dataclass
class Facts:
    """Facts, each written by one part only.

    Attributes:
        pool_size: connections that a worker process opens at most.
        offsets: of the clocks of the services that answered.
        bucket: the bucket's settings, None when it does not exist or Storage did not say.
        bucket_missing: Storage says that there is none.
        photos_stored: photos of finished batches that should be in it.
        unfinished: batches.
    """

    pool_size: int
    offsets: dict[str, Offset] = field(default_factory=dict)
    bucket: dict[str, Any] | None = None
    bucket_missing: bool = False
    photos_stored: int = 0
    unfinished: int = 0
