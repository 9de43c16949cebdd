"""Readers: whoever polls the domain during a load, a forced reload and a reset sees whole batches, and every object."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2
import pytest
import requests

from pipeline.config import Settings
from pipeline.sample.writer import ANNOTATIONS
from tests import world
from tests.runner import ForkServer, Runner
from tests.services import MakeDataset

#: Batch -> recognitions that are shown in its version, with their images; and the number of annotations.
View = tuple[tuple[tuple[str, int, int], ...], int]

_VIEW = f"""
    SELECT r.batch_id, count(DISTINCT r.id), count(i.id)
    FROM public.recognitions r LEFT JOIN public.images i ON i.recognition_id = r.id
    WHERE r.{world.ours("public.recognitions")}
    GROUP BY r.batch_id ORDER BY r.batch_id
"""
_COUNT = f"SELECT count(*) FROM public.initial_annotations WHERE {world.ours('public.initial_annotations')}"
_PATHS = f"SELECT storage_path, byte_size FROM public.images WHERE {world.ours('public.images')}"


@dataclass
class Reader:
    """Polls until it is told to stop; remembers every view, and each row whose object was not there."""

    settings: Settings
    views: set[View] = field(default_factory=set)
    polls: int = 0
    missing: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Look at rows in one moment of the database, then at the objects that they name."""
        with closing(psycopg2.connect(self.settings.database_url.reveal())) as connection, requests.Session() as web:
            web.trust_env = False
            web.headers["Authorization"] = f"Bearer {self.settings.key.reveal()}"
            connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
            while not self._stop.is_set():
                with connection, connection.cursor() as cursor:
                    cursor.execute(_VIEW)
                    batches = tuple(cursor.fetchall())
                    cursor.execute(_COUNT)
                    [(annotated,)] = cursor.fetchall()
                    cursor.execute(_PATHS)
                    paths = cursor.fetchall()
                self.views.add((batches, annotated))
                self.polls += 1
                for path, size in paths:
                    if not self._is_there(web, path, size) and self._is_named(connection, path):
                        self.missing.append(path)

    def _is_there(self, web: requests.Session, path: str, size: int) -> bool:
        url = f"{self.settings.storage_url}/object/authenticated/{self.settings.bucket}/{path}"
        answer = web.head(url, timeout=30)
        return answer.status_code == 200 and int(answer.headers["Content-Length"]) == size

    def _is_named(self, connection: psycopg2.extensions.connection, path: str) -> bool:
        """Say whether the row is still there: a reset takes rows first, so an object may go after we have read them."""
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT EXISTS (SELECT FROM public.images WHERE storage_path = %s)", (path,))
            [(named,)] = cursor.fetchall()
            return bool(named)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Poll beside the block."""
        thread = threading.Thread(target=self.run, name="reader")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


@pytest.mark.slow
def test_readers_never_see_half_a_batch_nor_a_row_without_its_object(
    workdir: Path, fork_server: ForkServer, settings: Settings, small_dataset: MakeDataset
) -> None:
    runner = Runner(fork_server, workdir, {"PIPELINE_BATCH_SIZE": "1", "PIPELINE_THREAD_COUNT": "2"})
    first, second = small_dataset(6), small_dataset(6, seed=1, first_id=100_024)
    workers = ("--workers", "2", "--local-scheduler")
    commands = (
        ("load", "--source", first, "--batch-id", "b1", *workers),
        ("load-qwen", "--file", first / ANNOTATIONS, "--batch-id", "q1", *workers),
        ("load", "--source", second, "--batch-id", "b2", "--force", "--limit", "4", *workers),
        ("load-qwen", "--file", second / ANNOTATIONS, "--batch-id", "q2", "--force", *workers),
        ("reset", "--batch-id", "q2", "--confirm"),
        ("reset", "--batch-id", "b2", "--confirm"),
        ("reset", "--batch-id", "q1", "--confirm"),
        ("reset", "--batch-id", "b1", "--confirm"),
    )
    readers = [Reader(settings), Reader(settings)]
    with readers[0].reading(), readers[1].reading():
        for command in commands:
            ended = runner(*command)
            assert ended.code == 0, ended.stderr
    seen = readers[0].views | readers[1].views
    whole = (("b1", 6, 12),)
    mixed = (("b1", 2, 4), ("b2", 4, 8))
    for batches, annotated in seen:
        assert batches in ((), whole, mixed)
        assert batches or not annotated
    # Whole sets of annotations only: of none, of the first file, of it where photos stay, and of the second file.
    assert len({annotated for _, annotated in seen if annotated}) == 3
    assert {batches for batches, _ in seen} == {(), whole, mixed}
    assert [*readers[0].missing, *readers[1].missing] == []
    assert min(reader.polls for reader in readers) > 20
