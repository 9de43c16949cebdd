"""Uploads through a real server that allows eight at once: it is kept busy, and hardly ever refuses."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from pipeline.observe.metrics import Metrics
from pipeline.storage import Storage
from tests.scripted import Answer, Request, ScriptedServer, settings_for, stored

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


class Crowd:
    """Answers as a service that stores at most eight objects at once; it counts who is inside, and what it refused."""

    def __init__(self) -> None:
        self.stored = self.refused = self._inside = 0
        self.crowds: list[int] = []  # how many were inside when each upload was taken, itself included
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Answer:
        """Answer an upload."""
        if not self._enter():
            return Answer(429, REFUSAL)
        time.sleep(SERVICE_SECONDS)  # the service itself
        self._leave()
        return stored(request)

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


def upload(storage: Storage, uploads: int = UPLOADS) -> None:
    """Send photos with as many threads as there are places, as the upload step does."""
    with ThreadPoolExecutor(THREADS) as pool:
        for sent in [pool.submit(storage.upload, f"b/{number}.jpg", PHOTO) for number in range(uploads)]:
            sent.result()


@pytest.mark.slow
def test_a_server_that_allows_eight_is_kept_busy_and_refuses_less_than_one_in_twenty() -> None:
    metrics, crowd = Metrics(), Crowd()
    with (
        ScriptedServer() as server,
        closing(Storage(settings_for(server.url, thread_count=THREADS), metrics)) as storage,
    ):
        server.will(crowd)
        upload(storage)
        storage.limiter.report(metrics)
    assert crowd.stored == UPLOADS
    assert crowd.refused < 0.05 * (UPLOADS + crowd.refused)
    assert max(crowd.crowds) == ALLOWED
    # Neither the climb nor the last ones, whose threads may be waiting for their next try.
    settled = crowd.crowds[UPLOADS // 5 : -UPLOADS // 10]
    assert sum(settled) / len(settled) >= 5  # of eight: beside other work a processor is not always there for the rest
    found = metrics.as_dict()
    assert found["counters"]["requests_refused"] == found["counters"]["retries_SlowDown"] == crowd.refused
    assert ALLOWED <= found["gauges"]["requests_in_flight"]["max"] <= THREADS
