"""Luigi's visualiser in a browser: the graph by shards, how far each is, what failed and why, and no secret."""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from embedded_supabase.files import wait_until
from pipeline.config import Settings
from tests import world
from tests.proxies import Request, StorageProxy
from tests.services import REPOSITORY, MakeDataset, Start, asked_of_luigid, running_luigid

pytestmark = pytest.mark.system

SECONDS = 30.0
SHARDS = 4
SHARDED = {"PIPELINE_BATCH_SIZE": "3"}
FAMILIES = ["CopyShard", "DiscoverBatch", "LoadBatch", "TransformBatch", "UploadShard"]
PICTURE = ["DiscoverBatch", "UploadShard", "CopyShard", "TransformBatch", "LoadBatch"]
BARE = (sys.executable, "-m", "luigi", "--module", "pipeline", "LoadBatch", "--batch-id", "b1", "--workers", "2")

_ROWS = "[...document.querySelectorAll('#taskTable tbody tr')]"
_NODES = "[...document.querySelectorAll('a.graph-node-a')].map(it => [it.dataset.taskId, it.dataset.taskStatus])"
#: Of each task in the graph: its name, its height, and what it says under the mouse.
_PLACED = """[...document.querySelectorAll('a.graph-node-a')].map(it => it.parentNode).map(
    it => [it.textContent, it.getBoundingClientRect().y, $(it).data('bs.popover').options.content])"""
#: Of each task in the other form of the graph: its name, and its place from the left.
_DRAWN = """[...document.querySelectorAll('#mysvg g.node')].map(
    it => [it.querySelector('.name').textContent, it.transform.baseVal[0].matrix.e])"""
_CARELESS = """
CREATE FUNCTION careless() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF new.recognition_id = {number} THEN
        RAISE EXCEPTION 'the service says: {told}';
    END IF;
    RETURN new;
END
$$
"""


@pytest.fixture
def luigid(tmp_path: Path) -> Iterator[str]:
    text = (REPOSITORY / "luigi.cfg").read_text(encoding="utf-8")
    configuration = tmp_path / "luigi.cfg"
    # What failed stays so while a browser looks at it.
    configuration.write_text(text.replace("\nretry_delay = 10\n", "\nretry_delay = 900\n"), encoding="utf-8")
    with running_luigid(tmp_path, configuration=configuration) as url:
        yield url


class Visualiser:
    """The pages of a luigid, as a person opens them; what each said is remembered."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser, self._page = browser, f"{url}/static/visualiser/index.html"
        self.seen: list[str] = []
        browser.set_window_size(1500, 1100)

    def open(self, fragment: str) -> None:
        """Open a page anew."""
        self.browser.get("about:blank")
        self.browser.get(f"{self._page}#{fragment}")

    def wait(self, script: str, *values: Any) -> Any:
        """Wait until a script returns something that is not nothing, and return it."""
        found = WebDriverWait(self.browser, SECONDS).until(lambda it: it.execute_script(f"return {script}", *values))
        self.seen.append(self.browser.page_source)
        return found

    def tasks(self, count: int) -> list[str]:
        """Open the list of tasks, and return the text of each row once there are so many."""
        self.open("tab=tasks")
        self.wait("document.querySelector('#taskTable_length select')")
        script = "const it = $('#taskTable_length select'); it.val('100'); it.change();"
        self.browser.execute_script(script)
        return list(self.wait(f"{_ROWS}.length === arguments[0] ? {_ROWS}.map(row => row.innerText) : null", count))

    def press(self, button: str, *words: str) -> None:
        """Press a button in the one row that has some words in it."""
        rows = self.browser.find_elements(By.CSS_SELECTOR, "#taskTable tbody tr")
        [one] = [row for row in rows if all(word in row.text for word in words)]
        one.find_element(By.CSS_SELECTOR, button).click()

    def window(self, name: str) -> str:
        """Return the text of a window that is open over the page."""
        self.wait("$(arguments[0]).css('opacity') === '1' && $(arguments[0]).is(':visible')", name)
        return str(self.wait("document.querySelector(arguments[0]).innerText", name))

    def picture(self, path: Path) -> None:
        """Keep what the page looks like."""
        self.browser.save_screenshot(str(path))


def nodes(visualiser: Visualiser, task_id: str, count: int) -> dict[str, str]:
    """Open the graph below a task, and return the state of each task that it shows."""
    visualiser.open(f"tab=graph&taskId={task_id}&visType=svg&hideDone=0")
    script = f"{_NODES}.length === arguments[0] ? Object.fromEntries({_NODES}.map(it => [it[0], it[1]])) : null"
    return dict(visualiser.wait(script, count))


def everything_told(url: str, task_ids: list[str]) -> str:
    """Return all that the scheduler's interface tells of some tasks."""
    told = [asked_of_luigid(url, call) for call in ("graph", "worker_list", "resource_list")]
    for status in ("DONE", "FAILED", "PENDING", "RUNNING", "DISABLED", ""):
        told.append(asked_of_luigid(url, "task_list", status=status, upstream_status=""))
    for task_id in task_ids:
        for call in ("dep_graph", "inverse_dep_graph", "fetch_error", "get_task_status_message"):
            told.append(asked_of_luigid(url, call, task_id=task_id))
    return json.dumps(told, ensure_ascii=False)


