"""A synthetic dataset: trays, menus, receipts and detections that fit together, to try and to measure loads with.

Recognition n depends on the seed, the size, its id and its position alone, so that a dataset of 2,000 recognitions is
the beginning of one of 4,000. Nothing depends on how many processes write it.
"""

from __future__ import annotations

import gzip
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from pipeline.dataset.records import MAXIMUM_BIGINT
from pipeline.errors import UsageError
from pipeline.sample.broken import BROKEN, LINKS, TOO_LARGE, UNUSUAL, spoil
from pipeline.sample.entries import EXPORT, PLAIN, bad_detections, detections_of, entry_of, unusual_values, value_of
from pipeline.sample.menu import Line, Menu, menu_of_day, receipt_json, to_json
from pipeline.sample.photo import CAMERAS, Camera, Layout, Photo, Place

__all__ = ["ANNOTATIONS", "ANNOTATION_LINES", "BROKEN", "EXPORT", "UNUSUAL", "SampleSummary", "write_sample"]

ANNOTATIONS = "qwen_annotations.json"
#: Annotations in JSON Lines and in gzip, which are written with unusual recognitions.
ANNOTATION_LINES = "qwen_annotations.jsonl.gz"
A_DAY = 150

_CHUNK = 25
_SMALLEST = (96, 48)
_LARGEST = 8_192


@dataclass(frozen=True)
class SampleSummary:
    """What was written.

    Attributes:
        recognitions: good recognitions.
        photos: photos of the good recognitions.
        bytes: size of all files together, broken and unusual ones and annotations included.
        photo_bytes: size of the photos of the good recognitions.
        menus: AM.json files of the good recognitions; the same menu on the same day counts each time.
        receipts: correct_dishes.json files of the good recognitions.
        detections: usable detections, dishes and plates, all of them on photos of good recognitions.
        broken_ids: kind of defect, a name of `BROKEN`, to the recognition's id; 0 for the id no bigint can hold.
        unusual_ids: kind of what is noticed, a name of `UNUSUAL`, to the recognition's id.
        seconds: how long it took.
    """

    recognitions: int
    photos: int
    bytes: int
    photo_bytes: int
    menus: int
    receipts: int
    detections: int
    broken_ids: dict[str, int]
    unusual_ids: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class _Sample:
    """The arguments that every recognition shares."""

    export: Path
    seed: int
    first_id: int
    size: tuple[int, int]
    recognitions: int
    broken: bool


@dataclass
class _Counts:
    recognitions: int = 0
    photos: int = 0
    bytes: int = 0
    photo_bytes: int = 0
    menus: int = 0
    receipts: int = 0
    detections: int = 0

    def add(self, other: _Counts) -> None:
        """Add the other's counts to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class _Tray:
    """What a guest took: the menu, the receipt, the label of every dish, and a photo by each camera."""

    menu: Menu
    lines: list[Line]
    labels: list[str]
    photos: list[Photo]


@dataclass(frozen=True)
class _Paths:
    """The names of a recognition's files, relative to its folder; one photo a camera."""

    photos: tuple[str, ...]
    menu: str
    receipt: str


