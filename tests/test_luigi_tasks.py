"""What users of Luigi do with tasks of their own around ours: each habit works, or is refused with a sentence."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from pipeline.config import Settings
from tests import world
from tests.habits import habit
from tests.luigi_support import SharedLuigid
from tests.services import MakeDataset, RunLuigi, after_target, asked_of_luigid
from tests.test_luigi_habits import LOCAL, SETTINGS, loaded

OWN, DAYS = "Tasks of your own", "Days"
_HEAD = """
import json, luigi, pipeline
from luigi.util import inherits, requires
from pipeline import LoadBatch, LoadNight, LoadQwen, ResetBatch
SOURCE, OTHER = {source!r}, {other!r}
"""


def module(workdir: Path, small_dataset: MakeDataset, text: str) -> None:
    """Write mine.py."""
    sources = {"source": str(small_dataset(3)), "other": str(small_dataset(3, first_id=700_000))}
    (workdir / "mine.py").write_text(_HEAD.format(**sources) + text, encoding="utf-8")


_TASKS = """
class Noted(luigi.Task):
    def output(self):
        return luigi.LocalTarget(f"{self.get_task_family()}.done")
    def run(self):
        with self.output().open("w") as file:
            file.write("done")

class After(Noted):
    def requires(self):
        return LoadBatch(source=SOURCE, batch_id="b1")

@requires(LoadBatch)
class Required(Noted):
    pass

@inherits(LoadBatch)
class Inherited(Noted):
    def requires(self):
        return self.clone_parent()

class Both(luigi.WrapperTask):
    def requires(self):
        yield LoadBatch(source=SOURCE, batch_id="b4", force=True)
        yield LoadBatch(source=OTHER, batch_id="b5")

class Dynamic(Noted):
    named = luigi.Parameter(default="")
    def run(self):
        yield LoadBatch(source=SOURCE, batch_id=self.named, force=True)
        super().run()
"""


@habit(OWN, "`requires()` returns a `LoadBatch`", "works")
@habit(OWN, "`@requires(LoadBatch)`", "works")
@habit(OWN, "`@inherits(LoadBatch)` and `clone_parent()`", "works")
@habit(OWN, "a `WrapperTask` over two loads", "works, each with an id of its own")
@habit(OWN, "`yield LoadBatch(batch_id=…)` in a `run()`", "works")
@habit(OWN, "`yield LoadBatch()` without an id in a `run()`, with `--workers 2`", "refused: it would not end")
def test_tasks_of_a_user_require_ours(
    run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    module(workdir, small_dataset, _TASKS)
    # Luigi's own lock goes by the command line, which forked processes share.
    mine = ("luigi", "--no-lock", "--module", "mine")
    retcodes = "[retcode]\ntask_failed = 30\n[core]\nno_configure_logging = true\n"
    (workdir / "luigi.cfg").write_text(retcodes)
    assert run_luigi(*mine, "After", LOCAL).code == 0
    given = ("--source", small_dataset(3), "--force")
    assert run_luigi(*mine, "Required", *given, "--batch-id", "b2", LOCAL).code == 0
    assert run_luigi(*mine, "Inherited", *given, "--batch-id", "b3", LOCAL).code == 0
    assert run_luigi(*mine, "Both", LOCAL, "--workers", "2").code == 0
    refused = run_luigi(*mine, "Dynamic", LOCAL, "--workers", "2")
    assert refused.code == 30
    assert "A load that a run() yields in a process of its own needs the id of its batch." in refused.stderr
    assert run_luigi(*mine, "Dynamic", "--named", "b6", LOCAL, "--workers", "2").code == 0
    assert loaded(settings) == {f"b{number}": (3, 1) for number in range(1, 7)}
    assert len(list(workdir.glob("*.done"))) == 4


_BUILD = """
seen = []
for event in (luigi.Event.START, luigi.Event.SUCCESS, luigi.Event.DEPENDENCY_DISCOVERED):
    LoadBatch.event_handler(event)(lambda task, *_, event=event: seen.append(event))
first = luigi.build([LoadBatch(source=SOURCE, batch_id="b1")], local_scheduler=True, detailed_summary=True)
again = luigi.build([LoadBatch(source=SOURCE, batch_id="b1"), LoadBatch(source=SOURCE, batch_id="b2", force=True)],
    local_scheduler=True, workers=2)
