"""An environment in this process: its settings, its database, and the uploader of the shards."""

from __future__ import annotations

import configparser
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import luigi

from pipeline.config import Settings, load_settings
from pipeline.database import Database
from pipeline.errors import SettingsError
from pipeline.steps.upload import Uploader
from pipeline.storage import Storage


class Environment:
    """An environment's settings, those of the section [pipeline] of Luigi's configuration included, and database.

    Attributes:
        may_reject: this host may reject an input that is not as discovery saw it. A helper on another host may not:
            it may see less of the dataset.
    """

    def __init__(self, production: bool) -> None:
        self.settings: Settings = load_settings(production, _tuning())
        self.database = Database(self.settings)
        self.may_reject = True
        self._kept: ExitStack | None = None
        self._uploader: Uploader | None = None
        self._ahead = False

    @contextmanager
    def keeping_uploader(self, *, ahead: bool) -> Iterator[None]:
        """Keep one uploader, with its threads and connections, from shard to shard until the block ends.

        Arguments:
            ahead: start to send the next shard while a shard ends; for a process that has the batch to itself.
        """
        self._ahead = ahead
        with ExitStack() as self._kept:
            try:
                yield
            finally:
                self._kept, self._uploader, self._ahead = None, None, False

    @contextmanager
    def uploader(self) -> Iterator[Uploader]:
        """Return the kept uploader, or one that is closed at the end of the block."""
        with ExitStack() as stack:
            uploader = self._uploader
            if uploader is None:
                keep = self._kept or stack
                storage = keep.enter_context(closing(Storage(self.settings)))
                uploader = Uploader(self.database, storage, ahead=self._ahead, may_reject=self.may_reject)
                keep.enter_context(closing(uploader))
            if self._kept is not None:
                self._uploader = uploader
            yield uploader


def _tuning() -> dict[str, str]:
    configuration = luigi.configuration.get_config()
    try:
        return dict(configuration.items("pipeline")) if configuration.has_section("pipeline") else {}
    except configparser.Error as exc:
        raise SettingsError(
            f"The section [pipeline] of luigi.cfg cannot be read: {exc.message}.", "A percent sign is written twice."
        ) from exc
