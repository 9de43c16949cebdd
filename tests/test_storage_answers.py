"""docs/reference/storage-answers.md is this test: each row of its table is run, cell by cell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import requests

from embedded_supabase.storage.auth import mint_key
from pipeline.cli import main
from pipeline.config import Secret, Settings
from pipeline.storage import Storage
from tests import world
from tests.proxies import (
    ANSWER_CUT,
    DATABASE_TIMEOUT,
    INTERNAL,
    PORTAL,
    RESET,
    SILENT,
    Answer,
    Fault,
    Request,
    StorageProxy,
    error,
    first,
    page,
)
from tests.services import REPOSITORY, MakeDataset, StorageServer, running_storage

#: They wait more than they compute.
pytestmark = pytest.mark.slow

ALWAYS = 1_000_000
DOCUMENT = (REPOSITORY / "docs/reference/storage-answers.md").read_text(encoding="utf-8")
COMMANDS = ("load", "status", "verify", "reset")
CELL = re.compile(r"(\d+)(?:, (\w+))?(?:: `(.+)`)?")

Plan = Callable[[Request], "Fault | None"]


def table() -> dict[str, list[str]]:
    """Return the cells of each row, by the first one."""
    lines = [line for line in DOCUMENT.splitlines() if line.startswith("| ")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {name: cells for name, *cells in rows}


def is_list(request: Request) -> bool:
    return "/object/list-v2/" in request.path


def is_delete(request: Request) -> bool:
    return request.method == "DELETE"


def always(fault: Fault, matches: Callable[[Request], bool] = lambda _: True) -> Plan:
    return first(ALWAYS, fault, matches)


def html(status: int, title: str, *headers: tuple[str, str]) -> Plan:
    fault = page(status, title)
    assert isinstance(fault.answer, Answer)
    return always(replace(fault, answer=replace(fault.answer, headers=headers)))


def said(value: object, status: int = 200, *headers: tuple[str, str]) -> Fault:
    return Fault("said", answer=Answer(status, json.dumps(value).encode(), headers=headers))


def listed(*keys: str) -> Fault:
    objects = [{"name": key, "metadata": {"size": 1}} for key in keys]
    return said({"hasNext": bool(keys), "nextCursor": "eA==", "folders": [], "objects": objects})


def without_last(answer: Answer) -> Answer:
    body = json.loads(answer.content)
    return replace(answer, content=json.dumps({**body, "objects": body["objects"][:-1]}).encode())


def endless() -> Fault:
    """Answer each list with a key above the former one, below every key of ours."""
    numbers = iter(range(ALWAYS))

    def answer(path: str, body: bytes) -> Answer:
        found = listed(f"{json.loads(body)['prefix']}0{next(numbers):09}").answer
        assert isinstance(found, Answer)
        return found

    return Fault("endless", answer=answer)


def too_many(request: Request) -> Fault | None:
    slow = said({"statusCode": "429", "code": "SlowDown", "message": "too many"}, 429, ("Retry-After", "1"))
    return slow if "/bucket/" in request.path and request.nth == 1 else None


def moved(request: Request) -> Fault | None:
    return Fault("moved", answer=Answer(308, b"", headers=(("Location", f"https://storage.invalid{request.path}"),)))


def no_route(request: Request) -> Fault | None:
    return said({"message": f"Route {request.path} not found", "error": "Not Found", "statusCode": 404}, 404)


def nothing_seen(request: Request) -> Fault | None:
    hidden = error(404, "Bucket not found", "NoSuchBucket", "Bucket not found")
    return hidden if "/bucket/" in request.path and request.method == "GET" else None


def lists_and_deletes_empty(request: Request) -> Fault | None:
    return listed() if is_list(request) else said([]) if is_delete(request) else None


@dataclass
class World:
    """A load of four recognitions in two shards, through a proxy in front of Storage."""

    settings: Settings
    proxy: StorageProxy
    dataset: Path
    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def run(self, name: str) -> tuple[int, str]:
        options = {"load": ("--source", str(self.dataset)), "reset": ("--confirm",)}.get(name, ())
        batch = () if name in ("status", "verify") else ("--batch-id", "b1")
        self.capsys.readouterr()
        code = main([name, *batch, *options])
        return code, "".join(self.capsys.readouterr())

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        return world.query(self.settings.database_url.reveal(), statement)

    def state(self) -> str:
        [(state,)] = self.query("SELECT state FROM ingest.batches")
        return str(state)

    def is_last(self, request: Request) -> bool:
        """Say whether the photo is sent that the first run does not send."""
        return request.is_upload and request.path.endswith(world.expected(self.dataset, "b1").images[-1][2])

    def begin(self) -> None:
        """Load all but one photo."""
        self.proxy.plan = always(INTERNAL, self.is_last)
        code, told = self.run("load")
        assert code == 3, told
        self.proxy.plan = None

    def check(self, cell: str, name: str) -> int:
        """Run a command and assert what a cell says."""
        found = CELL.fullmatch(cell)
        assert found is not None, cell
        self.proxy.forget()
        code, told = self.run(name)
        assert code == int(found[1]), told
        assert "Traceback" not in told
        if found[2]:
            assert self.state() == found[2]
        if found[3]:
            assert found[3] in told
        return code


PLANS: dict[str, Callable[[World], Plan]] = {
    "403, a page of Cloudflare": lambda scene: html(
        403, "Attention Required!", ("CF-RAY", "8a1b-FRA"), ("Server", "cloudflare")
    ),
    "413, a page of nginx, for one photo": lambda scene: always(
        page(413, "413 Request Entity Too Large"), scene.is_last
    ),
    "502, a page of a gateway": lambda scene: html(502, "Bad Gateway"),
    "503, a page of a gateway": lambda scene: html(503, "Service Unavailable"),
    "540, a page: the project is paused": lambda scene: html(540, "Project paused"),
    "200, a page of a captive portal": lambda scene: always(PORTAL),
    "511, a page of a captive portal": lambda scene: html(511, "Network Authentication Required"),
    "302, a redirect": lambda scene: html(302, "Found", ("Location", "http://login.invalid/")),
    "308, a redirect to `https`": lambda scene: moved,
    "404, an address without a Storage API": lambda scene: no_route,
    "empty lists": lambda scene: always(listed(), is_list),
    "lists without the last object": lambda scene: always(Fault("partial", edit=without_last), is_list),
    "empty lists, and empty responses to deletes": lambda scene: lists_and_deletes_empty,
    "a list without end": lambda scene: always(endless(), is_list),
    "the same page of a list again and again": lambda scene: always(listed("b1/recognitions/0"), is_list),
    "a response that drips": lambda scene: always(Fault("drips", drips=True)),
    "no response": lambda scene: always(SILENT),
    "a connection that is reset": lambda scene: always(RESET),
    "half a response": lambda scene: always(ANSWER_CUT),
    "JSON of another form": lambda scene: always(said({"ok": True})),
    "a response of many megabytes": lambda scene: always(said("x" * (9 << 20))),
    "429 with `Retry-After: 1`, once": lambda scene: too_many,
    "429 with `Retry-After: 3600`": lambda scene: always(said({"code": "SlowDown"}, 429, ("Retry-After", "3600"))),
    "544, the database of Storage times out": lambda scene: always(DATABASE_TIMEOUT),
    "a bucket that the key does not see": lambda scene: nothing_seen,
}


@pytest.fixture
def scene(
    workdir: Path,
    settings: Settings,
    small_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[World]:
    monkeypatch.setattr("backoff.full_jitter", lambda value: 0.01)
    monkeypatch.setattr("pipeline.storage.client._MOST_PAGES", 5)
    for name, value in (("THREAD_COUNT", "3"), ("BATCH_SIZE", "2"), ("RETRY_MAX_ATTEMPTS", "1")):
        monkeypatch.setenv(f"PIPELINE_{name}", value)
    with StorageProxy(settings.url) as proxy:
        monkeypatch.setenv("NEXT_PUBLIC_SUPABASE_URL", proxy.url)
        yield World(settings, proxy, small_dataset(4), monkeypatch, capsys)


def in_turn(scene: World, name: str, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Run the commands of a row, each between a beginning and an end of what is wrong."""
    cells = dict(zip(COMMANDS, table()[name], strict=True))
    scene.begin()
    begin()
    code = scene.check(cells["load"], "load")
    if code:
        assert world.domain(scene.settings.database_url.reveal()).recognitions == []
    end()
    assert scene.run("load")[0] == 0
    lost = [row[0] for row in scene.query("SELECT recognition_id FROM ingest.rejects")]
    ids = sorted(set(world.folders(scene.dataset)) - set(lost))
    world.check(scene.settings, (scene.dataset, "b1", ids))
    begin()
    for command in ("status", "verify"):
        scene.check(cells[command], command)
    world.check(scene.settings, (scene.dataset, "b1", ids))
    code = scene.check(cells["reset"], "reset")
    if code and scene.state() == "done":
        world.check(scene.settings, (scene.dataset, "b1", ids))
    end()
    assert scene.run("reset")[0] == 0
    world.nothing(scene.settings)