gone = luigi.build([ResetBatch(batch_id="b2", confirm=True)], local_scheduler=True)
print(json.dumps([first.status.name, again, gone, seen]))
"""


@habit(OWN, "`luigi.build([LoadBatch(…)])`, also with `workers` and `detailed_summary`", "works")
@habit(OWN, "`@LoadBatch.event_handler(luigi.Event.SUCCESS)` and other events", "works")
@habit(OWN, "a task of ours twice in one program", "works")
@habit(OWN, "`ResetBatch(batch_id=…, confirm=True)` in a program", "works; without `confirm`, refused")
def test_a_program_builds_our_tasks(
    run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    module(workdir, small_dataset, _BUILD)
    done = run_luigi("script", "mine.py")
    assert done.code == 0, done.stderr
    first, again, gone, seen = json.loads(done.stdout.splitlines()[-1])
    assert (first, again, gone) == ("SUCCESS", True, True)
    assert {"event.core.start", "event.core.success", "event.core.dependency.discovered"} == set(seen)
    assert loaded(settings) == {"b1": (3, 1)}
    refused = run_luigi("luigi", "--module", "pipeline", "ResetBatch", "--batch-id", "b1", LOCAL)
    assert refused.code == 40
    assert "Error: Batch b1 is not reset without --confirm." in refused.stderr


@habit(
    OWN,
    '`luigi.run(["LoadBatch", …])` in a program',
    "works as the command does: it ends the program, with its exit code",
)
def test_a_program_runs_the_command(run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset) -> None:
    module(workdir, small_dataset, 'luigi.run(["LoadBatch", "--source", SOURCE, "--local-scheduler"])\n')
    done = run_luigi("script", "mine.py")
    assert (done.code, after_target(done.stderr)) == (0, "")
    assert "Performance Metrics:" in done.stdout


_SUBCLASSES = """
class Arrived(luigi.ExternalTask):
    def output(self):
        return luigi.LocalTarget("arrived")

class OnArrival(LoadBatch):
    priority = 7
    def requires(self):
        return [Arrived(), super().requires()]

class Scarce(LoadBatch):
    resources = {"scarce": 1}

class Plenty(LoadBatch):
    resources = {"plenty": 1}
    worker_timeout = 60
    def on_success(self):
        super().on_success()
        print("told on success")
