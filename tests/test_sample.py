"""The sample generator: what it writes is a dataset as the design describes it, and the same one every time."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import simplejpeg
from PIL import Image, ImageStat

from pipeline import sample
from pipeline.cli import main
from pipeline.errors import UsageError
from pipeline.sample import write_sample
from pipeline.sample.broken import LATER
from pipeline.sample.entries import BROKEN_ANNOTATIONS
from pipeline.sample.writer import ANNOTATION_LINES, ANNOTATIONS, BROKEN, EXPORT, UNUSUAL, SampleSummary

SMALL = (160, 120)
FULL = (1280, 720)


class Written:
    """A dataset on disk, read back without any code of the generator."""

    def __init__(self, directory: Path, summary: SampleSummary) -> None:
        self.directory, self.summary = directory, summary
        self.annotations: dict[str, Any] = json.loads((directory / ANNOTATIONS).read_bytes())

    def folder(self, identifier: int | str) -> Path:
        return self.directory / EXPORT / f"recognition_{identifier}"

    def ids(self) -> list[int]:
        return sorted(int(path.name.removeprefix("recognition_")) for path in (self.directory / EXPORT).iterdir())

    def good_ids(self) -> list[int]:
        return self.ids()[: self.summary.recognitions]

    def photos(self, identifier: int) -> dict[str, Path]:
        return {path.stem.rsplit("_", 1)[1]: path for path in sorted(self.folder(identifier).glob("photos/*.jpg"))}

    def document(self, identifier: int, ending: str) -> Path | None:
        return next(self.folder(identifier).glob(f"{identifier}_recognition_*_{ending}.json"), None)

    def content(self, kind: str, ending: str) -> bytes:
        path = self.document(self.summary.broken_ids[kind], ending)
        assert path is not None
        return path.read_bytes()


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes().decode("utf-8-sig"))


def digests(directory: Path, pattern: str = "**/*") -> dict[str, str]:
    files = (path for path in directory.glob(pattern) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def write(directory: Path, *arguments: int, **options: Any) -> Written:
    return Written(directory, write_sample(directory, *arguments, **options))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("sample") / "small", 310, size=SMALL, broken=True, workers=1)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("sample") / "full", 30, 7, workers=1)


def detections(written: Written, identifiers: list[int]) -> Iterator[tuple[Path, str, list[dict[str, Any]]]]:
    for identifier in identifiers:
        for path in written.photos(identifier).values():
            value = written.annotations[f"RRS_Dataset/{path.relative_to(written.directory)}"]
            for group in ("dishes", "plates"):
                yield path, group, value[group]["qwen_detections"]


@pytest.mark.slow
def test_same_bytes_whatever_the_number_of_processes(small: Written, tmp_path: Path) -> None:
    write_sample(tmp_path, 310, size=SMALL, broken=True, workers=2)
    assert digests(tmp_path) == digests(small.directory)


def test_smaller_dataset_is_the_beginning_of_a_larger_one(small: Written, tmp_path: Path) -> None:
    write_sample(tmp_path, 60, size=SMALL, workers=1)
    all_of_it = digests(small.directory, f"{EXPORT}/**/*")
    beginning = digests(tmp_path, f"{EXPORT}/**/*")
    assert len(beginning) > 200
    assert beginning.items() <= all_of_it.items()
    assert (small.directory / ANNOTATIONS).read_bytes().startswith((tmp_path / ANNOTATIONS).read_bytes()[:-3])


def test_seeds_share_neither_ids_nor_photos(full: Written, tmp_path: Path) -> None:
    other = write(tmp_path, 3, 8, workers=1)
    assert other.ids() == [80_100_024, 80_100_025, 80_100_026]
    assert not set(other.ids()) & set(full.ids())
    assert not set(digests(tmp_path, "**/*.jpg").values()) & set(digests(full.directory, "**/*.jpg").values())


def test_names_ids_and_days(small: Written) -> None:
    ids = small.good_ids()
    assert ids == list(range(100_024, 100_334))
    assert small.photos(100_024)["Main"].name == "recognition_100024_2025-10-11_Main.jpg"
    assert small.photos(100_024)["Qualifying"].name == "recognition_100024_2025-10-11_Qualifying.jpg"
    days = [small.photos(identifier)["Main"].stem.split("_")[2] for identifier in ids]
    assert days == ["2025-10-11"] * 150 + ["2025-10-12"] * 150 + ["2025-10-13"] * 10


def test_first_id_is_what_is_asked_for(tmp_path: Path) -> None:
    assert write(tmp_path, 2, first_id=7, size=SMALL).ids() == [7, 8]


def test_photos_weigh_what_those_of_a_till_weigh(full: Written) -> None:
    sizes = [path.stat().st_size for path in full.directory.glob("**/*.jpg")]
    assert len(sizes) == 60
    assert min(sizes) > 100_000
    assert max(sizes) < 150_000
    assert 115_000 < sum(sizes) / len(sizes) < 135_000


def test_photos_are_all_different_in_bytes_and_pixels(full: Written) -> None:
    paths = list(full.directory.glob("**/*.jpg"))
    assert len({path.read_bytes() for path in paths}) == len(paths)
    pixels = set()
    for path in paths:
        with Image.open(path) as image:
            pixels.add(hashlib.md5(image.tobytes()).hexdigest())
    assert len(pixels) == len(paths)


@pytest.mark.parametrize("size", [FULL, SMALL, (97, 50)])
def test_every_photo_is_a_whole_baseline_jpeg(size: tuple[int, int], tmp_path: Path) -> None:
    written = write(tmp_path, 4, size=size, workers=1)
    for path in written.directory.glob("**/*.jpg"):
        content = path.read_bytes()
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
            image.load()
        with Image.open(path) as image:
            image.draft("RGB", (size[0] // 8, size[1] // 8))
            image.load()
        simplejpeg.decode_jpeg(content, strict=True)  # which raises on what a decoder would warn of


def tray_colour(image: Image.Image) -> list[float]:
    """Return the median colour, which is the tray's as long as it covers more than half of the photo."""
    return [float(value) for value in ImageStat.Stat(image).median]


