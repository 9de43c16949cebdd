"""The report: its pure parts, then pages about real batches, parsed and compared with the database."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from embedded_supabase.ports import free_port
from pipeline.config import Settings
from pipeline.dataset.annotations import ANNOTATIONS
from pipeline.dataset.jpeg import END
from pipeline.dataset.layout import MAXIMUM_PHOTO_BYTES
from pipeline.errors import ObjectNotFound, StorageError
from pipeline.observe.metrics import Metrics
from pipeline.report import charts, texts
from pipeline.report.gather import write_report
from pipeline.report.page import draw_chart
from pipeline.report.pictures import MAXIMUM_BOXES, MAXIMUM_ITEMS
from pipeline.report.sections import how_to_go_on
from pipeline.report.thumbnail import Thumbnail, thumbnail
from pipeline.report.timeline import Clock, Span, rates, rows, runs, union
from pipeline.report.trays import Photo, tray_of
from pipeline.storage import Storage
from tests import reset_support, world
from tests.proxies import BAD_GATEWAY, INTERNAL, NO_SERVICE, Fault, StorageProxy
from tests.reset_support import Command, LoadBatch, fail_at
from tests.services import MakeDataset, Start, after_target, environment_file
from tests.sweeps import sweep
from tests.test_kill import unusable

command = reset_support.command
load = reset_support.load
dsn = reset_support.dsn

HOSTILE = "<script>alert(1)</script>&\"'{{ 7*7 }}"


# The timeline


def span(
    begin: float, end: float, worker: str = "host:1", step: str = "upload", shard: int = 1, **counters: int
) -> Span:
    return Span(step, shard, worker, begin, end, {"counters": counters})


spans = st.lists(
    st.builds(
        lambda begin, length, worker: span(begin, begin + length, f"host:{worker}"),
        st.integers(0, 2000),
        st.integers(0, 100),
        st.integers(1, 4),
    ),
    min_size=1,
    max_size=20,
)


@given(spans)
def test_the_clock_never_goes_back_and_shows_every_second_of_work(given_spans: list[Span]) -> None:
    clock = Clock(given_spans)
    moments = sorted({moment for one in given_spans for moment in (one.begin, one.end)})
    shown = [clock(moment) for moment in moments]
    assert shown == sorted(shown)
    assert shown[0] == 0
    assert shown[-1] == pytest.approx(clock.total)
    for one in given_spans:
        assert clock(one.end) - clock(one.begin) >= one.seconds - 1e-6
    at_work = sum(end - begin for begin, end in union((one.begin, one.end) for one in given_spans))
    assert at_work <= clock.total + 1e-6
    assert clock.total + sum(pause.seconds for pause in clock.pauses) >= moments[-1] - moments[0] - 1e-6


def test_a_night_between_two_runs_is_cut_out_and_a_short_wait_is_not() -> None:
    clock = Clock([span(0, 100), span(110, 200), span(30_000, 30_100)])
    assert [(pause.seconds, 200 < pause.at < 210) for pause in clock.pauses] == [(29_800, True)]
    assert clock.total == pytest.approx(200 + 100 + 0.02 * 290)


@given(spans)
def test_no_two_bars_of_a_lane_overlap_and_none_is_lost(given_spans: list[Span]) -> None:
    made = rows(given_spans)
    assert sorted(map(id, given_spans)) == sorted(id(one) for row in made for one in row.spans)
    assert len({row.worker for row in made}) == len(made)
    for row in made:
        for lane in row.lanes:
            assert all(one.end <= after.begin for one, after in itertools.pairwise(lane))


@given(spans, st.integers(1, 50))
def test_rates_add_up_to_what_was_done(given_spans: list[Span], bins: int) -> None:
    clock = Clock(given_spans)
    bounds, found = rates(clock, [(one, 10.0) for one in given_spans], bins)
    if clock.total == 0:
        assert (bounds, found) == ([], [])
    else:
        assert len(bounds) == len(found) + 1 == bins + 1
        assert sum(found) * clock.total / bins == pytest.approx(10.0 * len(given_spans))
        assert min(found) >= 0


def figures(given_spans: list[Span]) -> charts.Chart:
    return charts.timeline(rows(given_spans), Clock(given_spans))


def test_the_largest_batch_there_is_stays_readable() -> None:
    many = [
        span(shard * 10 + shift, shard * 10 + shift + 5, f"host:{shard % 8}", step, shard)
        for shard in range(1, 491)
        for shift, step in ((0, "upload"), (5, "copy"))
    ]
    chart = figures(many)
    assert Counter(bar.kind for bar in chart.bars) == {"upload": 490, "copy": 490}
    assert [name for _, name in chart.legend] == ["upload", "copy"]
    assert chart.height < 600
    assert len(draw_chart(chart)) < 250_000
    every_worker_is_new = figures([span(n, n + 1, f"host:{n}") for n in range(400)])
    assert every_worker_is_new.height < 1500
    assert f"The first {charts.MAXIMUM_ROWS} are shown." in every_worker_is_new.words


@given(spans)
def test_bars_are_inside_the_plot_and_as_wide_as_their_time(given_spans: list[Span]) -> None:
    chart = figures(given_spans)
    assert len(chart.bars) == len(given_spans)
    for bar in chart.bars:
        assert bar.width > 0
        assert chart.left <= bar.x <= bar.x + bar.width <= chart.right + 0.02
        assert chart.top <= bar.y <= bar.y + bar.height <= chart.bottom
    clock = Clock(given_spans)
    second = (chart.right - chart.left) / (clock.total or 1)
    lengths = sorted((clock(one.end) - clock(one.begin)) * second for one in given_spans)
    widths = sorted(bar.width for bar in chart.bars)
    assert all(length - 0.05 <= width <= max(length, 2) + 0.05 for width, length in zip(widths, lengths, strict=True))


def test_charts_escape_tags_and_control_characters() -> None:
    chart = figures([span(0, 1, '<a href="javascript:alert(1)">\N{RIGHT-TO-LEFT OVERRIDE}:1'), span(0, 1, "b:2")])
    text = draw_chart(chart)
    assert "<a" not in text
    assert "&lt;a" in text
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in text


@pytest.mark.parametrize(
    ("workers", "names"),
    [
        (["a:1", "a:22"], ["pid 1", "pid 22"]),
        (["a:1", "b:1"], ["a:1", "b:1"]),
        (["loader-0.example.org:1", "b:1"], ["loader-0.ex…:1", "b:1"]),
        (["pipeline-shards-0-abcde:1", "pipeline-shards-1-fghij:1"], ["…rds-0-abcde:1", "…rds-1-fghij:1"]),
        (
            ["pipeline-shards-0-abcde:1", "pipeline-shards-1-fghij:1", "b:1"],
            ["…rds-0-abcde:1", "…rds-1-fghij:1", "b:1"],
        ),
        (["loader-1.example.org:1", "loader-2.example.org:1"], ["loader-1.ex…:1", "loader-2.ex…:1"]),
        (
            ["a-shards-of-the-pipeline:1", "b-shards-of-the-pipeline:1", "a-shards-of-the-pipelink:1"],
            ["a-sha…peline:1", "b-sha…peline:1", "a-sha…pelink:1"],
        ),
        (["::1:5"], ["pid 5"]),
        ([""], ["pid "]),
        (["a:1/22", "a:1/23"], ["pid 22", "pid 23"]),
    ],
)
def test_workers_have_short_names(workers: list[str], names: list[str]) -> None:
    found = rows([span(0, 1, worker) for worker in workers])
    assert list(charts.short_names(found).values()) == names


def test_runs_are_told_from_the_workers_that_they_had() -> None:
    first = [span(0, 1, "a:7/8", "discover"), span(2, 3, "a:7/9"), span(2, 30, "b:5")]
    second = [span(50, 51, "a:4/5"), span(52, 53, "a:4/6", "transform")]
    third = [span(60, 61, "a:3", "load")]
    assert runs([*third, *second, *first]) == {"a:7/8": 1, "a:7/9": 1, "b:5": 1, "a:4/5": 2, "a:4/6": 2, "a:3": 3}
    chart = figures([*third, *first])
    assert [tick.text for tick in chart.y_ticks] == ["run 1, a:8", "run 1, a:9", "run 1, b:5", "run 2, a:3"]
    assert chart.words.startswith("2 runs, 4 workers, over ")
    assert figures(third).words.startswith("1 run, 1 worker, over ")


def test_bytes_a_second_and_recognitions_done_are_told_where_there_are_any() -> None:
    uploads = [span(0, 10, shard=1, bytes_uploaded=50_000_000), span(10, 20, shard=2, bytes_uploaded=10_000_000)]
    copies = [span(20, 22, step="copy", shard=1)]
    rate, done = charts.throughput(Clock([*uploads, *copies]), [*uploads, *copies], {1: 7, 2: 5})
    (line,) = rate.lines
    heights = [float(point.split(",")[1]) for point in line.points.split()]
    assert (min(heights), heights[-1]) == (rate.top, rate.bottom)
    assert "At most 5.0 MB/s" in rate.words
    ends = {line.name: float(line.points.split(",")[-1]) for line in done.lines}
    assert ends == {
        "upload": done.top,
        "copy": pytest.approx(done.bottom - 7 / 12 * (done.bottom - done.top), abs=0.01),
    }
    assert charts.throughput(Clock(copies), [span(0, 5, step="discover")], {}) == []
    (only_copies, _) = charts.throughput(Clock(copies), copies, {1: 8})
    assert "At most 4.0 recognitions/s" in only_copies.words


def test_the_distribution_of_durations_has_every_bucket_and_says_what_is_not_known() -> None:
    metrics = Metrics()
    for milliseconds in (4, 5, 5, 6, 40):
        metrics.add("storage_upload", milliseconds / 1000)
    histogram = metrics.as_dict()["operations"]["storage_upload"]["histogram"]
    chart = charts.latency("Uploads", "About.", histogram, 8)
    assert chart is not None
    assert sum(int(bar.text.split()[0]) for bar in chart.bars) == 5
    distances = [after.x - bar.x for bar, after in itertools.pairwise(chart.bars)]
    assert distances == [pytest.approx(distances[0], abs=0.02)] * len(distances)
    assert max(bar.height for bar in chart.bars) == pytest.approx(chart.bottom - chart.top)
    assert "50 % within 5" in chart.words
    assert "all within 44 ms. About." in chart.words
    assert "The durations of 5 of 8 are known" in chart.words
    assert charts.latency("Uploads", "", {"-20": 4}, 4) is None
    assert charts.latency("Uploads", "", {}, 600) is None


@given(st.dictionaries(st.integers(-60, 40).map(str), st.integers(1, 10**6), min_size=1), spans, st.integers(1, 10**15))
def test_texts_are_inside_the_chart_and_none_lies_on_another(
    histogram: dict[str, int], given_spans: list[Span], recognitions: int
) -> None:
    clock = Clock(given_spans)
    drawn = [figures(given_spans), *charts.throughput(clock, given_spans, {1: recognitions})]
    distribution = charts.latency("Uploads", "", histogram, 0)
    for chart in [*drawn, distribution] if distribution else drawn:
        for row in (chart.x_texts, chart.labels):
            ends = sorted(text.ends for text in row)
            assert all(-0.01 <= left < right <= texts.WIDTH + 0.01 for left, right in ends)
            assert all(one[1] <= after[0] for one, after in itertools.pairwise(ends))
        names = [texts.Text(chart.left - 8, tick.at, tick.text, "end") for tick in chart.y_ticks]
        assert all(name.ends[0] >= 0 for name in names)
    if distribution:
        assert all(label.ends[0] >= distribution.left - 0.01 for label in distribution.labels)
        assert "99 %" in [label.text for label in distribution.labels]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0.4 ms"), (0.0094, "9.4 ms"), (0.0123, "12 ms"), (1.254, "1.25 s"), (12.34, "12.3 s"), (75, "1m 15s")],
)
def test_short_durations(seconds: float, text: str) -> None:
    assert charts.milliseconds(seconds) == text


# Thumbnails


def jpeg(width: int = 64, height: int = 48, orientation: int = 1, **options: Any) -> bytes:
    """A picture that is red on the left and blue on the right."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, exif=exif, **options)
    return out.getvalue()