"""


@pytest.mark.slow
@habit(OWN, "a subclass of ours", "works: with our worker, its summary and its exit codes")
@habit(OWN, "an `ExternalTask` that our task requires", "works: exit code 20 until it is there")
@habit(OWN, "`priority`", "works")
@habit(OWN, "`resources`, and `[resources]` of luigid", "works: what is not to be had is waited for, exit code 25")
@habit(OWN, "`on_success()`, `worker_timeout` of a task", "works")
def test_subclasses_of_ours_have_what_tasks_of_luigi_have(
    service: SharedLuigid, run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    module(workdir, small_dataset, _SUBCLASSES)
    given = ("--source", small_dataset(3), "--force", *service.options)

    def run(family: str, batch_id: str) -> int:
        return int(run_luigi("luigi", "--module", "mine", family, "--batch-id", batch_id, *given).code)

    assert run("OnArrival", "external") == 20
    tasks = asked_of_luigid(service.url, "task_list", status="PENDING", upstream_status="", search="external").values()
    assert [one["priority"] for one in tasks if one["name"] == "OnArrival"] == [7]
    assert loaded(settings).get("external") == (3, 1)
    (workdir / "arrived").touch()
    assert run("OnArrival", "external") == 0
    assert run("Scarce", "scarce") == 25
    plenty = run_luigi("luigi", "--module", "mine", "Plenty", "--batch-id", "plenty", *given)
    assert (plenty.code, plenty.stdout.count("told on success")) == (0, 1)


# Days


def nights(count: int) -> list[str]:
    """Return the last days, in UTC as RangeDaily counts, the oldest first."""
    today = datetime.now(timezone.utc).date()
    return [str(today - timedelta(days=ago)) for ago in reversed(range(count))]


@habit(DAYS, "`LoadNight --date 2026-01-31`", "works: once since that day began, the dataset is loaded")
@habit(DAYS, "`RangeDaily --of LoadNight --start 2026-01-01`", "works: one load completes all days that were missed")
@habit(DAYS, "`RangeDaily --of-params`, `--reverse`, `--task-limit`", "works")
@habit(SETTINGS, "`[LoadNight]` in luigi.cfg, for RangeDaily as well", "works")
def test_a_range_of_days_is_completed_by_one_load(
    run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    first, *_, today = nights(4)
    ranged = ("luigi", "--module", "pipeline", "RangeDaily", "--no-lock", "--of", "LoadNight", "--start", first, LOCAL)
    source = json.dumps({"source": str(small_dataset(3))})
    done = run_luigi(*ranged, "--of-params", source, "--reverse", "--task-limit", "2")
    assert done.code == 0, done.stderr
    assert len(loaded(settings)) == 1
    (workdir / "luigi.cfg").write_text(f"[LoadNight]\nsource = {small_dataset(3)}\n[core]\nautoload_range = true\n")
    assert "4 of expected 4" not in run_luigi(*ranged).stderr
    one = run_luigi("luigi", "--module", "pipeline", "LoadNight", "--date", today, LOCAL)
    assert (one.code, after_target(one.stderr)) == (0, "")
    assert "is done already" in one.stdout
    assert list(loaded(settings).values()) == [(3, 1)]
    # A day that began after the last look: here by the clock of the database.
    dsn = settings.database_url.reveal()
    world.query(dsn, "UPDATE ingest.looks SET looked_at = looked_at - interval '2 days'")
    assert run_luigi(*ranged).code == 0
    assert world.query(dsn, "SELECT batch_made FROM ingest.looks ORDER BY looked_at") == [(True,), (False,)]
    assert run_luigi(*ranged).code == 0
    assert world.query(dsn, "SELECT count(*) FROM ingest.looks") == [(2,)]


@pytest.mark.slow
@habit(DAYS, "`ResetBatch` of what a day loaded", "works: the days that were done are not, and are loaded again")
def test_days_are_not_done_any_more_once_a_batch_is_reset(
    service: SharedLuigid, run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    first, *_, today = nights(2)
    source = str(small_dataset(3))
    command = ("luigi", "--module", "pipeline")
    (workdir / "luigi.cfg").write_text(f"[LoadNight]\nsource = {source}\n[retcode]\nscheduling_error = 35\n")
    ranged = (*command, "RangeDaily", "--no-lock", "--of", "LoadNight", "--start", first, *service.options)
    done = run_luigi(*ranged)
    assert done.code == 0, done.stderr
    assert done.stderr.count(f"Scheduler: luigid at {service.url}") == 1
    [loaded_first] = loaded(settings)
    # A later look, which found that everything was loaded.
    assert run_luigi(*command, "LoadBatch", "--batch-id", "look", "--source", source, LOCAL).code == 0
    assert run_luigi(*command, "ResetBatch", "--batch-id", loaded_first, "--confirm", LOCAL).code == 0
    again = run_luigi(*command, "LoadNight", "--date", today, LOCAL)
    assert (again.code, "is done: 3 recognitions" in again.stdout) == (0, True)
    assert list(loaded(settings).values()) == [(3, 1)]
    assert run_luigi(*ranged).code == 0
    assert list(loaded(settings).values()) == [(3, 1)]


@habit(DAYS, "`batch_method=max` on the date of a subclass", "works: luigid runs the newest day for all")
def test_days_are_run_as_one_where_a_subclass_batches_them(
    service: SharedLuigid, run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    text = "class Newest(LoadNight):\n    date = luigi.DateParameter(batch_method=max)\n"
    module(workdir, small_dataset, f"{text}    source = luigi.Parameter(SOURCE)\n")
    first = nights(3)[0]
    ranged = (
        "luigi",
        "--module",
        "mine",
        "RangeDaily",
        "--no-lock",
        "--of",
        "Newest",
        "--start",
        first,
        *service.options,
    )
    (workdir / "luigi.cfg").write_text("[retcode]\ntask_failed = 30\nscheduling_error = 35\nnot_run = 25\n")
    done = run_luigi(*ranged)
    assert done.code == 0, done.stderr
    assert list(loaded(settings).values()) == [(3, 1)]
