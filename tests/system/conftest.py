"""What the system tests share: a browser without a screen. They need root and Debian's packages (`install.sh`)."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
#: No sandbox as root, and nothing that Chromium would look up in the network by itself.
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def require(*programs: str) -> None:
    """Skip the test of a user who cannot install packages, where a program is missing; as root that is a failure."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing and os.geteuid() != 0:
        pytest.skip(f"needs {', '.join(missing)}")
    assert not missing, f"not installed: {', '.join(missing)}; run `make test-system`"


def require_root() -> None:
    """Skip the test of a user who is not root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@contextmanager
def network_lock(*, changes: bool) -> Iterator[None]:
    """Keep the links of this machine as they are, or be the only one that changes them, in all runs of the tests.

    Chromium ends every request with ERR_NETWORK_CHANGED when a link comes or goes. The lock is on a folder that is
    there for all of them, so that no file is left.
    """
    folder = os.open(tempfile.gettempdir(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX if changes else fcntl.LOCK_SH)
        yield
    finally:
        os.close(folder)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """A Chromium with a profile of its own, which logs what its pages say and ask the network for."""
    require(CHROMIUM, DRIVER)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with network_lock(changes=False):
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()
