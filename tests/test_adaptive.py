"""Uploads through a real server that allows eight at once: it is kept busy, and hardly ever refuses."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.config import Settings
from pipeline.metrics import Metrics
from pipeline.storage import Storage
from tests.services import StorageServer, local_settings

ALLOWED = 8
THREADS = 16
SERVICE_SECONDS = 0.04  # beside which the turnaround of a busy machine is short
UPLOADS = 1000
PHOTO = b"\xff\xd8 not really a photo \xff\xd9" * 100
REFUSAL = {
    "statusCode": "429",
    "code": "SlowDown",
    "error": "too_many_connections",
    "message": "Too many connections issued to the database",
}


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128


class CrowdedServer:
    """Stores nothing, at most eight objects at once; it counts who is inside and what it took and refused."""

    def __init__(self) -> None:
        self.stored = self.refused = self._inside = 0
        self.crowds: list[int] = []  # how many were inside when each upload was taken, itself included
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        crowded = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30.0
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                crowded._connections.append(self.connection)

            def handle(self) -> None:
                with suppress(ConnectionError):
                    super().handle()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                if crowded._enter():
                    time.sleep(SERVICE_SECONDS)  # the service itself
                    crowded._leave()
                    self._answer(200, {"Key": self.path.removeprefix("/storage/v1/object/"), "Id": "x"})
                else:
                    self._answer(429, REFUSAL)

            def _answer(self, status: int, body: dict[str, str]) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def _enter(self) -> bool:
        with self._lock:
            if self._inside >= ALLOWED:
                self.refused += 1
                return False
            self._inside += 1
            self.crowds.append(self._inside)
            return True

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            self.stored += 1

    def __enter__(self) -> CrowdedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self._thread.join()


def settings_for(url: str) -> Settings:
    settings = local_settings("postgresql://nowhere/none", StorageServer(url, "", "key", Path()), "photos", Path())
    return replace(settings, tuning=replace(settings.tuning, thread_count=THREADS))


def upload(storage: Storage, uploads: int = UPLOADS) -> None:
    """Send photos with as many threads as there are places, as the upload step does."""
    with ThreadPoolExecutor(THREADS) as pool:
        for sent in [pool.submit(storage.upload, f"b/{number}.jpg", PHOTO) for number in range(uploads)]:
            sent.result()


@pytest.fixture
def server() -> Iterator[CrowdedServer]:
    with CrowdedServer() as server:
        yield server


def test_a_server_that_allows_eight_is_kept_busy_and_refuses_less_than_one_in_twenty(server: CrowdedServer) -> None:
    metrics = Metrics()
    with closing(Storage(settings_for(server.url), metrics)) as storage:
        upload(storage)
        state = storage.gate.state()
        storage.gate.report(metrics)
    assert server.stored == UPLOADS
    assert server.refused < 0.05 * (UPLOADS + server.refused)
    assert max(server.crowds) == ALLOWED
    # Neither the climb nor the last ones, whose threads may be waiting for their next try.
    settled = server.crowds[UPLOADS // 5 : -UPLOADS // 10]
    assert sum(settled) / len(settled) >= 5  # of eight: beside other work a processor is not always there for the rest
    assert state["refused"] == server.refused
    assert state["in_flight"] == 0
    found = metrics.as_dict()
    assert found["counters"]["requests_refused"] == found["counters"]["retries_SlowDown"] == server.refused
    assert found["gauges"]["requests_in_flight"]["max"] == state["peak"]
