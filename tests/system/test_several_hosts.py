"""A batch on three hosts: network namespaces of one machine, joined by a bridge, each with a host name of its own.

This machine's own namespace has luigid, PostgreSQL, Storage and the starter; two others have a worker each. One of them
is killed and the other one cut off, in the middle of a shard, after both have done work.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from embedded_supabase.files import wait_until
from embedded_supabase.ports import free_port
from embedded_supabase.postgres import server as postgres
from embedded_supabase.postgres.server import EmbeddedPostgres
from embedded_supabase.services import create_roles
from embedded_supabase.storage.auth import mint_key
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.database.migrate import migrate
from pipeline.graph import luigid as luigid_calls
from tests import world
from tests.services import (
    MakeDataset,
    StorageServer,
    end,
    end_group,
    environment_file,
    give_data,
    local_settings,
    subprocess_environment,
)
from tests.system.conftest import network_lock, require, require_root
from tests.test_worker import Luigid, configuration, finish, holding, marked, rejects

pytestmark = pytest.mark.system

SECONDS = 120.0
DISCONNECT = 5
#: Milliseconds of an upload at least, so that there is a middle to be killed in.
LATENCY = 100
SECRET = "a secret of three hosts, at least 32 bytes long"
SLOW = {"PIPELINE_BATCH_SIZE": "2", "PIPELINE_THREAD_COUNT": "1"}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass(frozen=True)
class Network:
    """A bridge of this machine, and a namespace for each other host, at the far end of a cable."""

    token: str
    subnet: str

    @property
    def address(self) -> str:
        """Return the address of the host that the others share."""
        return f"{self.subnet}.1"

    def name(self, host: str) -> str:
        """Return the name of a host's namespace, and of our end of its cable."""
        return f"p{self.token}{host}"

    def plug(self, host: str, number: int) -> None:
        """Add a host."""
        here, there = self.name(host), f"{self.name(host)}x"
        ip("netns", "add", here)
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", here)
        ip("link", "set", here, "master", self.name("b"), "up")
        ip("-n", here, "address", "add", f"{self.subnet}.{number}/24", "dev", there)
        ip("-n", here, "link", "set", there, "up")
        ip("-n", here, "link", "set", "lo", "up")

    def cut(self, host: str) -> None:
        """Pull the cable of a host."""
        ip("link", "set", self.name(host), "down")

    def mend(self, host: str) -> None:
        """Put it back."""
        ip("link", "set", self.name(host), "up")

    def command(self, host: str, *command: str) -> list[str]:
        """Return a command as it runs on that host; the process that is started becomes the command itself."""
        named = ["sh", "-c", 'hostname "$0" && exec "$@"', f"host-{host}"]
        return ["ip", "netns", "exec", self.name(host), "unshare", "--uts", *named, *command]


@pytest.fixture
def network() -> Iterator[Network]:
    require_root()
    require("ip", "unshare", "hostname")
    # 198.18.0.0/15 is for tests of networks (RFC 2544).
    one = Network(uuid.uuid4().hex[:6], f"198.18.{random.randrange(256)}")
    with ExitStack() as stack:
        stack.enter_context(network_lock(changes=True))
        ip("link", "add", one.name("b"), "type", "bridge")
        stack.callback(ip, "link", "delete", one.name("b"))
        ip("address", "add", f"{one.address}/24", "dev", one.name("b"))
        ip("link", "set", one.name("b"), "up")
        for number, host in enumerate("cd", 2):
            # The namespace itself goes with the last process in it, some time later.
            for what in ("netns", "link"):
                command = ["ip", what, "delete", one.name(host)]
                stack.callback(subprocess.run, command, capture_output=True, check=False)
            one.plug(host, number)
        yield one


