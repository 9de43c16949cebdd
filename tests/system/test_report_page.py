"""The report in a browser: on a screen and a phone, in both colour schemes, without requests, with boxes in place."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from PIL import Image, ImageDraw
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from pipeline.dataset.annotations import ANNOTATIONS
from pipeline.report import charts
from pipeline.report.page import draw_chart
from pipeline.report.timeline import Clock, Span, rows
from tests import reset_support
from tests.reset_support import Command, LoadBatch
from tests.services import MakeDataset

pytestmark = pytest.mark.system

command = reset_support.command
load = reset_support.load

WIDTHS = {"screen": 1280, "tablet": 768, "phone": 390}
Show = Callable[[Path, str, str], None]


@pytest.fixture
def page(command: Command, load: LoadBatch, small_dataset: MakeDataset, tmp_path: Path) -> Path:
    """The report of a load with rejects and annotations."""
    dataset = small_dataset(12, broken=True)
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    path = tmp_path / "page.html"
    assert command("report", "--batch-id", "b1", "--out", path, "--sample", "4").code == 0
    return path


@pytest.fixture
def show(browser: webdriver.Chrome) -> Show:
    """Open a page in a window of a width, with a colour scheme."""

    def run(path: Path, width: str, scheme: str) -> None:
        metrics = {"width": WIDTHS[width], "height": 844, "deviceScaleFactor": 1, "mobile": width == "phone"}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        set_scheme(browser, scheme)
        browser.get("about:blank")
        asked_for(browser)  # what the browser shows before it is asked anything
        browser.get(path.as_uri())

    return run


def set_scheme(browser: webdriver.Chrome, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def ask(browser: webdriver.Chrome, expression: str) -> Any:
    return browser.execute_script(f"return {expression}")


def asked_for(browser: webdriver.Chrome) -> list[str]:
    """What the pages asked for since the last time."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]  # type: ignore[no-untyped-call]
    return [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]


def said(browser: webdriver.Chrome) -> list[str]:
    """What the console has since the last time."""
    return [entry["message"] for entry in browser.get_log("browser")]  # type: ignore[no-untyped-call]


def screenshot(browser: webdriver.Chrome, selector: str) -> Image.Image:
    """A picture of an element, wherever on the page it is, a pixel of the page to a pixel."""
    clip = ask(
        browser,
        "(() => { const box = document.querySelector(" + json.dumps(selector) + ").getBoundingClientRect();"
        " return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height, scale: 1}; })()",
    )
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


