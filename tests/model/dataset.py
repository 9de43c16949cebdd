"""The datasets of a sequence: trays of which each file is of one of two editions, and changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.sample.writer import ANNOTATIONS, EXPORT
from tests import world

FIRST = 100_024
CAMERAS = ("Main", "Qualifying")
#: Datasets that overlap: which of the recognitions from FIRST on, and of which edition.
DATASETS = {"early": (0, range(0, 3)), "late": (0, range(2, 5)), "other": (1, range(1, 4))}
#: Of a menu, so many entries besides those of receipts.
_ENTRIES = 6


class Tray(NamedTuple):
    """The edition of each file of a recognition, None where the file is absent."""

    main: int | None
    qualifying: int | None
    receipt: int | None
    menu: int | None

    @property
    def is_usable(self) -> bool:
        return None not in self[:2]

    def differs(self, loaded: Tray) -> bool:
        """Say whether it is no longer what was loaded, as far as that can be known."""
        return not self.is_usable or self[2:] != loaded[2:] or (loaded != OLDER and self != loaded)


#: A tray that an older script loaded: it encoded the photos anew, so that only their size can be compared.
OLDER = Tray(-1, -1, 0, 0)
#: The edition of the boxes of both photos, None where there are none.
Boxes = tuple[int | None, int | None]


class Editions:
    """Two editions of the same recognitions, and what the domain is of any mixture of them."""

    def __init__(self, folder: Path, editions: Iterable[Path]) -> None:
        self._folder = folder
        self._editions = [Path(shutil.copytree(one, folder / f"edition-{at}")) for at, one in enumerate(editions)]
        self.annotations = [json.loads((one / ANNOTATIONS).read_text(encoding="utf-8")) for one in self._editions]
        for one in self._editions:
            _shorten_menus(one / EXPORT)
        self.expected = lru_cache(maxsize=None)(self._expected)

    def path(self, number: int, name: str, edition: int) -> Path:
        return self._editions[edition] / EXPORT / f"recognition_{number}" / name

    def names(self, number: int) -> tuple[str, str, str, str]:
        """Return the names of the files of a recognition, in the order of `Tray`."""
        photos = (f"photos/recognition_{number}_2025-10-11_{camera}.jpg" for camera in CAMERAS)
        first, second = photos
        documents = f"{number}_recognition_2025-10-11"
        return first, second, f"{documents}_correct_dishes.json", f"{documents}_AM.json"

    def normal(self, number: int, tray: Tray) -> Tray:
        """Return a tray without the files that its editions lack."""
        names = zip(self.names(number), tray, strict=True)
        return Tray(*(e if e is not None and self.path(number, name, e).exists() else None for name, e in names))

    def write(self, folder: Path, number: int, tray: Tray) -> None:
        """Write the files of a recognition, and remove those that it lacks."""
        for name, edition in zip(self.names(number), self.normal(number, tray), strict=True):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if edition is None:
                path.unlink(missing_ok=True)
            elif not path.exists() or path.read_bytes() != self.path(number, name, edition).read_bytes():
                shutil.copyfile(self.path(number, name, edition), path)

    def values(self, boxes: dict[int, Boxes]) -> dict[str, Any]:
        """Return the content of an annotations file."""
        return {
            key: self.annotations[edition][key]
            for number, editions in sorted(boxes.items())
            for camera, edition in zip(CAMERAS, editions, strict=True)
            if edition is not None
            for key in self.annotations[edition]
            if f"recognition_{number}/" in key and camera in key
        }

    def _expected(self, number: int, tray: Tray, batch_id: str, boxes: Boxes) -> world.Domain:
        """Return what readers see of a recognition that a batch loaded, with the boxes of its photos."""
        folder = self._folder / f"{number}-{tray}-{boxes}"
        self.write(folder / f"recognition_{number}", number, tray)
        file = folder / ANNOTATIONS
        file.write_text(json.dumps(self.values({number: boxes})), encoding="utf-8")
        return world.wanted((folder, batch_id, [number]), qwen=file).domain

    def objects(self, number: int, tray: Tray, batch_id: str) -> dict[str, str]:
        return {row[2]: row[6] for row in self.expected(number, tray, batch_id, (None, None)).images}


def _shorten_menus(export: Path) -> None:
    """Leave a few entries of the menu that all trays have, and those of receipts: what is long takes time."""
    wanted = set()
    for receipt in export.rglob("*_correct_dishes.json"):
        lines = json.loads(receipt.read_text(encoding="utf-8-sig"))
        wanted |= {dish["ExternalId"] for line in lines for dish in line["Dishes"]}
    for path in export.rglob("*_AM.json"):
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        kept = [one for at, one in enumerate(entries) if at < _ENTRIES or one["ExternalId"] in wanted]
        path.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")


class Dataset:
    """A dataset on disk, with annotations; `trays` and `boxes` are what a load finds in it."""

    def __init__(self, editions: Editions, folder: Path, edition: int, numbers: Iterable[int]) -> None:
        self._editions, self.folder, self.file = editions, folder, folder / ANNOTATIONS
        self.trays: dict[int, Tray] = {}
        self.boxes: dict[int, Boxes] = {}
        self._exports: dict[int, int] = {}
        for number in numbers:
            self.change(number, Tray(edition, edition, edition, edition))
            self.boxes[number] = (edition, edition)
        self._write_boxes()

    def change(self, number: int, tray: Tray) -> None:
        """Change the files of a recognition."""
        self.trays[number] = self._editions.normal(number, tray)
        later = self._exports.get(number, 0)
        export = f"{EXPORT}_{later}" if later else EXPORT
        self._editions.write(self.folder / export / f"recognition_{number}", number, tray)

    def export_again(self, number: int, tray: Tray) -> None:
        """Write a recognition into a later export; what is in an earlier one stays there."""
        self._exports[number] = self._exports.get(number, 0) + 1
        self.change(number, tray)

    def remove(self, number: int) -> None:
        """Remove the folders of a recognition."""
        for folder in self.folder.glob(f"*/recognition_{number}"):
            shutil.rmtree(folder)
        del self.trays[number]

    def change_boxes(self, number: int, boxes: Boxes) -> None:
        self.boxes[number] = boxes
        self._write_boxes()

    def _write_boxes(self) -> None:
        self.file.write_text(json.dumps(self._editions.values(self.boxes)), encoding="utf-8")