def test_a_batch_that_is_done_is_a_graph_by_shards_with_its_summary(
    luigid: str, browser: webdriver.Chrome, start: Start, small_dataset: MakeDataset, settings: Settings, tmp_path: Path
) -> None:
    running = start(*BARE, "--source", small_dataset(12), "--scheduler-url", luigid, env=SHARDED)
    stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == 0, stderr
    visualiser = Visualiser(browser, luigid)
    rows = visualiser.tasks(3 + 2 * SHARDS)
    assert all("DONE" in row for row in rows)
    for shard, step in itertools.product(range(1, SHARDS + 1), ("upload", "copy")):
        assert sum(f"shard {shard} of {SHARDS}, {step}" in row for row in rows) == 1
    families = visualiser.wait("[...document.querySelectorAll('.sidebar .sidebar-menu li a')].map(it => it.innerText)")
    assert [family for family in FAMILIES if any(family in shown for shown in families)] == FAMILIES
    visualiser.picture(tmp_path / "tasks.png")
    visualiser.press(".statusMessage", "LoadBatch")
    message = visualiser.window("#statusMessageModal")
    assert stdout.splitlines()[0] in message
    assert "Performance Metrics:" in message
    assert "100%" in message
    visualiser.picture(tmp_path / "summary.png")
    done = asked_of_luigid(luigid, "task_list", status="DONE", upstream_status="")
    assert {task["progress_percentage"] for task in done.values()} == {100}
    told = [task["status_message"] for task in done.values()]
    assert told.count("6 of 6 photos") == SHARDS
    assert told.count("3 recognitions copied, 0 rejects") == SHARDS
    assert "12 recognitions in 4 shards, 0 rejects" in told
    assert any(text.startswith("12 recognitions\ntransform_way: 0 rows in ") for text in told)
    [root] = [task_id for task_id in done if task_id.startswith("LoadBatch_")]
    shown = nodes(visualiser, root, 3 + 2 * SHARDS)
    assert set(shown) == set(done)
    assert set(shown.values()) == {"DONE"}
    visualiser.picture(tmp_path / "graph.png")
    # As the picture in the README: discover, upload, COPY, transform, the batch.
    placed = visualiser.wait(_PLACED)
    upwards = [name for name, *_ in sorted(placed, key=lambda it: it[1], reverse=True)]
    assert [name for name, _ in itertools.groupby(upwards)] == PICTURE
    assert sum(f"shard 3 of {SHARDS}, upload" in said for *_, said in placed) == 1
    visualiser.open(f"tab=graph&taskId={root}&visType=d3&hideDone=0")
    drawn = visualiser.wait(f"{_DRAWN}.length === arguments[0] ? {_DRAWN} : null", 3 + 2 * SHARDS)
    assert [name for name, _ in itertools.groupby(name for name, _ in sorted(drawn, key=lambda it: it[1]))] == PICTURE
    visualiser.picture(tmp_path / "picture.png")
    for secret in (settings.key.reveal(), settings.database_url.reveal()):
        assert all(secret not in page for page in (*visualiser.seen, everything_told(luigid, list(done))))


