"""The generator of datasets, beside nothing but the encoding of as many photos of the same size."""

from __future__ import annotations

import io
import os
import time
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from benchmarks.bench import REAL, Bench, empty
from benchmarks.rows import Row


def sampling(place: Bench, recognitions: int) -> list[Row]:
    """Draw and write; then encode one picture as often, in as many threads as there are processors."""
    begin = time.perf_counter()
    dataset = place.dataset(recognitions, REAL)
    rate = recognitions / (time.perf_counter() - begin)
    with Image.open(next(dataset.rglob("*.jpg"))) as image:
        image.load()
        pixels = image.copy()
    empty(dataset)

    def encode(_: int) -> None:
        pixels.save(io.BytesIO(), "JPEG", quality=85)

    begin = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        list(executor.map(encode, range(2 * recognitions)))
    peer = recognitions / (time.perf_counter() - begin)
    return [Row("sample, drawn and written / bare JPEG encoding", rate, peer, "recognitions/s")]