def test_the_table_has_a_test_for_each_row() -> None:
    assert len(table()) > 20
    assert set(table()) == set(PLANS) | set(ENVIRONMENTS) | set(BUCKETS)


@pytest.mark.parametrize("name", PLANS)
def test_each_wrong_response_ends_each_command_as_the_table_says(scene: World, name: str) -> None:
    def begin() -> None:
        scene.proxy.plan = PLANS[name](scene)
        if name in ("a response that drips", "no response"):
            scene.patch.setattr("pipeline.storage.transport.READ_TIMEOUT", 0.3)

    def end() -> None:
        scene.proxy.plan = None
        scene.patch.setattr("pipeline.storage.transport.READ_TIMEOUT", 60.0)

    in_turn(scene, name, begin, end)


@pytest.fixture(scope="module")
def other_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageServer]:
    with running_storage(tmp_path_factory.mktemp("other-storage")) as server:
        yield server


def make_bucket(settings: Settings) -> None:
    with closing(Storage(settings)) as storage:
        storage.ensure_bucket()


ENVIRONMENTS: dict[str, Callable[[StorageServer, StorageServer], tuple[str | None, str]]] = {
    "an anon key": lambda ours, other: (None, mint_key(ours.secret, "anon")),
    "a key of a signed-in user": lambda ours, other: (None, mint_key(ours.secret, "authenticated")),
    "the key of another project": lambda ours, other: (None, mint_key("another secret of thirty-two bytes or more")),
    "another project, without the bucket": lambda ours, other: (other.url, other.key),
    "another project, with a bucket of that name": lambda ours, other: (other.url, other.key),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_each_wrong_setting_ends_each_command_as_the_table_says(
    scene: World, storage_server: StorageServer, other_project: StorageServer, name: str
) -> None:
    url, key = ENVIRONMENTS[name](storage_server, other_project)
    if name == "another project, with a bucket of that name":
        make_bucket(replace(scene.settings, url=other_project.url, key=Secret(other_project.key)))

    def use(url: str, key: str) -> None:
        scene.patch.setenv("NEXT_PUBLIC_SUPABASE_URL", url)
        scene.patch.setenv("SUPABASE_SERVICE_ROLE_KEY", key)

    right = scene.proxy.url
    in_turn(scene, name, lambda: use(url or right, key), lambda: use(right, storage_server.key))


BUCKETS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "a bucket that does not accept `image/jpeg`": ({"allowed_mime_types": ["image/png"]}, {"allowed_mime_types": None}),
    "a bucket that accepts files of 100 bytes": ({"file_size_limit": 100}, {"file_size_limit": None}),
    "a bucket that was deleted and made anew": ({}, {}),
}


