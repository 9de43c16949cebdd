"""Latency and limited capacity that the embedded Storage server simulates."""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from benchmarks.bench import running_storage as running_faulty
from embedded_supabase.files import wait_until
from embedded_supabase.storage.faults import FaultInjector
from tests import storage_server_support
from tests.services import StorageServer
from tests.storage_server_support import LARGE, SECONDS, Client, create_bucket, incoming, start_upload, stored

client = storage_server_support.client

FOREVER = ("--latency", "1000000")
SLOW_DOWN = (429, "429", "too_many_connections", "Too many connections, try again later", "SlowDown")


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Return a function that makes a client, with a connection of its own, of a server with these options."""
    with ExitStack() as stack:
        servers: dict[tuple[str, ...], StorageServer] = {}

        def connect(*options: str) -> Client:
            if options not in servers:
                folder = tmp_path / f"faulty{len(servers)}"
                url, key, _ = stack.enter_context(running_faulty(folder, *options))
                servers[options] = StorageServer(url, "", key, folder / "root")
            client = Client(servers[options])
            stack.enter_context(closing(client.connection))
            return client

        yield connect


def begin_upload(client: Client, key: str) -> None:
    """Send an upload without waiting for its answer."""
    client.connection.request("POST", f"/object/b/{key}", b"content", {"Authorization": f"Bearer {client.server.key}"})


def test_an_upload_is_answered_only_after_the_latency(faulty: Callable[..., Client]) -> None:
    client = faulty("--latency", "300")
    create_bucket(client, "b")
    for method in ("POST", "PUT"):
        begin = time.monotonic()
        assert client.send(method, f"/object/b/{method}", b"content").status == 200
        assert time.monotonic() - begin >= 0.29  # the server has another clock
    assert client.keys("b") == ["POST", "PUT"]


def test_answers_come_after_the_latency_on_average_however_late_each_is(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal waited
        waited += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    faults = FaultInjector(0.042)

    def answer(body: float, late: float) -> float:
        """Answer an upload whose body took so long; return when."""
        nonlocal waited
        waited = body
        if asyncio.run(faults.delay(body)):
            faults.record_response(waited + late)
        return waited + late

    assert answer(0.001, 0.002) == pytest.approx(0.044)
    assert [answer(0.001, 0.002) for _ in range(2000)][-1] == pytest.approx(0.042, abs=1e-5)
    assert answer(1.0, 0.002) == 1.002  # of which the server knows nothing
    assert answer(0.001, 0.002) == pytest.approx(0.042, abs=1e-5)
    assert [answer(0.001, 0.060) for _ in range(2000)][-1] == 0.061  # a server that cannot keep up does not wait
    assert [answer(0.001, 0.0) for _ in range(2000)][-1] == pytest.approx(0.042, abs=1e-5)


def test_an_upload_that_is_held_back_is_stored_and_holds_up_nobody(faulty: Callable[..., Client]) -> None:
    client, other = faulty(*FOREVER), faulty(*FOREVER)
    create_bucket(other, "b")
    begin_upload(client, "k")
    assert wait_until(lambda: other.keys("b") == ["k"], SECONDS)
    assert other.content("b", "k") == b"content"
    assert select.select([client.connection.sock], [], [], 0)[0] == []
    client.connection.close()
    assert other.content("b", "k") == b"content"


def test_more_object_requests_than_the_capacity_are_refused_until_one_ends(faulty: Callable[..., Client]) -> None:
    options = (*FOREVER, "--capacity", "2")
    busy, client = [faulty(*options), faulty(*options)], faulty(*options)
    create_bucket(client, "b")
    for number, one in enumerate(busy):
        begin_upload(one, f"k{number}")
    assert wait_until(lambda: len(stored(client.server)) == 2, SECONDS)
    assert client.upload("b", "refused", b"x" * LARGE).error == SLOW_DOWN
    sock = client.connection.sock
    assert client.send("POST", "/object/list-v2/b", {}).error == SLOW_DOWN
    assert client.send("DELETE", "/object/b/k0").error == SLOW_DOWN
    assert client.send("GET", "/bucket/b").status == 200
    busy[0].connection.close()
    assert wait_until(lambda: client.send("POST", "/object/list-v2/b", {}).status == 200, SECONDS)
    assert client.connection.sock is sock
    assert wait_until(lambda: client.keys("b") == ["k0", "k1"], SECONDS)  # the files come before the index
    assert incoming(client.server) == []


def test_an_upload_that_breaks_off_gives_its_place_back(faulty: Callable[..., Client]) -> None:
    client = faulty("--capacity", "1")
    create_bucket(client, "b")
    broken = start_upload(client.server, "/object/b/k", "Content-Length: 100", b"begin")
    assert client.upload("b", "k").error == SLOW_DOWN
    broken.close()
    assert wait_until(lambda: client.upload("b", "k").status == 200, SECONDS)
    assert client.upload("b", "k2").status == 200
