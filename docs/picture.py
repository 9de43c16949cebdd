"""Make report.webp, the picture in the README: the report of a demo load in a desktop window and on a phone.

    sh tests/system/install.sh          # Chromium and its driver; as root, once
    .venv/bin/python docs/picture.py

The script starts its own embedded services in a temporary folder and takes half a minute. Inspect the picture before
you commit it: its times and trays come from this load.
"""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path(__file__).with_name("report.webp")

#: Pixels: width of the window, width of the phone, the gap around them, and the height of both.
_WINDOW, _PHONE, _GAP, _HEIGHT = 900, 390, 24, 860
_AROUND = "#8a94a0"
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
_OURS = ("NEXT_PUBLIC_SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "DATABASE_URL", "STORAGE_BUCKET", "DATASET_DIR")


def main() -> None:
    """Load a sample, write its report, and take the picture."""
    with tempfile.TemporaryDirectory(prefix="pipeline-picture-") as folder:
        page = _report(Path(folder))
        with _browser(Path(folder)) as browser:
            window = _shot(browser, page, _WINDOW, "light", "body")
            phone = _shot(browser, page, _PHONE, "dark", "#trays")
    both = Image.new("RGB", (_WINDOW + _PHONE + 3 * _GAP, _HEIGHT + 2 * _GAP), _AROUND)
    both.paste(window, (_GAP, _GAP))
    both.paste(phone, (_WINDOW + 2 * _GAP, _GAP))
    both.save(PICTURE, "WEBP", quality=82, method=6)
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes, {both.width} x {both.height}")


def _report(folder: Path) -> Path:
    """Return the report of a load of a sample dataset with its annotations."""
    environment = {name: value for name, value in os.environ.items() if name not in _OURS}
    # Small shards give the timeline several bars.
    environment |= {"PIPELINE_HOME": str(folder / "home"), "PIPELINE_BATCH_SIZE": "40", "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "pipeline", *arguments], cwd=folder, env=environment, check=True)

    # The server's user must be able to reach its socket.
    folder.chmod(0o711)
    run("up")
    try:
        run("sample", "dataset", "--recognitions", "800")
        run("load", "--source", "dataset", "--batch-id", "demo", "--workers", "4")
        run("load-qwen", "--file", "dataset/qwen_annotations.json", "--batch-id", "demo-qwen")
        run("report", "--batch-id", "demo", "--out", "report.html", "--sample", "4")
    finally:
        run("down")
    return folder / "report.html"


@contextmanager
def _browser(folder: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*_FLAGS, f"--user-data-dir={folder / 'chromium'}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        yield browser
    finally:
        browser.quit()


def _shot(browser: webdriver.Chrome, page: Path, width: int, scheme: str, selector: str) -> Image.Image:
    """Return the page from the top of an element on, in a window of a width."""
    metrics = {"width": width, "height": _HEIGHT, "deviceScaleFactor": 1, "mobile": width == _PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    top = browser.execute_script(f"return document.querySelector('{selector}').getBoundingClientRect().top + scrollY")
    clip = {"x": 0, "y": top, "width": width, "height": _HEIGHT, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


if __name__ == "__main__":
    main()
