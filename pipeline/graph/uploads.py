"""The uploader of a process, kept from shard to shard with its threads and connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from pipeline.config import Settings
from pipeline.database import Database
from pipeline.graph.memory import only_new_is_collected
from pipeline.steps.upload import Uploader
from pipeline.storage import Storage


class UploaderCache:
    """The uploader of an environment in this process."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database
        self._kept: ExitStack | None = None
        self._uploader: Uploader | None = None
        self._ahead = False

    @contextmanager
    def kept(self, *, ahead: bool) -> Iterator[None]:
        """Keep the uploader until the block ends.

        Arguments:
            ahead: start to send the next shard while a shard ends; for a process that has the batch to itself.
        """
        with only_new_is_collected(), ExitStack() as stack:
            self._kept, self._ahead = stack, ahead
            try:
                yield
            finally:
                self._kept = self._uploader = None

    @contextmanager
    def uploader(self, *, may_reject: bool) -> Iterator[Uploader]:
        """Return the kept uploader, or one that is closed at the end of the block."""
        if self._kept is None:
            with ExitStack() as stack:
                yield self._make(stack, ahead=False, may_reject=may_reject)
            return
        if self._uploader is None:
            self._uploader = self._make(self._kept, ahead=self._ahead, may_reject=may_reject)
        yield self._uploader

    def _make(self, stack: ExitStack, *, ahead: bool, may_reject: bool) -> Uploader:
        storage = stack.enter_context(closing(Storage(self._settings)))
        return stack.enter_context(closing(Uploader(self._database, storage, ahead=ahead, may_reject=may_reject)))