def write_sample(
    directory: Path,
    recognitions: int = 200,
    seed: int = 0,
    *,
    broken: bool = False,
    unusual: bool = False,
    first_id: int | None = None,
    size: tuple[int, int] = (1280, 720),
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> SampleSummary:
    """Write a dataset into a new or empty directory, with the annotations file beside the export.

    The same arguments give the same bytes in every file. When it is interrupted, what is written stays.

    Arguments:
        directory: made if it is not there.
        recognitions: how many good ones, about 250 KB each.
        seed: datasets of different seeds have different ids, up to ten million recognitions.
        broken: add one recognition of every kind in `BROKEN`, ids following on, and the defects of
            `BROKEN_ANNOTATIONS`. Of those, `value_shape` takes the place of a photo's detections. With 200 good
            recognitions, less than a tenth is broken.
        unusual: add one recognition of every kind in `UNUSUAL`, ids after the broken ones, a later export with copies
            of some of them, and a second annotations file.
        first_id: id of the first recognition, 100024 + seed * 10,000,000 by default; the others ascend from it.
        size: width and height of the photos in pixels.
        workers: processes, as many as there are processors by default; 1 writes within this one. They are spawned:
            a script that asks for several needs its `if __name__ == "__main__":`, and may not come from stdin.
        progress: called now and then with the number of recognitions written so far.

    Raises:
        UsageError: an argument is out of bounds, or the directory is not empty.
        OSError: a file cannot be written.
    """
    started = time.monotonic()
    first_id = 100_024 + seed * 10_000_000 if first_id is None else first_id
    _check(directory, recognitions, seed, first_id, size, workers)
    export = directory / EXPORT
    export.mkdir(parents=True, exist_ok=True)
    sample = _Sample(export, seed, first_id, size, recognitions, broken)
    counts = _Counts()
    done = 0
    with (directory / ANNOTATIONS).open("wb") as annotations:
        separator = b"{\n"
        with closing(_write_good(sample, workers or _processors())) as chunks:
            for written, entries in chunks:
                counts.add(written)
                for entry in entries:
                    annotations.write(separator + entry)
                    separator = b",\n"
                done += written.recognitions
                if progress:
                    progress(done)
        positions = {kind: recognitions + number for number, kind in enumerate((*BROKEN, *UNUSUAL))}
        planted = [*(BROKEN if broken else ()), *(UNUSUAL if unusual else ())]
        for kind in planted:
            counts.bytes += _write_spoilt(sample, positions[kind], kind)
        if planted and progress:
            progress(done + len(planted))
        more = _bad_entries(sample, recognitions + len(positions)) if broken else []
        if unusual:
            more += [_unusual_entry(sample, positions[kind], 0, value) for kind, value in unusual_values().items()]
            lines = [_unusual_entry(sample, positions["photo_header"], camera, PLAIN) for camera in (0, 1)]
            content = gzip.compress(b"".join(b"{" + line + b"}\n" for line in lines), mtime=0)
            counts.bytes += (directory / ANNOTATION_LINES).write_bytes(content)
        for entry in more:
            annotations.write(separator + entry)
            separator = b",\n"
        annotations.write(b"{}\n" if separator == b"{\n" else b"\n}\n")
        counts.bytes += annotations.tell()
    ids = {kind: 0 if kind == "id_too_large" else first_id + positions[kind] for kind in planted}
    return SampleSummary(
        **vars(counts),
        broken_ids={kind: ids[kind] for kind in planted if kind in BROKEN},
        unusual_ids={kind: ids[kind] for kind in planted if kind in UNUSUAL},
        seconds=time.monotonic() - started,
    )


def _check(
    directory: Path, recognitions: int, seed: int, first_id: int, size: tuple[int, int], workers: int | None
) -> None:
    if recognitions < 0:
        raise UsageError(f"{recognitions} recognitions cannot be written.", "Ask for 0 or more.")
    if seed < 0:
        raise UsageError(f"The seed {seed} is negative.", "Use 0 or more.")
    if first_id < 1 or first_id + recognitions + len(BROKEN) + len(UNUSUAL) > MAXIMUM_BIGINT:
        raise UsageError(f"The first id {first_id} is out of bounds.", "Use a positive number well below 2^63.")
    if not (_SMALLEST[0] <= size[0] <= _LARGEST and _SMALLEST[1] <= size[1] <= _LARGEST):
        raise UsageError(f"Photos of {size[0]} x {size[1]} pixels cannot be drawn.", "Use 96 x 48 to 8192 x 8192.")
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} processes cannot write anything.", "Use 1 or more.")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is not a directory.", "Name a new directory.")
    if directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"The directory {directory} is not empty.", "Name a new directory, or empty this one.")


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _write_good(sample: _Sample, workers: int) -> Generator[tuple[_Counts, list[bytes]], None, None]:
    """Write the good recognitions; yield, in order and chunk by chunk, counts and entries of the annotations file."""
    starts = range(0, sample.recognitions, _CHUNK)
    ranges = (range(start, min(start + _CHUNK, sample.recognitions)) for start in starts)
    # Below two chunks a process takes longer to start than to work.
    workers = min(workers, len(starts) // 2)
    if workers <= 1:
        for positions in ranges:
            yield _write_chunk(sample, positions)
        return
    # Not fork: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    pending: deque[Future[tuple[_Counts, list[bytes]]]] = deque()
    try:
        for positions in ranges:
            pending.append(executor.submit(_write_chunk, sample, positions))
            # The annotations of what is under way are held in memory, so that is bounded.
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave a terminal's signals to the parent, and end when it does, however it ends."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@lru_cache(maxsize=2)
def _cameras(seed: int, size: tuple[int, int]) -> tuple[Camera, Camera]:
    return Camera(seed, size, 0), Camera(seed, size, 1)


def _write_chunk(sample: _Sample, positions: range) -> tuple[_Counts, list[bytes]]:
    counts = _Counts()
    entries: list[bytes] = []
    for position in positions:
        identifier = str(sample.first_id + position)
        random = Random(f"{sample.seed}:{identifier}")
        tray = _lay_tray(sample, position, identifier, random)
        paths = _paths(identifier, tray.menu)
        files = _files(tray, paths)
        # The till loses a file now and then; neither is required.
        for path in (paths.menu, paths.receipt):
            if random.random() < 0.015:
                del files[path]
        counts.bytes += _write(sample.export, identifier, files)
        counts.recognitions += 1
        counts.photos += len(tray.photos)
        counts.photo_bytes += sum(len(photo.content) for photo in tray.photos)
        counts.menus += paths.menu in files
        counts.receipts += paths.receipt in files
        spoilt = sample.broken and position == sample.recognitions - 1
        for path, photo in zip(paths.photos, tray.photos, strict=True):
            dishes = detections_of(tray.labels, photo.dishes)
            plates = detections_of(["plate"] * len(photo.plates), photo.plates)
            value: object = value_of(dishes, plates)
            if spoilt and path == paths.photos[1]:
                value = [*dishes, *plates]
            else:
                counts.detections += len(dishes) + len(plates)
                if spoilt:
                    value = value_of(dishes + bad_detections(), plates)
            entries.append(entry_of(identifier, path, value))
    return counts, entries


def _write_spoilt(sample: _Sample, position: int, kind: str) -> int:
    """Write a recognition that a load has to reject or to notice; return the size of its files in bytes."""
    identifier = TOO_LARGE if kind == "id_too_large" else str(sample.first_id + position)
    tray = _lay_tray(sample, position, identifier, Random(f"{sample.seed}:{identifier}"))
    paths = _paths(identifier, tray.menu)
    files = _files(tray, paths)
    spoil(kind, files, paths.photos[0], paths.menu, paths.receipt)
    size = _write(sample.export, identifier, files)
    if kind in LINKS:
        path, target = LINKS[kind]
        os.symlink(target, f"{sample.export}/recognition_{identifier}/{path}")
    return size


def _bad_entries(sample: _Sample, position: int) -> list[bytes]:
    """Return entries whose key is of no use; the recognition at that position is not in the dataset."""
    value = value_of([{"bbox_2d": (16, 16, 64, 64), "label": "dish_0"}], [])
    menu = menu_of_day(sample.seed, position // A_DAY)
    known, unknown = str(sample.first_id), str(sample.first_id + position)
    return [
        entry_of(known, _paths(known, menu).photos[0].replace(CAMERAS[0], "Side"), value),
        entry_of(unknown, _paths(unknown, menu).photos[0], value),
    ]


def _unusual_entry(sample: _Sample, position: int, camera: int, value: object) -> bytes:
    """Return the entry of an unusual recognition, which is at that position."""
    identifier = str(sample.first_id + position)
    return entry_of(identifier, _paths(identifier, menu_of_day(sample.seed, position // A_DAY)).photos[camera], value)


def _lay_tray(sample: _Sample, position: int, identifier: str, random: Random) -> _Tray:
    """Choose what a guest takes, put it on a tray and take the two photos of it."""
    menu = menu_of_day(sample.seed, position // A_DAY)
    lines = menu.receipt(random)
    labels = [f"dish_{k}" for k, line in enumerate(lines) for _ in range(line.count)]
    looks = [line.dishes[0].look for line in lines for _ in range(line.count)]
    if random.random() < 0.04:
        # The model sees one dish more than the till was told of.
        labels.append(f"dish_{len(lines)}")
        looks.append(menu.any_dish(random).look)
    layout = Layout(sample.size)
    places = layout.places(len(looks), random)
    views: list[list[Place]] = [places, [layout.turned(place) for place in places]]
    photos = [
        camera.photograph(list(zip(looks, view, strict=True)), random, f"sample {sample.seed} {identifier} {name}")
        for name, camera, view in zip(CAMERAS, _cameras(sample.seed, sample.size), views, strict=True)
    ]
    return _Tray(menu, lines, labels, photos)


def _paths(identifier: str, menu: Menu) -> _Paths:
    stem = f"recognition_{identifier}_{menu.day}"
    return _Paths(
        tuple(f"photos/{stem}_{camera}.jpg" for camera in CAMERAS),
        f"{identifier}_recognition_{menu.day}_AM.json",
        f"{identifier}_recognition_{menu.day}_correct_dishes.json",
    )


def _files(tray: _Tray, paths: _Paths) -> dict[str, bytes]:
    photos = zip(paths.photos, tray.photos, strict=True)
    return {
        **{path: photo.content for path, photo in photos},
        paths.menu: tray.menu.content,
        paths.receipt: to_json(receipt_json(tray.lines)),
    }


def _write(export: Path, identifier: str, files: dict[str, bytes]) -> int:
    folder = f"{export}/recognition_{identifier}"
    os.mkdir(folder)
    for path, content in files.items():
        os.makedirs(os.path.dirname(f"{folder}/{path}"), exist_ok=True)
        with open(f"{folder}/{path}", "wb") as file:
            file.write(content)
    return sum(map(len, files.values()))
