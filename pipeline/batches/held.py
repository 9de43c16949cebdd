"""Held batches: why a complete batch is not published, and its release by a person."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pipeline.batches import state as batch_state
from pipeline.batches.resolve import LoadRequest, check_batch_id, require_schema
from pipeline.batches.state import KIND_LOAD, Batch
from pipeline.database import Connection
from pipeline.errors import ClaimedError, RefusedError, UsageError

#: The default of --max-rejects.
MAXIMUM_REJECTS = "20%"
_FEWEST = 10  # rejects that hold a batch
_LIMIT = re.compile(r"([0-9]{1,18})(%?)")


def check_max_rejects(text: str) -> tuple[int, bool]:
    """Return the number of a limit `N` or `N%`, and whether it is a percentage; raise UsageError for anything else."""
    found = _LIMIT.fullmatch(text)
    if found is None or (found[2] and int(found[1]) > 100):
        hint = "Use a number, such as 50, or a percentage up to 100, such as 20%."
        raise UsageError(f"--max-rejects is {text!r}.", hint)
    return int(found[1]), bool(found[2])


def is_held(rejected: int, usable: int, max_rejects: str) -> bool:
    """Return whether a batch is held for its rejects: nothing of it is usable, or more is rejected than may be."""
    limit, is_percentage = check_max_rejects(max_rejects)
    excess = rejected * 100 > limit * (usable + rejected) if is_percentage else rejected > limit
    return (rejected > 0 and not usable) or (rejected >= _FEWEST and excess)


def find_claimed(connection: Connection, weight: Any) -> ClaimedError | None:
    """Return the error of a batch whose inputs are all claimed by others, or rejected as before; None if one is not."""
    is_empty = not (weight.usable or weight.rejected or weight.transient)
    if not is_empty or not weight.held_elsewhere or weight.released_at is not None:
        return None
    return claimed_error(connection, weight.held_by)


def claimed_error(connection: Connection, held_by: Iterable[str]) -> ClaimedError:
    """Return the error of a load that finds nothing to do because of other batches."""
    message = f"All that is new belongs to unfinished {', '.join(held_by)}: nothing was loaded."
    hint = f"Finish them; publish or reset what is held. `{connection.command('status')}` has the commands."
    return ClaimedError(message, hint)


def find_reason(connection: Connection, batch_id: str, weight: Any, max_rejects: str) -> str | None:
    """Return why a complete batch is not to be published, as one sentence; None if it is.

    `weight` is the row of `count_usable`, here and above.
    """
    if weight.released_at is not None:
        return None
    if weight.held_reason is not None:  # set by an earlier step
        return str(weight.held_reason)
    if not is_held(weight.rejected, weight.usable, max_rejects):
        return None
    unit = "recognition" if weight.kind == KIND_LOAD else "photo"
    total = weight.usable + weight.rejected
    main = connection.execute("find_main_reject", batch_id=batch_id)
    most_often = "".join(f" Most often {row.code}: {row.message}." for row in main)
    if not weight.usable:
        is_first = not weight.already_loaded and not weight.held_elsewhere
        new = unit if is_first else f"new {unit}"
        return f"No {new} of {weight.source} can be used ({weight.rejected} rejected).{most_often}"
    return (
        f"{weight.rejected} of {total} {unit}s are rejected, more than --max-rejects {max_rejects} allows.{most_often}"
    )


def release(connection: Connection, batch_id: str, production: bool) -> Batch:
    """Let a held batch commit, and return it; one that is released or done stays as it is.

    Raises RefusedError for another state, UsageError if the batch is unknown.
    """
    check_batch_id(batch_id)
    require_schema(connection)
    connection.enqueue("lock_batch", batch_id=batch_id)
    batch = batch_state.require_batch(connection, batch_id)
    if batch.state == "loading" and batch.released_at is None:
        hint = f"To go on: {LoadRequest.of(batch).command(production)}"
        raise RefusedError(f"Batch {batch_id} is not complete, so it cannot be published.", hint)
    if batch.state in ("resetting", "reset"):
        hint = f"See `{connection.command('status')}`."
        raise RefusedError(f"Batch {batch_id} is {batch.state}, so it cannot be published.", hint)
    if batch.state == "held":
        connection.execute("update_batch_released", batch_id=batch_id)
    return batch
