"""A year of nights: each bad one is heard of within a day, no good one raises an alarm; the commands of each kind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from embedded_supabase.storage.auth import mint_key
from pipeline.config import Settings
from tests import annotating, nights, world
from tests.annotating import Run, ids_of
from tests.listeners import Listener, listening
from tests.nights import DAY, GRACE, KINDS, Outcome, year
from tests.proxies import RESET, Fault, Request, StorageProxy
from tests.services import MakeDataset, Start, subprocess_environment
from tests.test_held import strip

run = annotating.run
OURS = (sys.executable, "-m", "pipeline")
#: Nights without a command of their own.
AS_ANOTHER = {"missed": None, "late": "good"}


@pytest.mark.parametrize("seed", range(5))
def test_each_bad_night_is_heard_of_within_a_day(seed: int) -> None:
    lived = list(year(nights.nights(seed)))
    assert len(lived) == 365
    for before, night in zip([None, *lived], lived, strict=False):
        if KINDS[night.kind].is_good:
            assert night.heard is None, night
            assert not night.is_down
        else:
            assert night.heard is not None or night.was_down, night
            assert night.heard is None or 0 < night.heard < DAY
            if before is not None and KINDS[before.kind].is_good:  # the first of a row is an alarm, not a red light
                assert night.heard is not None, night


def test_what_lasts_is_told_once_and_its_end_once() -> None:
    kinds = ["good", "half", "half", "wrong key", "half", "missed", "empty", "good", "half"]
    lived = list(year(kinds))
    assert [night.people is not None for night in lived] == [kind in ("half", "wrong key") for kind in kinds[:2]] + [
        False,
        True,
        False,
        False,
        False,
        False,
        True,
    ]
    assert [number for number, night in enumerate(lived) if night.recovered] == [6]


@pytest.mark.parametrize("off", [2, 7])
def test_a_machine_that_is_off_is_missed_every_way_that_works_without_it(off: int) -> None:
    lived = list(year(["good", *["missed"] * off, "good"]))
    assert lived[1].monitor == GRACE
    assert [night.max_age is not None for night in lived[1:-1]] == [False, *[True] * (off - 1)]
    assert (lived[-1].heard, lived[-1].is_down) == (None, False)


# The commands


@dataclass(frozen=True)
class World:
    """What the commands of a night work with."""

    run: Run
    start: Start
    dataset: Path
    source: str
    settings: Settings
    workdir: Path
    patch: pytest.MonkeyPatch
    monitor: Listener

    def load(self, *options: str) -> int:
        """Load in this process."""
        return self.run("load", "--source", self.dataset, *options).code

    def killed(self, number: signal.Signals) -> int:
        """Load in another process, and send a signal in the middle."""
        self.patch.setenv("PIPELINE_BATCH_SIZE", "1")
        self.patch.setenv("PIPELINE_THREAD_COUNT", "1")
        process = self.start(*OURS, "load", "--source", self.dataset)
        marked = "SELECT count(*) FROM ingest.batch_state WHERE step = 'copy'"
        while not world.query(self.settings.database_url.reveal(), marked)[0][0]:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=30)
        return process.returncode


def load_twice(found: World) -> int:
    found.load()
    found.monitor.heard.clear()
    return found.load()


def fill_database(found: World) -> int:
    world.query(
        found.settings.database_url.reveal(),
        """CREATE FUNCTION ingest.full() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$;
        CREATE TRIGGER full_disk BEFORE INSERT ON raw.photos FOR EACH ROW EXECUTE FUNCTION ingest.full()""",
    )
    return found.load()


def fail_storage(found: World) -> int:
    uploads = iter(range(4))

    def plan(request: Request) -> Fault | None:
        return RESET if request.is_upload and next(uploads, None) is None else None

    with StorageProxy(found.settings.url, plan) as proxy:
        found.patch.setenv("NEXT_PUBLIC_SUPABASE_URL", proxy.url)
        return found.load()


def refuse_key(found: World) -> int:
    found.patch.setenv("SUPABASE_SERVICE_ROLE_KEY", mint_key("another secret, of at least 32 bytes"))
    return found.load()


def lose_database(found: World) -> int:
    found.patch.setenv("DATABASE_URL", "postgresql://postgres:postgres@127.0.0.1:9/postgres")
    return found.load()


def fill_disk(found: World) -> int:
    command = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", *OURS, "load", "--source", str(found.dataset)]
    return subprocess.run(
        command, cwd=found.workdir, env=subprocess_environment(), capture_output=True, timeout=60, check=False
    ).returncode


def reject(found: World, count: int, *options: str) -> int:
    strip(found.dataset, ids_of(found.dataset)[:count])
    return found.load(*options)


COMMANDS: dict[str, Callable[[World], int]] = {
    "good": lambda found: found.load(),
    "empty": load_twice,
    "some rejected": lambda found: reject(found, 2),
    "half": fail_storage,
    "rejected": lambda found: reject(found, 1, "--strict"),
    "held": lambda found: reject(found, 10),
    "unmounted": lambda found: found.run("load", "--source", found.dataset / "gone").code,
    "wrong key": refuse_key,
    "no database": lose_database,
    "full database": fill_database,
    "full disk": fill_disk,
    "killed": lambda found: found.killed(signal.SIGKILL),
    "stopped": lambda found: found.killed(signal.SIGTERM),
}


@pytest.fixture
def heard() -> Iterator[Listener]:
    with listening() as listener:
        yield listener


@pytest.mark.parametrize("name", COMMANDS)
def test_the_load_of_a_night_comes_to_what_the_year_says(
    name: str,
    run: Run,
    start: Start,
    own_dataset: MakeDataset,
    settings: Settings,
    workdir: Path,
    heard: Listener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PING_URL", f"{heard.url}/ping")
    monkeypatch.setenv("PIPELINE_RETRY_MAX_ATTEMPTS", "0")
    found = World(run, start, own_dataset(14), "", settings, workdir, monkeypatch, heard)
    outcome = KINDS[name].outcome
    with listening() as team:
        monkeypatch.setenv("NOTIFY_URLS", f"json://127.0.0.1:{team.port}")
        code = COMMANDS[name](found)
        monkeypatch.undo()
        told = len(team.heard)
    if outcome is None:
        assert (code, heard.paths(), told) == (3, [], 0)
        return
    assert code == (outcome.code if outcome.code is not None else -signal.SIGKILL)
    assert name != "some rejected" or "Rejected: 2 " in heard.heard[-1].body
    end = [] if outcome.code is None else ["/ping"] if not code else [f"/ping/{code}"]
    assert heard.paths() == ["/ping/start", *end]
    assert told == bool(outcome.problem)
    dsn = settings.database_url.reveal()
    looks = world.query(dsn, "SELECT count(*) FROM ingest.looks")[0][0]
    assert bool(looks) == outcome.looked
    problems = world.query(dsn, "SELECT problem FROM ingest.notifications")
    if name == "no database":
        problems = [(outcome.problem,)] if outcome.problem in (settings.home / "told.json").read_text() else []
    wanted = f"held {world.query(dsn, 'SELECT id FROM ingest.batches')[0][0]}" if outcome.holds else outcome.problem
    assert all(problem.startswith(wanted) for (problem,) in problems)
    assert len(problems) == told


def test_every_kind_of_night_is_run() -> None:
    assert set(COMMANDS) == set(KINDS) - set(AS_ANOTHER)
    assert KINDS["late"].outcome == KINDS["good"].outcome == KINDS["empty"].outcome == Outcome(0, looked=True)
    assert {name for name, kind in KINDS.items() if kind.outcome is None} == {"missed", "full disk"}
