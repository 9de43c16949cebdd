"""What uploading cannot do without, as a bare loop: read, decode, hash and post, with nothing that makes it safe.

    python -m benchmarks.bare DATASET [--threads N]    all photos once, from as many threads: {"seconds"}
    python -m benchmarks.bare DATASET --split          one after another: processor seconds of each part

The Storage server is that of the environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from pipeline.config import load_settings
from pipeline.dataset.photo import check_photo


class Target:
    """A bucket that photos are posted to, with a session for each thread."""

    def __init__(self, bucket: str) -> None:
        settings = load_settings()
        self._headers = {"Authorization": f"Bearer {settings.key.reveal()}"}
        self._base = settings.storage_url
        self._bucket = bucket
        self._local = threading.local()
        self._session().post(f"{self._base}/bucket", json={"name": bucket}, timeout=60)

    def post(self, number: int, content: bytes) -> None:
        """Store an object."""
        answer = self._session().post(
            f"{self._base}/object/{self._bucket}/{number}.jpg",
            data=content,
            headers={"Content-Type": "image/jpeg", "x-upsert": "true"},
            timeout=60,
        )
        answer.raise_for_status()

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.trust_env = False
            session.headers.update(self._headers)
        return session


def digest(content: bytes) -> None:
    """Hash twice, for the manifest and for the comparison with the bucket."""
    hashlib.sha256(content).hexdigest()
    hashlib.md5(content, usedforsecurity=False).hexdigest()


def send_all(paths: Sequence[Path], threads: int) -> float:
    """Do everything to all photos, and return how long it took."""
    target = Target("bare")

    def work(number: int, path: Path) -> None:
        content = path.read_bytes()
        check_photo(content)
        digest(content)
        target.post(number, content)

    with ThreadPoolExecutor(threads) as executor:
        begin = time.perf_counter()
        list(executor.map(work, range(len(paths)), paths))
        return time.perf_counter() - begin


def split(paths: Sequence[Path]) -> dict[str, float]:
    """Return the processor seconds of each part."""
    target = Target("split")
    spent = dict.fromkeys(("read", "decode", "hash", "send"), 0.0)
    for number, path in enumerate(paths):
        moments = [time.process_time()]
        content = path.read_bytes()
        moments.append(time.process_time())
        check_photo(content)
        moments.append(time.process_time())
        digest(content)
        moments.append(time.process_time())
        target.post(number, content)
        moments.append(time.process_time())
        for name, begin, end in zip(spent, moments, moments[1:], strict=False):
            spent[name] += end - begin
    return spent


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--split", action="store_true")
    options = parser.parse_args()
    paths = sorted(options.dataset.rglob("*.jpg"))
    print(json.dumps(split(paths) if options.split else {"seconds": send_all(paths, options.threads)}))


if __name__ == "__main__":
    main()