def luminance(colour: str) -> float:
    """Of WCAG 2, of a colour as CSS computes it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def computed(browser: webdriver.Chrome, name: str) -> str:
    """A colour of page.css as it is now."""
    script = (
        "(() => { const one = document.body.appendChild(document.createElement('i'));"
        f" one.style.color = 'var({name})'; const found = getComputedStyle(one).color;"
        " one.remove(); return found; })()"
    )
    return str(ask(browser, script))


def unreadable(browser: webdriver.Chrome) -> list[str]:
    """The texts of charts that are small, lie beyond their chart or on another text.

    A quarter of the height of a text is for the letters that it does not have, above or below its line.
    """
    found: list[str] = ask(
        browser,
        """[...document.querySelectorAll('.plot svg')].flatMap(chart => {
          const frame = chart.getBoundingClientRect();
          const boxes = [...chart.querySelectorAll('text')].map(one => [one.textContent, one.getBoundingClientRect()]);
          const bad = ([text, box], at) => box.height < 10
            || box.left < frame.left || box.right > frame.right || box.top < frame.top || box.bottom > frame.bottom
            || boxes.slice(at + 1).some(([_, other]) => box.left < other.right && other.left < box.right
                                                        && box.top + box.height / 4 < other.bottom
                                                        && other.top + box.height / 4 < box.bottom);
          return boxes.filter(bad).map(([text]) => `${chart.id}: ${text}`);
        })""",
    )
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_draws_its_charts_and_asks_for_nothing(
    browser: webdriver.Chrome, show: Show, page: Path, width: str, scheme: str
) -> None:
    show(page, width, scheme)
    assert said(browser) == []
    outside = [url for url in asked_for(browser) if not url.startswith(("data:", page.as_uri()))]
    assert outside == []
    assert ask(browser, "document.documentElement.scrollWidth") <= WIDTHS[width]
    too_wide = ask(
        browser,
        "[...document.querySelectorAll('.plot, .plot svg, svg.photo, .cards > div, h1, li')]"
        ".filter(one => one.getBoundingClientRect().right > innerWidth).length",
    )
    assert too_wide == 0
    plots = ask(
        browser,
        "[...document.querySelectorAll('.plot svg')]"
        ".map(one => [one.id, one.querySelectorAll('rect, polyline').length])",
    )
    assert [name for name, _ in plots] == ["timeline", "rate", "done", "latency"]
    assert all(drawn > 0 for _, drawn in plots), plots
    assert all(ask(browser, "[...document.querySelectorAll('img')].map(one => one.naturalWidth > 0)"))
    assert unreadable(browser) == []
    # The legend of the timeline is seen together with its bars.
    gap, right = ask(
        browser,
        "(() => { const box = name => document.querySelector(name).getBoundingClientRect();"
        " const keys = box('.keys'), plot = box('.plot');"
        " return [plot.top - keys.bottom, keys.right]; })()",
    )
    assert 0 <= gap < 40
    assert right <= WIDTHS[width]
    card = "document.querySelector('.cards .bad')"
    assert ask(browser, f"getComputedStyle({card}).borderColor") == computed(browser, "--bad")
    ask(browser, f"{card}.querySelector('a').click()")
    assert abs(ask(browser, "document.querySelector('#rejects').getBoundingClientRect().top")) < 40
    # The theme is one of the page and of the charts within it, and can be read.
    paper = computed(browser, "--page")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    assert ask(browser, "getComputedStyle(document.body).backgroundColor") == paper
    ticks = ask(browser, "[...document.querySelectorAll('.plot text')].map(one => getComputedStyle(one).fill)")
    assert len(ticks) > 10
    assert all(contrast(colour, paper) >= 4.5 for colour in ticks)
    for name in ("--ink", "--quiet", "--link", "--good", "--warn", "--bad"):
        assert contrast(computed(browser, name), paper) >= 4.5, name
    for name in ("--discover", "--upload", "--copy", "--transform", "--load"):
        assert contrast(computed(browser, name), paper) >= 3, name
    small = "[...document.querySelectorAll('main *')].filter(one => parseFloat(getComputedStyle(one).fontSize) < 11)"
    assert ask(browser, f"{small}.filter(one => !one.closest('svg')).length") == 0


def hardest_charts() -> Iterator[charts.Chart]:
    """Charts with many, long and close texts: durations of any spread, large numbers, hosts with long names, pauses."""
    for first, last in ((-60, 40), (-20, -20), (-9, -8), (-14, -3), (-30, 16), (10, 40)):
        for most in (first, last):
            histogram = {str(bucket): 1 for bucket in range(first, last + 1)} | {str(most): 1_234_567}
            chart = charts.latency("Durations", "", histogram, 0)
            assert chart
            yield chart
    for histogram in ({"-4": 5, "10": 1}, {"-6": 1000, "39": 10}, {"-43": 1_000_000, "29": 7}):
        chart = charts.latency("A tick at the top, a mark at the left", "", histogram, 0)
        assert chart
        yield chart
    hosts = ("OQOQOQOQOQOQ", "GOODHOUNDQUAD", "@@@@####&&&&", "ЩЖШЩЖШЩЖШЩЖШ", "a\x1b\x1b\x1b\x1b")
    named = [Span("copy", 1, f"{host}:{4_000_000 + nth}", nth, nth + 2) for nth, host in enumerate(hosts)]
    yield charts.timeline(rows(named), Clock(named))
    for seconds, shards, size in ((0.2, 3, 7), (170, 40, 16_000), (9_000, 48, 999_000), (300_000, 12, 100_000_000)):
        worked = [
            Span(
                "copy", shard, f"a-long-name-of-a-host-{shard % 9}:{4_000_000 + shard}", begin, begin + seconds / shards
            )
            for shard in range(shards)
            for begin in [shard * seconds / shards + (shard > shards / 2) * seconds + (shard > shards / 3) * seconds]
        ]
        yield charts.timeline(rows(worked), Clock(worked))
        yield from charts.throughput(Clock(worked), worked, dict.fromkeys(range(shards), size // shards))


@pytest.mark.parametrize("width", WIDTHS)
def test_texts_of_charts_can_be_read_whatever_the_numbers(
    browser: webdriver.Chrome, show: Show, tmp_path: Path, width: str
) -> None:
    path = tmp_path / "charts.html"
    style = files("pipeline.report").joinpath("page.css").read_text(encoding="utf-8")
    drawn = "".join(map(draw_chart, hardest_charts()))
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><style>{style}</style>"
    path.write_text(f"<!doctype html>{head}{drawn}", encoding="utf-8")
    show(path, width, "light")
    assert ask(browser, "document.querySelectorAll('.plot svg').length") > 20
    assert unreadable(browser) == []


def test_the_page_follows_when_the_colours_or_the_width_change(
    browser: webdriver.Chrome, show: Show, page: Path
) -> None:
    show(page, "screen", "light")
    before = ask(browser, "getComputedStyle(document.querySelector('#timeline rect')).fill")
    set_scheme(browser, "dark")
    after = ask(browser, "getComputedStyle(document.querySelector('#timeline rect')).fill")
    assert before != after
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    narrow = "document.querySelector('.plot').getBoundingClientRect().right <= 390"
    WebDriverWait(browser, 30).until(lambda _: ask(browser, narrow))
    assert ask(browser, "document.documentElement.scrollWidth") <= 390
    assert said(browser) == []


@pytest.mark.parametrize("width", ["screen", "phone"])
def test_boxes_are_on_the_photo_where_the_data_says(
    browser: webdriver.Chrome,
    show: Show,
    command: Command,
    load: LoadBatch,
    own_dataset: MakeDataset,
    tmp_path: Path,
    width: str,
) -> None:
    # A photo that is grey but for a dish and its plate, which its EXIF data wants turned.
    dataset = own_dataset(1)
    (photo,) = dataset.rglob("*Main.jpg")
    corners = {"dish": (400, 120, 640, 300), "plate": (80, 250, 330, 450)}
    image = Image.new("RGB", (800, 600), (120, 120, 120))
    ImageDraw.Draw(image).rectangle(corners["dish"], fill=(220, 20, 20))
    ImageDraw.Draw(image).rectangle(corners["plate"], fill=(20, 20, 220))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(photo, "JPEG", quality=95, exif=exif)
    value = {
        "dishes": {"qwen_detections": [{"bbox_2d": corners["dish"], "label": "dish_0"}]},
        "plates": {"qwen_detections": [{"bbox_2d": corners["plate"], "label": "plate"}]},
    }
    (dataset / ANNOTATIONS).write_text(json.dumps({str(photo.relative_to(dataset)): value}), encoding="utf-8")
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    path = tmp_path / "page.html"
    assert command("report", "--batch-id", "b1", "--out", path).code == 0
    show(path, width, "light")
    shot = screenshot(browser, 'svg.photo[data-camera="1"]')
    scale = shot.width / 800
    assert shot.height == pytest.approx(600 * scale, abs=2)
    for kind, (left, top, right, bottom) in corners.items():
        box = ask(
            browser,
            "(() => { const photo = document.querySelector('svg.photo[data-camera=\"1\"]');"
            f" const of = photo.getBoundingClientRect(); const one = photo.querySelector('.{kind} .box');"
            " const box = one.getBoundingClientRect();"
            " return [box.left - of.left, box.top - of.top, box.right - of.left, box.bottom - of.top]; })()",
        )
        assert box == pytest.approx([edge * scale for edge in (left, top, right, bottom)], abs=1)
        # Eight pixels within its edges is what the box is about, eight beyond them is not.
        middle_x, middle_y = (left + right) / 2 * scale, (top + bottom) / 2 * scale
        channel = {"dish": 0, "plate": 2}[kind]
        for x, y, inside in (
            (left * scale + 8, middle_y, True),
            (right * scale - 8, middle_y, True),
            (middle_x, top * scale + 8, True),
            (middle_x, bottom * scale - 8, True),
            (left * scale - 8, middle_y, False),
            (right * scale + 8, middle_y, False),
            (middle_x, bottom * scale + 8, False),
        ):
            colour = shot.getpixel((int(x), int(y)))
            assert isinstance(colour, tuple)
            assert (colour[channel] > 180 and colour[1] < 60) == inside, (kind, x, y, colour)


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """A server that a page must not reach, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_what_gets_into_the_page_all_the_same_cannot_call_home(
    browser: webdriver.Chrome, show: Show, page: Path, elsewhere: tuple[str, list[str]]
) -> None:
    address, asked = elsewhere
    show(page, "screen", "light")
    outcome = browser.execute_async_script(
        """
        const [address, done] = arguments;
        const image = new Promise((resolve) => {
          const one = new Image();
          one.onload = () => resolve("loaded");
          one.onerror = () => resolve("refused");
          one.src = `${address}/image`;
        });
        const script = new Promise((resolve) => {
          const one = document.createElement("script");
          one.onload = () => resolve("loaded");
          one.onerror = () => resolve("refused");
          one.src = `${address}/script`;
          document.body.append(one);
        });
        const inline = document.createElement("script");
        inline.textContent = "window.inlineRan = true";
        document.body.append(inline);
        const fetched = fetch(`${address}/fetch`).then(() => "loaded", () => "refused");
        Promise.all([image, script, fetched]).then((all) => done([...all, Boolean(window.inlineRan)]));
        """,
        address,
    )
    assert outcome == ["refused", "refused", "refused", False]
    assert asked == []
    assert len([line for line in said(browser) if "Content Security Policy" in line]) >= 4