def bucket_request(settings: Settings, method: str, path: str = "", body: object = None) -> None:
    headers = {"Authorization": f"Bearer {settings.key.reveal()}"}
    with requests.Session() as session:
        session.trust_env = False
        url = f"{settings.storage_url}/bucket/{settings.bucket}{path}"
        session.request(method, url, headers=headers, json=body or {}, timeout=30).raise_for_status()


@pytest.mark.parametrize("name", [name for name, (wrong, _) in BUCKETS.items() if wrong])
def test_each_setting_of_the_bucket_ends_each_command_as_the_table_says(scene: World, name: str) -> None:
    wrong, right = BUCKETS[name]

    def change(values: dict[str, object]) -> Callable[[], None]:
        return lambda: bucket_request(scene.settings, "PUT", body=values)

    in_turn(scene, name, change(wrong), change(right))


def make_anew(settings: Settings) -> None:
    bucket_request(settings, "POST", "/empty")
    bucket_request(settings, "DELETE")
    make_bucket(settings)


def record_anew(scene: World) -> None:
    """Run the statement of the document, with the time and the name of the bucket."""
    with closing(Storage(scene.settings)) as storage:
        found = storage.find_bucket()
    assert found is not None
    (statement,) = re.findall(r"```sql\n(UPDATE .*?)\n```", DOCUMENT, re.DOTALL)
    statement = re.sub(r"'2026[^']*'", f"'{found['created_at']}'", statement)
    scene.query(statement.replace("'recognitions'", f"'{scene.settings.bucket}'"))


def test_a_bucket_made_anew_is_refused_until_it_is_recorded(scene: World) -> None:
    cells = dict(zip(COMMANDS, table()["a bucket that was deleted and made anew"], strict=True))
    scene.begin()
    make_anew(scene.settings)
    scene.check(cells["load"], "load")
    record_anew(scene)
    assert scene.run("load")[0] == 0
    world.check(scene.settings, (scene.dataset, "b1", None))
    make_anew(scene.settings)
    for command in ("status", "verify", "reset"):
        scene.check(cells[command], command)
    assert main(["verify", "--repair"]) == 4
    record_anew(scene)
    assert scene.run("verify")[0] == 5
    assert main(["verify", "--repair"]) == 0
    world.check(scene.settings, (scene.dataset, "b1", None))
    make_anew(scene.settings)
    record_anew(scene)
    code, told = scene.run("reset")
    assert code == 0
    assert "8 objects of batch b1 were missing from the bucket already." in told
    world.nothing(scene.settings)
