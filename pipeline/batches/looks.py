"""Looks: what each discovery saw. One that finds nothing to load makes no batch, and completes its load request."""

from __future__ import annotations

import json
from datetime import date, datetime
from typing import Any, NamedTuple

from pipeline.batches.state import KIND_QWEN
from pipeline.database import Connection
from pipeline.units import counted

#: The options of a load that a run which resumes it has to share.
OPTIONS = ("limit", "force", "changed", "coordinates", "exif_turned")
_NUMBERS = ("held_elsewhere", "held_by", "superseded_copies", "beyond_limit", "rejects", "notices", "files")


class Look(NamedTuple):
    """A row of ingest.looks; `seen` has the options of the load, and further numbers."""

    batch_id: str
    kind: str
    source: str
    bucket: str
    looked_at: datetime
    batch_made: bool
    found: int
    already_loaded: int
    changed: int
    rejected: int
    known_rejects: int
    newest: date | None
    seen: dict[str, Any]


def record_look(connection: Connection, request: Any, found: Any) -> None:
    """Record what a discovery saw: the request and the result of pipeline.steps.discover."""
    values = {**vars(request), **vars(found)}
    values["seen"] = json.dumps({name: values[name] for name in (*OPTIONS, *_NUMBERS)})
    values["already_loaded"] += found.changed_since_load if request.changed and found.batch_made else 0
    values |= {"changed": found.changed_since_load, "rejected": sum(found.rejects.values())}
    connection.execute("insert_look", **values)


def find_look(connection: Connection, batch_id: str) -> Look | None:
    """Return what was seen when a load request with this id was looked at, None if it was not."""
    rows = connection.execute("find_look", batch_id=batch_id)
    return Look(**rows[0]._asdict()) if rows else None


def describe_changed(kind: str, changed: int, taken: bool) -> str:
    """Return a sentence about what changed since it was loaded."""
    what = counted(changed, "photo" if kind == KIND_QWEN else "recognition")
    text = f"{what} " + ("changed since it was loaded" if changed == 1 else "changed since they were loaded")
    command = "load-qwen --changed" if kind == KIND_QWEN else "load --changed"
    return f"{text}." if taken else f"{text}: {command}"


def describe_known(rejects: int) -> str:
    """Return a sentence about rejects that earlier looks recorded."""
    return f"Known rejects: {rejects}, recorded by earlier loads and unchanged."