def distance(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_boxes_lie_exactly_on_what_is_drawn(full: Written) -> None:
    checked = 0
    for path, group, found in detections(full, full.good_ids()):
        if len(found) > 8:
            continue
        with Image.open(path) as image:
            tray = tray_colour(image)
            for left, top, right, bottom in (detection["bbox_2d"] for detection in found):
                assert 0 <= left < right <= FULL[0]
                assert 0 <= top < bottom <= FULL[1]
                x, y = (left + right) // 2, (top + bottom) // 2
                width, height = right - left, bottom - top
                middle = image.crop((x - width // 4, y - height // 4, x + width // 4, y + height // 4))
                assert distance(ImageStat.Stat(middle).mean, tray) > 12
                # Just inside each edge there is something, and the colour changes across it.
                edges = ((left, y, -1, 0), (right, y, 1, 0), (x, top, 0, -1), (x, bottom, 0, 1))
                for at_x, at_y, out_x, out_y in edges:
                    inside = patch(image, at_x - 3 * out_x, at_y - 3 * out_y)
                    outside = patch(image, at_x + 3 * out_x, at_y + 3 * out_y)
                    assert distance(inside, outside) > 10, (path, group, (left, top, right, bottom))
                    if group == "plates":
                        assert distance(outside, tray) < 12
                checked += 1
    assert checked > 200


def patch(image: Image.Image, x: int, y: int) -> list[float]:
    return ImageStat.Stat(image.crop((x - 2, y - 2, x + 3, y + 3))).mean


def test_labels_follow_the_receipt(small: Written) -> None:
    beyond = 0
    for identifier in small.good_ids()[:-1]:
        path = small.document(identifier, "correct_dishes")
        if path is None:
            continue
        lines = read_json(path)
        expected = [f"dish_{k}" for k, line in enumerate(lines) for _ in range(line["Count"])]
        for _, group, found in detections(small, [identifier]):
            labels = [detection["label"] for detection in found]
            if group == "plates":
                assert set(labels) <= {"plate"}
                assert len(labels) <= len(expected) + 1
                continue
            assert labels in (expected, [*expected, f"dish_{len(lines)}"])
            beyond += labels != expected
    assert 2 <= beyond <= 60


def test_receipts_are_of_the_day(small: Written) -> None:
    menus: dict[str, bytes] = {}
    ambiguous = without_menu = without_receipt = 0
    for identifier in small.good_ids():
        day = small.photos(identifier)["Main"].stem.split("_")[2]
        menu, receipt = small.document(identifier, "AM"), small.document(identifier, "correct_dishes")
        without_menu += menu is None
        without_receipt += receipt is None
        if menu:
            assert menu.read_bytes() == menus.setdefault(day, menu.read_bytes())
        if receipt:
            lines = read_json(receipt)
            assert 1 <= len(lines) <= 5
            assert {line["Count"] for line in lines} <= {1, 2, 3}
            ambiguous += sum(len(line["Dishes"]) > 1 for line in lines)
            entries = json.loads(menus[day].decode("utf-8-sig"))
            names = {entry["ExternalId"]: entry["Name"] for entry in entries}
            assert all(names[dish["ExternalId"]] == dish["Name"] for line in lines for dish in line["Dishes"])
    assert len(menus) == len(set(menus.values())) == 3
    assert ambiguous > 10
    assert 1 <= without_menu <= 20
    assert 1 <= without_receipt <= 20
    assert small.summary.menus == 310 - without_menu
    assert small.summary.receipts == 310 - without_receipt


def test_menus_are_long_and_cyrillic_and_some_begin_with_a_bom(tmp_path: Path) -> None:
    written = write(tmp_path, 600, size=(96, 48), workers=1)
    menus = {path.read_bytes() for path in tmp_path.glob("**/*_AM.json")}
    assert len(menus) == 4
    assert 1 <= sum(menu.startswith(b"\xef\xbb\xbf") for menu in menus) <= 3
    for menu in menus:
        entries = json.loads(menu.decode("utf-8-sig"))
        assert len({entry["ExternalId"] for entry in entries}) == len({entry["Name"] for entry in entries}) == 200
        assert all(re.search("[а-яё]", entry["Name"]) and entry["Category"] and entry["Price"] > 0 for entry in entries)
    assert 4.3 < written.summary.detections / written.summary.photos < 5.7


def test_summary_counts_what_is_there(small: Written) -> None:
    summary = small.summary
    good = small.good_ids()
    assert (summary.recognitions, summary.photos, len(summary.broken_ids)) == (310, 620, len(BROKEN))
    assert summary.bytes == sum(path.stat().st_size for path in small.directory.glob("**/*") if path.is_file())
    photos = [path for identifier in good for path in small.photos(identifier).values()]
    assert summary.photo_bytes == sum(path.stat().st_size for path in photos)
    usable = sum(len(found) for _, _, found in detections(small, good[:-1]))
    last = small.annotations[f"RRS_Dataset/{small.photos(good[-1])['Main'].relative_to(small.directory)}"]
    usable += len(last["dishes"]["qwen_detections"]) - 6 + len(last["plates"]["qwen_detections"])
    assert summary.detections == usable
    assert summary.seconds > 0


def test_progress_ends_with_all_of_them(tmp_path: Path) -> None:
    seen: list[int] = []
    write_sample(tmp_path, 60, size=SMALL, workers=1, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 60
    assert len(seen) > 1


def test_no_recognitions_give_an_empty_dataset(tmp_path: Path) -> None:
    written = write(tmp_path / "new" / "dataset", 0)
    assert written.ids() == []
    assert (written.directory / ANNOTATIONS).read_bytes().strip() == b"{}"
    assert written.summary.bytes == (written.directory / ANNOTATIONS).stat().st_size


def test_broken_recognitions_follow_the_good_ones(small: Written) -> None:
    broken_ids = small.summary.broken_ids
    assert list(broken_ids) == list(BROKEN)
    assert [broken_ids[kind] for kind in BROKEN if kind != "id_too_large"] == list(
        range(100_334, 100_333 + len(BROKEN))
    )
    assert broken_ids["id_too_large"] == 0
    assert small.ids()[310:] == [*range(100_334, 100_333 + len(BROKEN)), 99_999_999_999_999_999_999]


def test_broken_recognitions_alone(tmp_path: Path) -> None:
    written = write(tmp_path, 0, size=SMALL, broken=True)
    assert (written.summary.recognitions, len(written.summary.broken_ids)) == (0, len(BROKEN))
    assert len(written.annotations) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("recognitions", "is_held"), [(1, True), (120, False)])
def test_the_command_says_that_a_load_of_a_small_sample_is_held(
    recognitions: int,
    is_held: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample, "write_sample", partial(write_sample, size=SMALL))
    assert main(["sample", str(tmp_path / "ds"), "--recognitions", str(recognitions), "--broken"]) == 0
    assert ("More than 20% of it are broken: a load is held" in capsys.readouterr().out) == is_held


@pytest.mark.slow
def test_unusual_recognitions_follow_the_broken_ones_and_change_nothing_else(small: Written, tmp_path: Path) -> None:
    written = write(tmp_path / "both", 310, size=SMALL, broken=True, unusual=True, workers=1)
    ids = written.summary.unusual_ids
    assert list(ids) == list(UNUSUAL)
    assert written.ids()[309 + len(BROKEN) : -1] == list(ids.values())
    added = {
        path for identifier in ids.values() for path in digests(written.directory, f"**/recognition_{identifier}/**/*")
    }
    added |= {ANNOTATION_LINES, *digests(written.directory, f"{LATER}/**/*")}
    common = {path: digest for path, digest in digests(written.directory).items() if path not in added}
    assert written.summary.bytes == sum(
        path.stat().st_size for path in written.directory.glob("**/*") if path.is_file() and not path.is_symlink()
    )
    former = digests(small.directory)
    assert {path for path, digest in common.items() if former[path] != digest} <= {ANNOTATIONS}
    assert common.keys() == former.keys()
    alone = write(tmp_path / "alone", 0, size=SMALL, unusual=True)
    assert (list(alone.summary.unusual_ids), alone.summary.broken_ids) == (list(UNUSUAL), {})


@pytest.mark.parametrize(
    ("kind", "cameras"),
    [
        ("photo_count_one", ["Main"]),
        ("photo_count_three", ["1_Main", "Main", "Qualifying"]),
        ("photo_cameras", ["1_Main", "Main"]),
    ],
)
def test_broken_sets_of_photos(small: Written, kind: str, cameras: list[str]) -> None:
    names = [path.stem for path in small.folder(small.summary.broken_ids[kind]).glob("photos/*")]
    assert sorted(re.sub(r"^.*\d{4}-\d\d-\d\d_", "", name) for name in names) == cameras


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("photo_empty", b""),
        ("photo_truncated", b"\xff\xd8"),
        ("photo_garbage", b"\0"),
        ("photo_undecodable", b"\xff\xd8"),
        ("photo_png", b"\x89PNG"),
    ],
)
def test_broken_photos(small: Written, kind: str, start: bytes) -> None:
    photos = small.photos(small.summary.broken_ids[kind])
    content = photos["Main"].read_bytes()
    assert content.startswith(start)
    with pytest.raises((OSError, SyntaxError)):
        Image.open(io.BytesIO(content), formats=("JPEG",)).load()
    with Image.open(photos["Qualifying"]) as image:
        image.load()
    if kind == "photo_undecodable":
        assert content.endswith(b"\xff\xd9")
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == SMALL
            image.draft("RGB", (SMALL[0] // 8, SMALL[1] // 8))
            with pytest.raises(OSError):
                image.load()
    if kind == "photo_png":
        with Image.open(io.BytesIO(content)) as image:
            image.load()


@pytest.mark.parametrize(("kind", "ending"), [("menu_broken", "AM"), ("receipt_broken", "correct_dishes")])
def test_broken_json(small: Written, kind: str, ending: str) -> None:
    text = small.content(kind, ending).decode("utf-8-sig")
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


def test_broken_menus(small: Written) -> None:
    with pytest.raises(UnicodeDecodeError):
        small.content("menu_utf8", "AM").decode()
    assert isinstance(json.loads(small.content("menu_shape", "AM")), dict)
    entries = json.loads(small.content("menu_entry", "AM"))
    assert sum("ExternalId" not in entry for entry in entries) == 1
    assert b"\\u0000" in small.content("menu_nul", "AM")
    assert sum("\0" in entry["Name"] for entry in json.loads(small.content("menu_nul", "AM"))) == 1


def test_broken_receipts(small: Written) -> None:
    assert isinstance(json.loads(small.content("receipt_shape", "correct_dishes")), dict)
    assert json.loads(small.content("receipt_count_zero", "correct_dishes"))[0]["Count"] == 0
    assert json.loads(small.content("receipt_count_text", "correct_dishes"))[0]["Count"] == "two"


def test_broken_recognitions_have_one_defect_each(small: Written) -> None:
    for kind, identifier in small.summary.broken_ids.items():
        if not identifier:
            continue
        if not kind.startswith("menu_"):
            assert len(json.loads(small.content(kind, "AM").decode("utf-8-sig"))) == 200
        if not kind.startswith("receipt_"):
            assert json.loads(small.content(kind, "correct_dishes"))[0]["Count"] >= 1
        if not kind.startswith("photo_"):
            assert set(small.photos(identifier)) == {"Main", "Qualifying"}
            for path in small.photos(identifier).values():
                with Image.open(path) as image:
                    image.load()


def test_broken_annotations(small: Written) -> None:
    good = set(small.good_ids())
    usable = {name: value for name, value in small.annotations.items() if isinstance(value, dict)}
    boxes = [detection["bbox_2d"] for value in usable.values() for detection in value["dishes"]["qwen_detections"]]
    bad = [box for box in boxes if not is_box(box)]
    assert bad == [[10, 20, 30], "10, 20, 60, 80", [60, 20, 10, 80], [10, 20, None, 80]]
    outside = [box for box in boxes if is_box(box) and box[0] > max(SMALL)]
    labels = [found["label"] for value in usable.values() for found in value["dishes"]["qwen_detections"]]
    assert (outside, labels.count("tray")) == ([[90_000, 20, 90_050, 80]], 1)
    wrong_shape = len(small.annotations) - len(usable)
    without_camera = [name for name in small.annotations if not re.search("Main|Qualifying", name)]
    unknown = [name for name in small.annotations if int(re.findall(r"recognition_(\d+)", name)[0]) not in good]
    assert len(bad) + 2 + wrong_shape + len(without_camera) + len(unknown) == len(BROKEN_ANNOTATIONS)
    assert not {int(re.findall(r"recognition_(\d+)", name)[0]) for name in unknown} & set(small.ids())


def is_box(box: object) -> bool:
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(value, int) for value in box)):
        return False
    return bool(box[0] < box[2] and box[1] < box[3])


@pytest.mark.parametrize(
    "options",
    [
        {"recognitions": -1},
        {"seed": -1},
        {"first_id": 0},
        {"first_id": 2**63 - 5},
        {"size": (95, 48)},
        {"size": (96, 9000)},
        {"workers": 0},
    ],
)
def test_arguments_out_of_bounds_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_sample(tmp_path / "new", **options)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for directory in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UsageError):
            write_sample(directory, 1, size=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_error_of_the_file_system_is_told_as_it_is(workers: int, tmp_path: Path) -> None:
    def obstruct(_: int) -> None:
        (tmp_path / EXPORT / f"recognition_{100_024 + 149}").mkdir(exist_ok=True)

    with pytest.raises(FileExistsError):
        write_sample(tmp_path, 150, size=(96, 48), workers=workers, progress=obstruct)


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, pipeline.sample as s\n"
        "s.write_sample(pathlib.Path(sys.argv[1]), 100_000, size=(96, 48), workers=2,"
        " progress=lambda n: print(n, flush=True))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "sample")]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().strip() == b"25"
            process.kill()
            # All of them hold the pipe, so its end is reached when the last of them has ended.
            process.communicate(timeout=20)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
