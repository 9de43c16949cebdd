"""The photos of the next shard are on their way while a shard ends: sent once, and never left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from embedded_supabase.files import wait_until
from pipeline.batches import state as batch_state
from pipeline.batches.resolve import LoadRequest, resolve_batch
from pipeline.batches.state import UPLOAD
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.errors import RefusedError
from pipeline.steps.discover import Request, discover
from pipeline.steps.reset import reset_batch
from pipeline.steps.upload import Uploader
from pipeline.storage import Storage
from tests import world
from tests.services import MakeDataset

#: They wait more than they compute.
pytestmark = pytest.mark.slow

SECONDS = 20.0


class Upload:
    """A batch `b1` of nine recognitions in three shards, and one uploader for all of them."""

    def __init__(self, settings: Settings, database: Database, dataset: Path, storage: Storage) -> None:
        self.settings, self.database, self.dataset = settings, database, dataset
        resolve_batch(settings, database, LoadRequest("b1", str(dataset)))
        storage.ensure_bucket()
        discover(database, Request("b1", str(dataset), settings.bucket, batch_size=3))
        self.counted: dict[int, int] = {}
        self.uploader = Uploader(database, storage, ahead=True)

    def progress_of(self, shard: int, _: int) -> Callable[[int], None]:
        self.counted[shard] = 0

        def add(count: int) -> None:
            self.counted[shard] += count

        return add

    def sent(self, shard: int) -> int:
        """Return how many objects a shard's marker says were sent for it."""
        rows = self._query(
            f"SELECT metrics->'counters' FROM ingest.batch_state WHERE step = 'upload' AND shard = {shard}"
        )
        return int(rows[0][0].get("objects_uploaded", 0))

    def keys(self, shard: int) -> set[str]:
        return {
            key
            for (pair,) in self._query(f"SELECT object_keys FROM ingest.manifest WHERE shard = {shard}")
            for key in pair
        }

    def await_all_of(self, shard: int) -> None:
        keys = self.keys(shard)
        assert wait_until(lambda: keys <= set(world.objects(self.settings)), SECONDS)

    def _query(self, statement: str) -> list[tuple[Any, ...]]:
        return world.query(self.settings.database_url.reveal(), statement)


@pytest.fixture
def upload(settings: Settings, database: Database, small_dataset: MakeDataset) -> Iterator[Upload]:
    with closing(Storage(settings)) as storage:
        made = Upload(settings, database, small_dataset(9), storage)
        with closing(made.uploader):
            yield made


def test_the_next_shard_is_sent_without_a_marker_and_then_not_again(upload: Upload) -> None:
    upload.uploader.upload("b1", 1, upload.progress_of)
    upload.await_all_of(2)
    assert not upload.database.run(lambda c: batch_state.is_done(c, "b1", UPLOAD, 2))
    assert not upload.keys(3) & set(world.objects(upload.settings)), "one shard ahead, not more"
    for shard in (2, 3):
        upload.uploader.upload("b1", shard, upload.progress_of)
    assert [upload.sent(shard) for shard in (1, 2, 3)] == [6, 6, 6]
    assert upload.counted == {1: 3, 2: 3, 3: 3}


def test_a_shard_that_is_done_is_passed_over(upload: Upload, settings: Settings) -> None:
    with closing(Storage(settings)) as storage, closing(Uploader(upload.database, storage)) as other:
        other.upload("b1", 2)
    upload.uploader.upload("b1", 1, upload.progress_of)
    upload.await_all_of(3)
    upload.uploader.upload("b1", 3, upload.progress_of)
    assert [upload.sent(shard) for shard in (1, 2, 3)] == [6, 6, 6]


def test_another_shard_than_the_one_ahead_may_come_first(upload: Upload) -> None:
    for shard in (1, 3, 2):
        upload.uploader.upload("b1", shard, upload.progress_of)
    assert upload.sent(1) == upload.sent(3) == 6
    assert upload.sent(2) <= 6, "what was sent ahead is found again"
    assert len(world.objects(upload.settings)) == 18


def test_what_was_sent_ahead_is_found_again_by_the_next_run(upload: Upload, settings: Settings) -> None:
    upload.uploader.upload("b1", 1, upload.progress_of)
    upload.await_all_of(2)
    upload.uploader.close()
    upload.await_all_of(2)
    with closing(Storage(settings)) as storage, closing(Uploader(upload.database, storage)) as other:
        other.upload("b1", 2)
    assert upload.sent(2) == 0, "nothing had to be sent"


def test_what_was_sent_ahead_for_a_batch_that_is_reset_meanwhile_is_removed(upload: Upload, settings: Settings) -> None:
    upload.uploader.upload("b1", 1, upload.progress_of)
    upload.await_all_of(2)
    late = upload.keys(2)
    reset_batch(upload.database, settings, "b1")
    assert world.objects(settings) == {}
    with closing(Storage(settings)) as storage:
        for key in late:  # as if the network had delivered them only now
            storage.upload(key, b"late")
    upload.uploader.close()
    assert world.objects(settings) == {}


def test_a_shard_ahead_of_a_batch_that_is_gone_is_refused_in_its_turn(upload: Upload, settings: Settings) -> None:
    upload.uploader.upload("b1", 1, upload.progress_of)
    reset_batch(upload.database, settings, "b1")
    with pytest.raises(RefusedError):
        upload.uploader.upload("b1", 2, upload.progress_of)
    assert world.objects(settings) == {}