def decoded(one: Thumbnail | None) -> Image.Image:
    assert one is not None
    assert one.uri.startswith("data:image/jpeg;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(one.uri.partition(",")[2])))
    image.load()
    return image


def is_red(image: Image.Image, at: tuple[int, int]) -> bool:
    red, _, blue = image.getpixel(at)  # type: ignore[misc]
    return bool(red > blue)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_thumbnail_is_the_picture_as_it_is_stored(orientation: int) -> None:
    made = thumbnail(jpeg(1280, 720, orientation), 320)
    image = decoded(made)
    assert made is not None
    assert (made.width, made.height, image.size) == (1280, 720, (320, 180))
    assert 0x0112 not in image.getexif()
    assert (is_red(image, (20, 90)), is_red(image, (300, 90))) == (True, False)


def test_a_small_picture_stays_as_large_as_it_is() -> None:
    assert decoded(thumbnail(jpeg(64, 48), 320)).size == (64, 48)


def test_of_a_damaged_picture_what_can_be_decoded_is_shown_and_pillow_is_strict_again() -> None:
    content = jpeg(640, 480, progressive=False)
    assert thumbnail(content[: len(content) // 2], 320) is None
    assert decoded(thumbnail(content[: len(content) // 2], 320, damaged=True)).size == (320, 240)
    assert thumbnail(content[: len(content) // 2], 320) is None


def test_of_a_picture_of_which_nothing_can_be_decoded_there_is_no_thumbnail() -> None:
    content = jpeg(640, 480)
    header = content[: content.index(b"\xff\xda") + 14]
    assert thumbnail(header, 320, damaged=True) is None


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a" + b"\0" * 99]
)
def test_what_is_no_photo_has_no_thumbnail(content: bytes) -> None:
    assert thumbnail(content, 320, damaged=True) is None


def test_a_picture_that_would_take_much_memory_has_no_thumbnail() -> None:
    out = io.BytesIO()
    Image.new("L", (9000, 9000)).save(out, "PNG")
    assert thumbnail(out.getvalue(), 320, damaged=True) is None
    content = bytearray(jpeg(16, 16))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (20_000).to_bytes(2, "big") * 2
    assert thumbnail(bytes(content), 320, damaged=True) is None


def grey(side: int, **options: Any) -> bytes:
    """A picture that is dark on the left and light on the right."""
    image = Image.new("L", (side, side), 20)
    image.paste(220, (side // 2, 0, side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def first_scan_of_three(side: int) -> bytes:
    """A photo whose components have a scan each, without the second and third."""
    frame = b"\xff\xc0\0\x0b\x08" + side.to_bytes(2, "big") * 2
    content = grey(side)
    assert frame in content
    components = b"\x03" + b"".join(bytes((number, 0x11, 0)) for number in (1, 2, 3))
    start = content.index(frame)
    header = frame.replace(b"\x0b", b"\x11") + components
    return content[:start] + header + content[start + len(frame) + 4 :]


def repeated(side: int, scans: int, between: bytes = b"", end: bytes = END) -> bytes:
    content = grey(side, progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:start] + (between + content[start:-2]) * scans + end


def commented(count: int) -> bytes:
    return b"\xff\xd8" + b"\xff\xfe\0\2" * count + grey(64)[2:]


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (first_scan_of_three(320), first_scan_of_three(3000)),
        (grey(320, progressive=True), grey(5100, progressive=True)),
        (repeated(320, 3), repeated(2048, 250)),
        (repeated(320, 3, end=b""), repeated(2048, 250, end=b"")),
        (repeated(320, 3, between=b"junk"), repeated(2048, 250, between=b"junk")),
        (commented(10), commented(2100)),
    ],
    ids=["scan for each component", "progressive", "scans", "scans without end", "scans behind junk", "segments"],
)
def test_a_rejected_photo_is_decoded_within_the_limits_only(small: bytes, large: bytes) -> None:
    assert decoded(thumbnail(small, 320, damaged=True)).size[0] <= 320
    assert thumbnail(large, 320, damaged=True) is None


# Trays


def item(number: int, item_type: str = "FOOD", name: str | None = "soup", source: str = "RECIPE_LINE_OPTION") -> Any:
    return SimpleNamespace(id=number, item_type=item_type, name=name, source=source, has_ambiguity=False)


def box(item_id: int, **corners: Any) -> Any:
    return SimpleNamespace(initial_tray_item_id=item_id, bbox=corners, boxes=1)


def test_boxes_have_the_labels_of_the_items_beside() -> None:
    picture = Thumbnail("data:", 1000, 500)
    on_photo = [box(2, x=10, y=20, w=30, h=40), box(3, x=1, y=2, w=3.456, h=4), box(9, x=0, y=0, w=1, h=1)]
    items = [item(1), item(2, name="tea", source="MODEL"), item(3, "PLATE", None), item(4, "TRAY", "tray")]
    tray = tray_of(7, "", [Photo(1, picture, "", on_photo), Photo(2, None, "gone", [])], items)
    assert [(one.kind, one.label, one.name, one.note) for one in tray.items] == [
        ("dish", "", "soup", "no box"),
        ("dish", "1", "tea", "not on the receipt, camera 1 only"),
        ("plate", "P1", "plate", "camera 1 only"),
        ("other", "", "tray", "no box"),
    ]
    first, second = tray.photos
    drawn = [(one.kind, one.label, one.x, one.y, one.w, one.h) for one in first.boxes]
    assert drawn == [("dish", "1", 10, 20, 30, 40), ("plate", "P1", 1, 2, 3.46, 4), ("other", "?", 0, 0, 1, 1)]
    assert (second.picture, second.note, second.boxes) == (None, "gone", [])


numbers = st.floats(-1e4, 1e4, allow_nan=False)


@given(numbers, numbers, numbers, numbers, st.sampled_from(["FOOD", "PLATE"]))
def test_a_label_is_on_the_photo_wherever_its_box_is(x: float, y: float, w: float, h: float, kind: str) -> None:
    picture = Thumbnail("data:", 1280, 720)
    tray = tray_of(1, "", [Photo(1, picture, "", [box(1, x=x, y=y, w=w, h=h)])], [item(1, kind)])
    (drawn,) = tray.photos[0].boxes
    assert 0 <= drawn.label_x <= 1280 - tray.photos[0].letter
    assert 0 <= drawn.label_y <= 720 - tray.photos[0].letter


@pytest.mark.parametrize("corners", [{"x": "1"}, {"x": None}, {"x": True}, {"x": [1]}, {"x": float("nan")}])
def test_a_box_that_is_not_of_numbers_is_left_out_and_told(corners: dict[str, Any]) -> None:
    picture = Thumbnail("data:", 100, 100)
    boxes = [box(1, **{"x": 1, "y": 1, "w": 1, "h": 1, **corners}), SimpleNamespace(initial_tray_item_id=1, bbox=[1])]
    (photo,) = tray_of(1, "", [Photo(1, picture, "", boxes)], [item(1)]).photos
    assert (photo.boxes, photo.note) == ([], "2 boxes have invalid coordinates.")


def test_a_box_on_a_photo_that_is_not_shown_gives_its_item_no_label() -> None:
    shown, gone = Photo(1, Thumbnail("data:", 100, 100), "", []), Photo(2, None, "gone", [box(1, x=1, y=1, w=1, h=1)])
    (only,) = tray_of(1, "", [shown, gone], [item(1)]).items
    assert (only.label, only.note) == ("", "camera 2 only")


# Reading an object


def test_an_object_is_read_whole_or_refused_when_it_is_larger_than_wanted(settings: Settings) -> None:
    content = os.urandom(100_000)
    with closing(Storage(settings)) as storage:
        storage.ensure_bucket()
        storage.upload("b1/a b.jpg", content)
        assert storage.read("b1/a b.jpg", len(content)) == content
        with pytest.raises(StorageError, match="more than 99999 bytes"):
            storage.read("b1/a b.jpg", len(content) - 1)
        assert storage.read("b1/a b.jpg", 1 << 20) == content
        with pytest.raises(ObjectNotFound):
            storage.read("b1/none.jpg", 10)


# What to do about a batch


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ("done", ""),
        ("reset", ""),
        ("loading", "To go on: `python -m pipeline load --batch-id b1 --limit 5 --production`"),
        ("resetting", "To go on: `python -m pipeline reset --batch-id b1 --production`"),
        ("held", "Too much is rejected. If "),
        ("held", "`python -m pipeline publish --batch-id b1 --production`."),
    ],
)
def test_a_batch_that_is_not_done_says_how_to_go_on(state: str, text: str) -> None:
    summary = {
        "batch_id": "b1",
        "state": state,
        "held_reason": "Too much is rejected.",
        "source": "/ds",
        "limit": 5,
        "force": False,
        "changed": False,
        "kind": "load",
        "coordinates": "pixels",
        "exif_turned": False,
    }
    found = how_to_go_on(summary, production=True)
    assert text in found
    assert bool(text) == bool(found)


# Pages about batches


class Page(HTMLParser):
    """A page as it is read: its elements with their attributes, the text, the tooltips of its charts, and its boxes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.charts: dict[str, list[str]] = {}
        self.text = ""
        self.boxes: dict[tuple[int, int], list[tuple[str, float, float, float, float]]] = {}
        self._within: list[str] = []
        self._photo = (0, 0)
        self._kind = ""
        self._chart = ""
        self.feed(self.source)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        self._within.append(tag)
        self.text += " "
        if tag == "svg":
            self._chart = attributes.get("id", "")
            if self._chart:
                self.charts[self._chart] = []
        if tag == "title" and "svg" in self._within and self._chart:
            self.charts[self._chart].append("")
        if "data-recognition" in attributes:
            self._photo = int(attributes["data-recognition"]), int(attributes["data-camera"])
            self.boxes[self._photo] = []
        elif tag == "g":
            self._kind = attributes["class"]
        elif attributes.get("class") == "box":
            corners = tuple(float(attributes[name]) for name in ("x", "y", "width", "height"))
            self.boxes[self._photo].append((self._kind, *corners))  # type: ignore[arg-type]

    def handle_endtag(self, tag: str) -> None:
        while self._within and self._within.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._within[-1:] == ["title"] and "svg" in self._within and self._chart:
            self.charts[self._chart][-1] += data
        elif "style" not in self._within:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


Report = Callable[..., Page]


@pytest.fixture
def report(command: Command, tmp_path: Path) -> Report:
    """Write the report of a batch and return its page."""

    def run(batch_id: str, *options: str) -> Page:
        path = tmp_path / "page.html"
        done = command("report", "--batch-id", batch_id, "--out", path, *options)
        assert (done.code, done.err) == (0, "")
        return Page(path)

    return run


def test_the_page_of_a_load_shows_its_numbers_rejects_and_trays_with_the_boxes_on_record(
    load: LoadBatch, report: Report, dsn: str, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset(12, broken=True)
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    page = report("b1")
    assert "Batch b1 done" in page.text
    assert "Recognitions 12 of " in page.text
    assert page.all("section")[1]["id"] == "rejects"
    assert page.all("section")[2]["id"] == "notices"
    assert {"#rejects", "#notices"} <= {one["href"] for one in page.all("a")}
    assert [one["class"] for one in page.all("div") if one.get("class") in ("bad", "odd")] == ["bad", "odd"]
    assert "To go on" not in page.text
    rejected = world.query(dsn, "SELECT path, code, message FROM ingest.rejects WHERE batch_id = 'b1'")
    assert len(rejected) > 10
    for path, code, message in rejected:
        assert f"{code} {message} {path}" in page.text
    # those that are truncated, damaged beyond a point, or a PNG; an empty file and a text are no picture
    assert len([one for one in page.all("img") if one["src"].startswith("data:image/jpeg;base64,")]) >= 2
    assert page.source.count('class="nopicture"') >= 2
    expected: dict[tuple[int, int], list[tuple[str, float, float, float, float]]] = {
        (number, camera): []
        for (number,) in world.query(
            dsn, f"SELECT id FROM public.recognitions WHERE {world.ours('public.recognitions')}"
        )
        for camera in (1, 2)
    }
    for number, camera, kind, bbox in world.query(
        dsn,
        "SELECT i.recognition_id, i.camera_number, t.item_type, a.bbox FROM public.initial_annotations a"
        " JOIN public.images i ON i.id = a.image_id"
        " JOIN public.initial_tray_items t ON t.id = a.initial_tray_item_id"
        f" WHERE i.{world.ours('public.images')} ORDER BY a.id",
    ):
        corners = tuple(round(float(bbox[name]), 2) for name in ("x", "y", "w", "h"))
        expected[number, camera].append(({"FOOD": "dish", "PLATE": "plate"}[kind], *corners))  # type: ignore[arg-type]
    assert page.boxes == expected
    assert sum(map(len, expected.values())) > 50
    named = f"SELECT DISTINCT name FROM public.recipe_line_options WHERE {world.ours('public.recipe_line_options')}"
    for (name,) in world.query(dsn, named):
        assert name in page.text
    assert set(page.charts) == {"timeline", "rate", "done", "latency"}
    assert len([text for text in page.charts["timeline"] if text.startswith("upload, ")]) == 1
    assert sum(int(text.split()[0]) for text in page.charts["latency"]) == 24


def test_the_page_is_one_file_that_can_ask_the_network_for_nothing(
    load: LoadBatch, report: Report, small_dataset: MakeDataset
) -> None:
    load(small_dataset(), "b1")
    page = report("b1")
    assert page.source.startswith("<!doctype html>\n")
    (html,) = page.all("html")
    assert html["lang"] == "en"
    assert "<title>Batch b1: done</title>" in page.source
    (rule,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(part.split(" ", 1) for part in rule.split("; "))
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    links = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href")
    ]
    assert len(links) > 24
    assert {re.match(r"#|data:image/jpeg;base64,|data:,$", one) is not None for one in links} == {True}
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {one["href"][1:] for one in page.all("a")} <= set(identifiers)
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []
    assert page.all("script") == []


def test_the_page_without_photos_is_small_and_names_no_address(
    load: LoadBatch, report: Report, small_dataset: MakeDataset
) -> None:
    load(small_dataset(), "b1")
    page = report("b1", "--sample", "0")
    assert set(page.charts) == {"timeline", "rate", "done", "latency"}
    assert len(page.source.encode()) < 300_000
    assert "bad" not in {one.get("class") for one in page.all("div")}
    assert "<script" not in page.source
    assert re.search(r"https?:", page.source) is None


@pytest.mark.slow
def test_the_page_of_the_largest_batch_is_small_without_photos(
    load: LoadBatch, report: Report, dsn: str, small_dataset: MakeDataset
) -> None:
    load(small_dataset(1), "b1")
    world.query(
        dsn,
        "INSERT INTO ingest.batch_state (batch_id, step, shard, started_at, finished_at, worker, metrics)"
        " SELECT 'b1', step, shard, now() + shard * interval '3 s', now() + (shard * 3 + 2) * interval '1 s',"
        " format('loader:%s/%s', shard / 100, shard % 8), metrics"
        " FROM generate_series(2, 490) AS shard, unnest(ARRAY['upload', 'copy']) AS step,"
        " (SELECT metrics FROM ingest.batch_state WHERE batch_id = 'b1' AND step = 'upload') AS one",
    )
    for table in ("rejects", "notices"):
        world.query(
            dsn,
            f"INSERT INTO ingest.{table} (batch_id, path, code, message, step)"
            " SELECT 'b1', repeat('folder/', 30) || n, 'code_' || n / 200, repeat('word ', 40), 'discover'"
            " FROM generate_series(1, 5000) AS n",
        )
    world.query(dsn, "UPDATE ingest.batches SET metrics = '{}', shards = 490")
    page = report("b1", "--sample", "0")
    assert len(page.source.encode()) < 1_500_000
    assert len(page.charts["timeline"]) > 2 * 489
    assert page.text.count("The first 100 of 5,0") == 2


def test_names_from_outside_are_text_and_nothing_else(
    load: LoadBatch, report: Report, dsn: str, own_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset = own_dataset(3, broken=True).rename(tmp_path / HOSTILE.replace("/", "⁄"))
    hostile = f"{HOSTILE}\N{RIGHT-TO-LEFT OVERRIDE}\x07\n"
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    clean = report("b1")
    theirs = world.ours("public.recipe_line_options")
    world.query(dsn, f"UPDATE public.recipe_line_options SET name = %s WHERE {theirs}", (hostile,))
    world.query(dsn, "UPDATE ingest.batch_state SET worker = %s", (hostile,))
    world.query(
        dsn,
        "INSERT INTO ingest.rejects (batch_id, path, code, message, step) VALUES ('b1', %s, %s, %s, 'upload')",
        (hostile, hostile, hostile),
    )
    counters = json.dumps({"counters": {f"retries_{hostile}": 1}, "operations": {hostile: {"ops": 1, "seconds": 1}}})
    world.query(dsn, "UPDATE ingest.batch_state SET metrics = metrics || %s WHERE step = 'transform'", (counters,))
    world.query(dsn, "UPDATE ingest.batches SET metrics = '{}'")
    page = report("b1")
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in clean.elements}
    assert page.text.count("<script>alert(1)</script>&\"'{{ 7*7 }}\\u202e\\x07\\n") > 6
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in page.source
    assert "\x07" not in page.source


def test_the_page_of_annotations_shows_the_trays_that_it_annotated(
    load: LoadBatch, report: Report, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset(5, broken=True)
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    page = report("q1")
    assert "Batch q1 done" in page.text
    assert len(page.boxes) == 10
    assert sum(map(len, page.boxes.values())) > 20
    assert set(page.charts) == {"timeline", "rate", "done"}  # one COPY is no distribution
    assert "recognition_unknown" in page.text
    assert page.all("img") == []


@pytest.mark.parametrize(("sample", "shown"), sweep([("4", 4), ("0", 0), ("1", 1), ("99", 9)]))
def test_the_sample_is_as_large_as_wanted_spread_over_the_shards_and_the_same_each_time(
    load: LoadBatch,
    report: Report,
    dsn: str,
    small_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
    sample: str,
    shown: int,
) -> None:
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "3")
    load(small_dataset(9), "b1")
    page = report("b1", "--sample", sample)
    assert len(page.boxes) == 2 * shown
    assert report("b1", "--sample", sample).boxes.keys() == page.boxes.keys()
    shards = world.query(
        dsn,
        "SELECT count(DISTINCT shard) FROM ingest.manifest WHERE recognition_id = ANY (%s)",
        ([number for number, _ in page.boxes],),
    )
    assert shards == [(min(shown, 3),)]
    assert (shown == 0) == ("no trays were requested" in page.text)


def test_an_unfinished_load_shows_the_photos_that_are_there(
    command: Command, report: Report, dsn: str, small_dataset: MakeDataset
) -> None:
    fail_at(dsn, "transform")
    assert command("load", "--source", small_dataset(), "--batch-id", "b1", "--local-scheduler").code == 3
    page = report("b1")
    assert "Batch b1 loading" in page.text
    assert "This batch is unfinished. To go on: python -m pipeline load --batch-id b1 " in page.text
    assert "readers do not see it yet, so it has no boxes" in page.text
    assert len(page.boxes) == 24
    assert {re.split("[,;]", text)[0] for text in page.charts["timeline"]} == {"discover", "upload", "copy"}


def test_a_load_of_which_no_shard_is_done_says_so(
    command: Command, report: Report, dsn: str, small_dataset: MakeDataset
) -> None:
    fail_at(dsn, "upload")
    assert command("load", "--source", small_dataset(), "--batch-id", "b1", "--local-scheduler").code == 3
    page = report("b1")
    assert "No shard of this batch is done yet" in page.text
    assert page.boxes == {}
    assert set(page.charts) == {"timeline"}


def test_unfinished_annotations_are_told_from_those_on_record(
    command: Command, load: LoadBatch, report: Report, dsn: str, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset()
    load(dataset, "b1")
    fail_at(dsn, "transform")
    assert command("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1", "--local-scheduler").code == 3
    page = report("q1")
    assert "readers do not see its boxes yet; those here are of a batch before it" in page.text
    assert len(page.boxes) == 24


def test_of_a_batch_that_was_reset_the_numbers_remain(
    command: Command, load: LoadBatch, report: Report, small_dataset: MakeDataset
) -> None:
    load(small_dataset(broken=True), "b1")
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    page = report("b1")
    assert "Batch b1 reset" in page.text
    assert "Recognitions 12 of " in page.text
    assert "The reset deleted the markers of this batch." in page.text
    assert "storage_upload 24" in page.text
    assert "This batch was reset: its photos are gone." in page.text
    assert page.charts == {}
    assert len(page.all("img")) >= 2


def test_markers_of_former_versions_have_averages_only(
    load: LoadBatch, report: Report, dsn: str, small_dataset: MakeDataset
) -> None:
    load(small_dataset(), "b1")
    world.query(
        dsn,
        "UPDATE ingest.batch_state SET metrics = metrics #- '{operations,storage_upload,histogram}'"
        " WHERE step = 'upload'",
    )
    page = report("b1")
    assert "has no histogram of durations; the averages are below" in page.text
    assert re.search(r"storage_upload 24 [\d.]+ ms – – –", page.text)
    assert "latency" not in page.charts


def test_a_version_that_readers_do_not_see_any_more_has_its_photos_and_says_whose_boxes_there_are(
    load: LoadBatch, report: Report, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset(4)
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    load(dataset, "b2", "--force")
    page = report("b1")
    assert page.text.count("Readers see another version, of batch b2") == 4
    assert len(page.boxes) == 8
    assert not any(page.boxes.values())
    assert all(report("b2").boxes.values())


def test_a_batch_that_was_held_says_when_it_was_published(
    command: Command, load: LoadBatch, report: Report, own_dataset: MakeDataset
) -> None:
    dataset = unusable(own_dataset(14))
    assert command("load", "--source", dataset, "--batch-id", "b1").code == 6
    assert "Published at" not in report("b1").text
    assert command("publish", "--batch-id", "b1").code == 0
    assert re.search(r"Held 10 of 14 .* allows\. .* Published at 20[0-9-]+T", report("b1").text)
    next(dataset.rglob("*_Qualifying.jpg")).unlink()  # of a recognition that is rejected anyway, whose message changes
    assert command("load", "--source", dataset, "--batch-id", "b2").code == 6
    text = report("b2").text
    assert "1 input left out" in text
    assert "Known rejects 9" in text


def test_retries_are_told_by_code(load: LoadBatch, report: Report, dsn: str, small_dataset: MakeDataset) -> None:
    load(small_dataset(), "b1")
    world.query(
        dsn,
        "UPDATE ingest.batch_state SET metrics ="
        """ jsonb_set(metrics, '{counters}', metrics -> 'counters' || '{"retries_503": 3, "retries_SlowDown": 40}')"""
        " WHERE step = 'upload'",
    )
    world.query(dsn, "UPDATE ingest.batches SET metrics = '{}'")
    page = report("b1")
    assert "SlowDown 40 503 3" in page.text
    assert "Retries 43" in page.text
    assert "43 retries" in " ".join(page.charts["timeline"])


def test_a_photo_that_is_turned_is_shown_as_it_is_stored_and_said_to_be(
    load: LoadBatch, report: Report, dsn: str, own_dataset: MakeDataset
) -> None:
    dataset = own_dataset(1)
    (main,) = dataset.rglob("*Main.jpg")
    main.write_bytes(jpeg(160, 120, orientation=6))
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    page = report("b1")
    assert page.text.count("orientation 6") == 1
    pictures = [one for one in page.all("image") if (one["width"], one["height"]) == ("160", "120")]
    assert len(pictures) == 2
    turned = decoded(Thumbnail(pictures[0]["href"], 160, 120))
    assert turned.size == (160, 120)
    assert (is_red(turned, (20, 60)), is_red(turned, (140, 60))) == (True, False)


def test_the_notes_of_a_photo_are_its_own_and_none_hides_another(
    load: LoadBatch, report: Report, settings: Settings, dsn: str, own_dataset: MakeDataset
) -> None:
    dataset = own_dataset(1)
    (turned,) = dataset.rglob("*Qualifying.jpg")
    turned.write_bytes(jpeg(160, 120, orientation=6))
    boxes = json.loads((dataset / ANNOTATIONS).read_text(encoding="utf-8"))
    of_turned = {key: value for key, value in boxes.items() if key.endswith("Qualifying.jpg")}
    (dataset / ANNOTATIONS).write_text(json.dumps(of_turned), encoding="utf-8")
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    differs = "The stored object differs from the loaded photo: its SHA-256 does not match."
    turn = "EXIF orientation 6 is not applied, to the photo or its boxes."
    for batch_id in ("b1", "q1"):
        text = report(batch_id).text
        assert (text.count(turn), text.count(differs)) == (1, 0)
    with closing(Storage(settings)) as storage:
        (key,) = [row[2] for row in world.domain(dsn).images if row[2].endswith("camera2.jpg")]
        storage.upload(key, jpeg(160, 120, orientation=6, progressive=True))
    for batch_id in ("b1", "q1"):
        assert report(batch_id).text.count(f"{differs} {turn}") == 1


def test_what_the_bucket_lost_or_holds_otherwise_is_said_of_the_photo(
    load: LoadBatch, report: Report, settings: Settings, dsn: str, small_dataset: MakeDataset
) -> None:
    load(small_dataset(2), "b1")
    keys = sorted(row[2] for row in world.domain(dsn).images)
    with closing(Storage(settings)) as storage:
        storage.remove(keys[:1])
        storage.upload(keys[1], jpeg())
        storage.upload(keys[2], b"not a picture")
    page = report("b1")
    assert page.text.count("The bucket has no object for this photo.") == 1
    assert page.text.count("The stored object differs from the loaded photo") == 1
    assert page.text.count("The stored object cannot be decoded as a picture.") == 1
    assert len(page.boxes) == 2


def test_without_storage_there_is_a_page_without_photos(
    command: Command,
    load: LoadBatch,
    settings: Settings,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_dataset: MakeDataset,
) -> None:
    load(small_dataset(3), "b1")
    monkeypatch.setenv("NEXT_PUBLIC_SUPABASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("PIPELINE_RETRY_MAX_ATTEMPTS", "0")
    done = command("report", "--batch-id", "b1", "--json")
    assert done.code == 0
    assert done.err.startswith("The page is without photos from Storage: Storage at http://127.0.0.1:")
    result = json.loads(done.out)
    assert (result["recognitions"], result["photos"]) == (3, 0)
    page = Page(workdir / "report-b1.html")
    assert page.text.count("Storage was not available.") == 6
    assert "latency" in page.charts


@pytest.mark.parametrize(
    "fault", [INTERNAL, *(pytest.param(one, marks=pytest.mark.slow) for one in (BAD_GATEWAY, NO_SERVICE))], ids=str
)
def test_one_object_that_cannot_be_read_costs_the_page_that_photo_alone(
    fault: Fault,
    load: LoadBatch,
    report: Report,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    small_dataset: MakeDataset,
) -> None:
    load(small_dataset(3), "b1")
    [(broken,)] = world.query(settings.database_url.reveal(), "SELECT min(storage_path) FROM images")
    monkeypatch.setenv("PIPELINE_RETRY_MAX_ATTEMPTS", "1")
    with StorageProxy(settings.url, lambda one: fault if one.path.endswith(f"/{broken}") else None) as proxy:
        monkeypatch.setenv("NEXT_PUBLIC_SUPABASE_URL", proxy.url)
        page = report("b1")
    assert "Storage was not available." not in page.text
    assert page.text.count("Reading it from the bucket failed: ") == 1
    assert len(page.all("image")) == 5


def test_without_the_source_folder_there_are_no_pictures_of_rejects(
    load: LoadBatch, report: Report, own_dataset: MakeDataset
) -> None:
    dataset = own_dataset(2, broken=True)
    load(dataset, "b1")
    shutil.rmtree(dataset)
    page = report("b1")
    assert "The source folder does not exist on this machine" in page.text
    assert page.all("img") == []
    assert "photo_truncated" in page.text


def test_no_file_outside_the_source_is_shown_and_no_pipe_is_waited_for(
    load: LoadBatch, report: Report, dsn: str, own_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset = own_dataset(1)
    load(dataset, "b1")
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(jpeg())
    (dataset / "link.jpg").symlink_to(outside)
    (dataset / "folder.jpg").mkdir()
    inside = ("inside.jpg", "inside.JPEG", "inside.jpe", "inside.JFIF")
    for name in inside:
        (dataset / name).write_bytes(jpeg())
    os.mkfifo(dataset / "pipe.jpg")
    unshown = ("../outside.jpg", str(outside), "link.jpg", "folder.jpg", "pipe.jpg", "none.jfif")
    for path in (*unshown, *inside, "menu.json"):
        world.query(
            dsn,
            "INSERT INTO ingest.rejects (batch_id, path, code, message, step)"
            " VALUES ('b1', %s, 'photo_changed', 'm', 'upload')",
            (path,),
        )
    world.query(dsn, "UPDATE ingest.batches SET metrics = '{}'")
    page = report("b1")
    assert len(page.all("img")) == len(inside)
    assert page.source.count('class="nopicture"') == len(unshown)


def test_many_boxes_and_items_are_cut_and_counted(
    load: LoadBatch, report: Report, dsn: str, small_dataset: MakeDataset
) -> None:
    load(small_dataset(1), "b1")
    world.query(
        dsn,
        "INSERT INTO public.initial_tray_items (recognition_id, item_type, source, line_number, ordinal)"
        " SELECT id, 'PLATE', 'MODEL', 0, n FROM public.recognitions, generate_series(1, 300) AS n"
        f" WHERE {world.ours('public.recognitions')};"
        "INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, detection, bbox, source)"
        """ SELECT i.id, t.id, 1000 + t.ordinal, '{"x": 1, "y": 1, "w": 1, "h": 1}', 'MODEL'"""
        " FROM public.images i JOIN public.initial_tray_items t USING (recognition_id) WHERE t.line_number = 0",
    )
    page = report("b1")
    assert [len(boxes) for boxes in page.boxes.values()] == [MAXIMUM_BOXES] * 2
    assert page.text.count(f"The first {MAXIMUM_BOXES} of 300 boxes.") == 2
    assert len(re.findall(r"<li class=", page.source)) == MAXIMUM_ITEMS


def test_the_result_is_told_and_the_page_is_where_it_was_wanted(
    command: Command, load: LoadBatch, workdir: Path, small_dataset: MakeDataset
) -> None:
    load(small_dataset(2), "b1")
    done = command("report", "--batch-id", "b1")
    assert re.fullmatch(r"report-b1\.html: [\d.]+ kB, batch b1 is done, 2 recognitions with 4 photos\n", done.out)
    path = workdir / "report-b1.html"
    assert path.stat().st_mode & 0o777 == 0o600
    result = json.loads(command("report", "--batch-id", "b1", "--out", "other.html", "--json").out)
    assert result == {
        "batch_id": "b1",
        "state": "done",
        "file": "other.html",
        "bytes": (workdir / "other.html").stat().st_size,
        "recognitions": 2,
        "photos": 4,
        "unavailable": "",
    }


def test_a_batch_that_is_not_there_and_a_file_that_cannot_be_are_told(
    command: Command, load: LoadBatch, workdir: Path, small_dataset: MakeDataset
) -> None:
    unknown = command("report", "--batch-id", "b1")
    assert (unknown.code, unknown.err.splitlines()[0]) == (2, "Error: There is no batch b1.")
    load(small_dataset(1), "b1")
    (workdir / "folder").mkdir()
    before = sorted(path.name for path in workdir.iterdir())
    for wrong in ("folder", "nowhere/page.html"):
        done = command("report", "--batch-id", "b1", "--out", wrong)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"Error: The report cannot be written to {wrong}: ")
    assert sorted(path.name for path in workdir.iterdir()) == before


def test_a_page_that_fails_half_way_leaves_the_former_one(
    load: LoadBatch,
    settings: Settings,
    database: Any,
    workdir: Path,
    small_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(1), "b1")
    path = workdir / "page.html"
    path.write_text("the former page", encoding="utf-8")
    before = sorted(one.name for one in workdir.iterdir())

    def fail(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(Storage, "read", fail)
    with pytest.raises(KeyboardInterrupt):
        write_report(settings, database, "b1", path, 12)
    assert path.read_text(encoding="utf-8") == "the former page"
    assert sorted(one.name for one in workdir.iterdir()) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_largest_photos_there_may_be_fit_into_the_memory_of_a_process(
    load: LoadBatch, settings: Settings, start: Start, dsn: str, small_dataset: MakeDataset, tmp_path: Path
) -> None:
    load(small_dataset(2), "b1")
    content = jpeg(2896, 2896, progressive=True, subsampling=0)
    with closing(Storage(settings)) as storage:
        for key in (row[2] for row in world.domain(dsn).images):
            storage.upload(key, content + bytes(MAXIMUM_PHOTO_BYTES - len(content)))
    arguments = ["report", "--batch-id", "b1", "--out", str(tmp_path / "page.html")]
    script = (
        "from pathlib import Path; from pipeline.cli import main\n"
        f"code = main({arguments!r})\n"
        "status = Path('/proc/self/status').read_text().splitlines()\n"
        "print(code, next(line.split()[1] for line in status if line.startswith('VmHWM:')))"
    )
    out, err = start(sys.executable, "-c", script).communicate(timeout=120)
    said, (code, kilobytes) = out.splitlines()[0], map(int, out.splitlines()[-1].split())
    assert (code, after_target(err)) == (0, "")
    assert "2 recognitions with 4 photos" in said
    assert kilobytes < 250_000


def test_another_bucket_in_the_settings_does_not_keep_a_batch_from_its_photos(
    load: LoadBatch, settings: Settings, report: Report, workdir: Path, small_dataset: MakeDataset
) -> None:
    load(small_dataset(1), "b1")
    text = environment_file(settings).replace(settings.bucket, "another")
    (workdir / ".env.local").write_text(text, encoding="utf-8")
    assert len(report("b1").boxes) == 2
