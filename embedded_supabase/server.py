"""What the servers of a home have in common."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from embedded_supabase.disk import Disk
from embedded_supabase.files import lock_home

if TYPE_CHECKING:
    from typing_extensions import Self


class HomeServer(ABC):
    """A server of one home; instances in any number of processes may manage it concurrently.

    Arguments:
        home: the folder of the embedded services; created by `start`.
        durable: False turns fsync off, for tests whose data need not survive a power failure.
    """

    #: The name of the file in the home that is locked while the server starts or stops.
    lock_name: str

    def __init__(self, home: Path, *, durable: bool = True) -> None:
        self.home = Path(os.path.abspath(home))
        self._disk = Disk(durable=durable)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def start(self) -> str:
        """Start the server unless it runs, and return its URL."""

    @abstractmethod
    def stop(self) -> bool:
        """Stop the server and keep its data; return False if it was not running."""

    def _locked(self) -> AbstractContextManager[None]:
        return lock_home(self.home, self.lock_name)
