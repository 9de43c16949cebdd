"""Luigi's question whether a task is done, answered by markers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import luigi

from pipeline.batches import state
from pipeline.batches.state import RESET, WHOLE
from pipeline.database import Database


class MarkerCache:
    """The markers of a batch that this process knows of; others may appear at any moment.

    One query lists all markers for the first question about each shard, which Luigi asks when it schedules them.
    """

    def __init__(self, database: Database, batch_id: str, *, schedules: bool) -> None:
        self._database, self._batch_id = database, batch_id
        self.present: set[tuple[str, int]] = set()  # only the rollback of an upload deletes a marker
        self._asked: set[tuple[str, int]] = set()
        self._listed: frozenset[tuple[str, int]] | None = None
        self._owner = os.getpid() if schedules else 0

    def exists(self, step: str, shard: int) -> bool:
        """Return whether the marker is there."""
        key = step, shard
        if key in self.present:
            return True
        if step == RESET:  # a reset deletes markers, its own would be among them
            batch = self._database.run(lambda connection: state.find_batch(connection, self._batch_id))
            return batch is not None and batch.state == "reset"
        if shard != WHOLE and key not in self._asked and self._owner == os.getpid():
            self._asked.add(key)
            if self._listed is None:
                self._listed = frozenset(self._database.run(lambda c: state.list_marked(c, self._batch_id)))
            return key in self._listed
        found = self._database.run(lambda connection: state.is_done(connection, self._batch_id, step, shard))
        if found and shard == WHOLE:
            self.present.add(key)
        return found


@dataclass(frozen=True)
class BatchStateTarget(luigi.Target):
    """Rows of ingest.batch_state, one for each shard; for a reset, the state of its batch."""

    markers: MarkerCache = field(repr=False)
    batch_id: str
    step: str
    shards: Iterable[int] = (WHOLE,)

    def exists(self) -> bool:
        """Return whether the markers are there."""
        # Ask about every shard, also after one that is missing: the list answers the first question about each.
        found = [self.markers.exists(self.step, shard) for shard in self.shards]
        return all(found)