def test_a_shard_that_failed_is_seen_with_its_cause_and_no_secret(
    luigid: str, browser: webdriver.Chrome, start: Start, small_dataset: MakeDataset, settings: Settings, tmp_path: Path
) -> None:
    dsn = settings.database_url.reveal()
    secrets = (settings.key.reveal(), dsn)
    number = sorted(world.folders(small_dataset(12)))[4]  # of the second shard
    # What a careless service might tell.
    world.query(dsn, _CARELESS.format(number=number, told=" ".join(("<b>no</b>", *secrets)).replace("'", "''")))
    world.query(dsn, "CREATE TRIGGER careless BEFORE INSERT ON raw.receipts FOR EACH ROW EXECUTE FUNCTION careless()")
    running = start(*BARE, "--source", small_dataset(12), "--scheduler-url", luigid, env=SHARDED)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 30
    visualiser = Visualiser(browser, luigid)
    rows = visualiser.tasks(3 + 2 * SHARDS)
    [failed] = [row for row in rows if "FAILED" in row and "UPSTREAM" not in row]
    assert "CopyShard" in failed
    assert "shard=2" in failed
    assert sum("UPSTREAM_FAILED" in row.replace(" ", "_") for row in rows) == 2
    visualiser.picture(tmp_path / "failed.png")
    visualiser.press(".showError", "CopyShard", "shard=2")
    cause = visualiser.window("#errorModal")
    assert "the service says: <b>no</b> ***" in cause  # as letters: the page takes none of it for markup
    visualiser.picture(tmp_path / "cause.png")
    everything = asked_of_luigid(luigid, "task_list", status="", upstream_status="")
    [root] = [task_id for task_id in everything if task_id.startswith("LoadBatch_")]
    shown = nodes(visualiser, root, 3 + 2 * SHARDS)
    assert [task_id[:10] for task_id, state in shown.items() if state == "FAILED"] == ["CopyShard_"]
    visualiser.picture(tmp_path / "failed-graph.png")
    visualiser.open("tab=workers")
    visualiser.wait("document.querySelector('.worker-table') || document.querySelector('#workerList').innerText")
    told = everything_told(luigid, list(everything))
    assert "the service says" in told
    for secret in secrets:
        assert all(secret not in page for page in (*visualiser.seen, told, stderr))


def test_a_shard_under_way_shows_how_far_it_is(
    luigid: str, browser: webdriver.Chrome, start: Start, small_dataset: MakeDataset, settings: Settings, tmp_path: Path
) -> None:
    go_on = threading.Event()

    def plan(request: Request) -> None:
        if request.is_upload and next(sent) > 10:
            assert go_on.wait(2 * SECONDS)

    sent = itertools.count(1)
    with StorageProxy(settings.url, plan) as proxy:
        environment = {"NEXT_PUBLIC_SUPABASE_URL": proxy.url, "PIPELINE_THREAD_COUNT": "1"}
        running = start(*BARE, "--source", small_dataset(12), "--scheduler-url", luigid, env=environment)
        visualiser = Visualiser(browser, luigid)
        try:
            asked = {"status": "RUNNING", "upstream_status": ""}

            def percents() -> list[int]:
                found = asked_of_luigid(luigid, "task_list", **asked).values()
                return [task["progress_percentage"] or 0 for task in found if task["name"] == "UploadShard"]

            assert wait_until(lambda: any(0 < one < 100 for one in percents()), SECONDS), running.poll()
            visualiser.tasks(5)
            visualiser.press(".statusMessage", "UploadShard")
            assert re.search(r"\b(8|10) of 24 photos\s+\d+%", visualiser.window("#statusMessageModal"))
            visualiser.picture(tmp_path / "running.png")
            pending = asked_of_luigid(luigid, "task_list", status="PENDING", upstream_status="").values()
            [load] = [task for task in pending if task["name"] == "LoadBatch"]
            assert re.fullmatch("[45] of 12 recognitions", load["status_message"])
        finally:
            go_on.set()
        assert running.wait(60) == 0