@contextmanager
def storage_at(address: str, folder: Path) -> Iterator[StorageServer]:
    """Run a Storage server that other hosts reach."""
    folder.mkdir()
    (folder / "secret").write_text(SECRET, encoding="ascii")
    port = free_port()
    serve = f"import embedded_supabase.storage.server as one; one.HOST = {address!r}; raise SystemExit(one.main())"
    command = [sys.executable, "-c", serve, "--root", str(folder / "root"), "--port", str(port)]
    command += ["--secret-file", str(folder / "secret"), "--latency", str(LATENCY)]
    (folder / "root").mkdir()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=subprocess_environment(), cwd=folder, stdout=log, stderr=log)
    server = StorageServer(f"http://{address}:{port}", SECRET, mint_key(SECRET), folder / "root")
    try:
        assert wait_until(lambda: reached(server.url) or process.poll() is not None, SECONDS)
        assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")
        yield server
    finally:
        end(process)


def reached(url: str) -> bool:
    with requests.Session() as session:
        session.trust_env = False
        try:
            return session.get(f"{url}/status", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False


@pytest.fixture
def settings(
    network: Network, made_data: Path, short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """The settings that all hosts have: services that listen on the bridge."""
    home = short_folder / network.token
    give_data(home, made_data)
    with open(home / "postgres" / "data" / "pg_hba.conf", "a", encoding="ascii") as rules:
        rules.write(f"host all all {network.subnet}.0/24 trust\n")
    monkeypatch.setitem(postgres._SERVER, "listen_addresses", network.address)
    port = free_port()
    monkeypatch.setattr(postgres, "PORT", port)
    monkeypatch.setitem(postgres._SERVER, "port", str(port))
    server = EmbeddedPostgres(home, durable=False)
    try:
        create_roles(server.start())
        with storage_at(network.address, tmp_path / "storage") as storage:
            url = f"postgresql://postgres@{network.address}:{port}/postgres"
            one = local_settings(url, storage, "three-hosts", tmp_path / "home")
            with closing(Database(one)) as database:
                migrate(database)
            yield one
    finally:
        server.stop()


@pytest.fixture
def luigid(network: Network, settings: Settings, clean_environment: None, tmp_path: Path) -> Iterator[Luigid]:
    """A luigid on the bridge; its folder is the working directory of all hosts."""
    url = f"http://{network.address}:{free_port()}"
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "luigi.cfg").write_text(configuration(url, DISCONNECT), encoding="utf-8")
    (folder / ".env.local").touch(mode=0o600)
    (folder / ".env.local").write_text(environment_file(settings), encoding="utf-8")
    command = [sys.executable, "-c", "import luigi.cmdline; luigi.cmdline.luigid()", "--address", network.address]
    command += ["--port", url.rpartition(":")[2], "--state-path", str(tmp_path / "state")]
    with open(tmp_path / "luigid.log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=subprocess_environment(), stdout=log, stderr=log)
    try:
        assert wait_until(lambda: luigid_calls.answers(url) or process.poll() is not None, SECONDS)
        assert process.poll() is None, (tmp_path / "luigid.log").read_text(encoding="utf-8")
        yield Luigid(url, process)
    finally:
        end(process)


class Hosts:
    """Commands on the hosts, all with the same working directory."""

    def __init__(self, network: Network, folder: Path) -> None:
        self._network, self._folder = network, folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, host: str, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start `python -m pipeline` on a host, empty for this one."""
        command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
        process = subprocess.Popen(
            self._network.command(host, *command) if host else command,
            cwd=self._folder,
            env=subprocess_environment(SLOW),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        self.started.append(process)
        return process


@pytest.fixture
def hosts(network: Network, luigid: Luigid, tmp_path: Path) -> Iterator[Hosts]:
    one = Hosts(network, tmp_path / "work")
    yield one
    for process in one.started:
        end_group(process)


def shards_of(host: str, settings: Settings) -> set[int]:
    """Return which shards a host has uploaded; a marker names the host, and the process there."""
    found = marked(settings)
    return {shard for name, shards in found.items() if name.startswith(f"host-{host}:") for shard in shards}


def waits_for_lock(address: str, settings: Settings) -> bool:
    """Return whether a host's transaction waits for the lock of a step."""
    statement = """
        SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
        WHERE l.locktype = 'advisory' AND NOT l.granted AND host(a.client_addr) = %s
    """
    return world.query(settings.database_url.reveal(), statement, (address,)) == [(1,)]


def test_one_host_is_killed_and_one_cut_off_and_the_batch_ends_right(
    hosts: Hosts, network: Network, luigid: Luigid, small_dataset: MakeDataset, settings: Settings
) -> None:
    dataset, dsn = small_dataset(80), settings.database_url.reveal()
    starter = hosts.start("", "load", "--source", dataset, "--batch-id", "b1")
    killed = hosts.start("c", "worker", "--idle", "5")
    cut_off = hosts.start("d", "worker", "--idle", "5")
    running = (starter, killed, cut_off)

    def until(condition: Callable[[], object]) -> None:
        seen = False  # once is enough: what a host runs may be over a moment later

        def look() -> bool:
            nonlocal seen
            seen = bool(condition())
            return seen or any(one.poll() is not None for one in running)

        wait_until(look, SECONDS)
        assert seen, [one.communicate() for one in running if one.poll() is not None]

    until(lambda: shards_of("c", settings) and shards_of("d", settings))
    # The one to be cut off is caught where it hurts most: in a transaction, about to hold what others need.
    with holding(dsn) as held:
        caught = caught_uploading(luigid, "host-d")
        held.hold(caught)
        until(lambda: waits_for_lock(f"{network.subnet}.3", settings) or caught in shards_of("d", settings))
        until(lambda: luigid.running("host-c"))
        held_up = waits_for_lock(f"{network.subnet}.3", settings)
        killed.send_signal(signal.SIGKILL)
        network.cut("d")
        left = shards_of("c", settings), shards_of("d", settings)
        held.let_go(caught)
    code, stdout, stderr = finish(starter, SECONDS)
    assert code == 0, stderr
    assert stdout.startswith("Batch b1 is done: 80 recognitions, 160 photos")
    world.check(settings, (dataset, "b1", None))
    assert rejects(settings) == []
    assert all(left)
    # What was on its way may have arrived a moment later, but not what a lock held up.
    assert len(shards_of("c", settings) - left[0]) <= 1
    assert len(shards_of("d", settings) - left[1]) <= 1
    assert not (held_up and caught in shards_of("d", settings))
    assert sum(map(len, marked(settings).values())) == 40

    # Once it is back, it finds that all is done, changes nothing, and leaves.
    network.mend("d")
    code, stdout, stderr = finish(cut_off, SECONDS)
    assert "Traceback" not in stderr
    assert code in (0, 3), stderr
    world.check(settings, (dataset, "b1", None))


def caught_uploading(luigid: Luigid, host: str) -> int:
    """Return the shard that a host uploads now."""
    found: list[int] = []

    def look() -> bool:
        for one in luigid.tasks("RUNNING").values():
            if host in (one["worker_running"] or "") and one["name"] == "UploadShard":
                found.append(int(one["params"]["shard"]))
        return bool(found)

    assert wait_until(look, SECONDS)
    return found[0]


def test_a_host_that_is_cut_off_leaves_when_it_is_told(
    hosts: Hosts, network: Network, luigid: Luigid, settings: Settings
) -> None:
    helper = hosts.start("c", "worker", "--idle", "600")
    assert wait_until(lambda: "host-c" in str(workers(luigid)) or helper.poll() is not None, SECONDS)
    network.cut("c")
    helper.terminate()
    code, _, stderr = finish(helper, SECONDS)
    assert (code, "Traceback" in stderr) == (130, False), stderr


def workers(luigid: Luigid) -> list[str]:
    """Return the ids of the workers that luigid knows."""
    with requests.Session() as session:
        session.trust_env = False
        return [one["name"] for one in session.get(f"{luigid.url}/api/worker_list", timeout=10).json()["response"]]
