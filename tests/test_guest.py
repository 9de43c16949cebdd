"""The package in another Luigi project: what its import changes, and how its tasks run as requirements of others."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

from embedded_supabase.files import wait_until
from pipeline.config import Settings
from tests import world
from tests.services import MakeDataset, Start

#: They wait more than they compute.
pytestmark = pytest.mark.slow

SECONDS = 60
#: Luigi's own lock is a file in a folder that the first user of the machine owns.
LUIGI = (sys.executable, "-m", "luigi", "--local-scheduler", "--no-lock", "--module")
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"

#: Everything that an import could change without anybody's asking.
SNAPSHOT = """
import gc, importlib, json, logging, pkgutil, signal, sys
import luigi, luigi.interface, luigi.worker, luigi.scheduler, luigi.rpc, luigi.retcodes, luigi.cmdline_parser

def state():
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name == "luigi" or name.startswith("luigi."):
            for key, value in vars(module).items():
                found[f"{name}.{key}"] = id(value)
                if isinstance(value, type) and value.__module__ == name:
                    found.update({f"{name}.{key}.{one}": id(item) for one, item in vars(value).items()
                                  if not one.startswith("__")})
    configuration = luigi.configuration.get_config()
    found["configuration"] = {section: dict(configuration.items(section)) for section in configuration.sections()}
    found["core"] = sorted(luigi.interface.core.ignore_unconsumed)
    for name in (None, "luigi", "luigi-interface"):
        logger = logging.getLogger(name)
        found[f"logger {name}"] = [list(map(repr, logger.handlers)), list(map(repr, logger.filters)), logger.level]
    found["signals"] = [repr(signal.getsignal(number)) for number in (1, 2, 10, 15)]
    found["hooks"] = [id(sys.unraisablehook), id(sys.excepthook), gc.get_freeze_count()]
    return found

before = state()
import pipeline
after = state()
print(json.dumps({key: [before.get(key), after.get(key)] for key in after if before.get(key) != after.get(key)}))
"""

WRAPPER = """
import luigi
from pipeline import LoadBatch

class Nightly(luigi.WrapperTask):
    sources = luigi.ListParameter()

    def requires(self):
        return [LoadBatch(source=source, batch_id=f"b{number}") for number, source in enumerate(self.sources, 1)]
"""

UNRELATED = """
import luigi
import pipeline

class Unrelated(luigi.Task):
    def run(self):
        raise KeyError("a fault of somebody else")
"""

TWICE = """
import json, sys
import luigi
from pipeline import LoadBatch

for number, source in enumerate(sys.argv[1:], 1):
    assert luigi.build([LoadBatch(source=source, batch_id=f"b{number}")], local_scheduler=True, log_level="ERROR")
"""

AGAIN = """
import json, sys
import luigi
from pipeline.errors import DatabaseError
from pipeline.graph.tasks import LoadBatch, UploadShard

run, locked = UploadShard.run, []

def fail(self):
    raise DatabaseError("the first time")

def succeed(self):
    locked.append(self.active_run.lock is not None)
    return run(self)

task = LoadBatch(source=sys.argv[1], batch_id="b1")
UploadShard.run = fail
first = luigi.build([task], local_scheduler=True, log_level="ERROR")
UploadShard.run = succeed
second = luigi.build([task], local_scheduler=True, log_level="ERROR")
with open("result.json", "w") as out:
    json.dump([first, second, locked], out)
"""

LOST = """
import sys
import luigi
from pipeline.errors import RefusedError
from pipeline.graph.tasks import LoadBatch, UploadShard

run = UploadShard.run

def lose(self):
    run(self)
    self.active_run.lost = RefusedError("Another run of batch b1 is going on.")

UploadShard.run = lose
luigi.build([LoadBatch(source=sys.argv[1], batch_id="b1")], local_scheduler=True, log_level="ERROR")
"""


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=SECONDS)
    return process.returncode, stdout, stderr


def test_import_changes_nothing_of_luigi_and_no_logging(start: Start) -> None:
    code, stdout, stderr = finish(start(sys.executable, "-c", SNAPSHOT))
    assert (code, stderr) == (0, "")
    assert set(json.loads(stdout)) <= {"luigi.parameter.Parameter._counter"}  # it counts the parameters of all tasks


def test_a_failing_task_of_another_module_shows_its_traceback(start: Start, workdir: Path) -> None:
    (workdir / "unrelated.py").write_text(UNRELATED, encoding="utf-8")
    _, _, stderr = finish(start(*LUIGI, "unrelated", "Unrelated"))
    assert "Traceback (most recent call last)" in stderr
    assert "KeyError: 'a fault of somebody else'" in stderr
    assert "Luigi Execution Summary" in stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_wrapper_of_two_loads_runs_both_and_prints_each_summary_once(
    workers: str, start: Start, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    (workdir / "wrapper.py").write_text(WRAPPER, encoding="utf-8")
    first, second = small_dataset(4), small_dataset(4, seed=9)
    sources = json.dumps([str(first), str(second)])
    command = (*LUIGI, "wrapper", "Nightly", "--sources", sources, "--workers", workers)
    code, stdout, stderr = finish(start(*command))
    assert code == 0, stderr
    for batch_id in ("b1", "b2"):
        assert stdout.count(f"Batch {batch_id} is done: 4 recognitions, 8 photos") == 1
    assert stdout.count("Performance Metrics:") == 2
    world.check(settings, (first, "b1", None), (second, "b2", None))
    code, stdout, stderr = finish(start(*command))
    assert (code, stdout) == (0, ""), stderr


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_load_beside_a_wrapper_of_the_same_batch_is_refused(
    workers: str, start: Start, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    (workdir / "wrapper.py").write_text(WRAPPER, encoding="utf-8")
    dsn, dataset = settings.database_url.reveal(), small_dataset(4)
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE public.images IN ACCESS EXCLUSIVE MODE")  # the transform waits for it
        command = (*LUIGI, "wrapper", "Nightly", "--sources", json.dumps([str(dataset)]), "--workers", workers)
        wrapper = start(*command)
        assert wait_until(lambda: world.query(dsn, WAITING) == [(1,)] or wrapper.poll() is not None, SECONDS)
        assert wrapper.poll() is None, finish(wrapper)
        load = (sys.executable, "-m", "pipeline", "load", "--source", dataset, "--batch-id", "b1")
        code, _, stderr = finish(start(*load))
        assert (code, "Another run of batch b1 is going on." in stderr) == (4, True), stderr
        connection.rollback()
    code, stdout, stderr = finish(wrapper)
    assert (code, stdout.count("Batch b1 is done")) == (0, 1), stderr
    world.check(settings, (dataset, "b1", None))


def test_a_failure_of_one_load_is_not_one_of_the_other(
    start: Start, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    (workdir / "wrapper.py").write_text(WRAPPER, encoding="utf-8")
    dsn, first, second = settings.database_url.reveal(), small_dataset(4), small_dataset(4, seed=9)
    world.query(dsn, "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (batch_id <> 'b1')")
    command = (*LUIGI, "wrapper", "Nightly", "--sources", json.dumps([str(first), str(second)]))
    _, stdout, stderr = finish(start(*command))
    assert "Batch b1 is unfinished: 4 recognitions" in stdout
    assert "Batch b2 is done: 4 recognitions" in stdout
    assert "Failed: CopyShard(batch_id=b1" in stderr
    assert "Failed: CopyShard(batch_id=b2" not in stderr
    assert "To go on: luigi --module pipeline LoadBatch --batch-id b1" in stderr
    world.query(dsn, "ALTER TABLE raw.menus DROP CONSTRAINT never")
    assert finish(start(*command))[0] == 0
    world.check(settings, (first, "b1", None), (second, "b2", None))


def test_two_builds_in_one_process_load_two_batches(
    start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    first, second = small_dataset(4), small_dataset(4, seed=9)
    code, stdout, stderr = finish(start(sys.executable, "-c", TWICE, first, second))
    assert code == 0, stderr
    assert [stdout.count(f"Batch {one} is done") for one in ("b1", "b2")] == [1, 1]
    world.check(settings, (first, "b1", None), (second, "b2", None))


def test_two_loads_without_an_id_in_one_wrapper_are_two_batches(
    start: Start, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    (workdir / "wrapper.py").write_text(WRAPPER.replace(', batch_id=f"b{number}"', ""), encoding="utf-8")
    first, second = small_dataset(4), small_dataset(3, seed=9)
    code, _, stderr = finish(start(*LUIGI, "wrapper", "Nightly", "--sources", json.dumps([str(first), str(second)])))
    assert code == 0, stderr
    found = world.query(settings.database_url.reveal(), "SELECT id, source FROM ingest.batches")
    assert {source for _, source in found} == {str(first), str(second)}
    batches = {source: batch_id for batch_id, source in found}
    world.check(settings, (first, batches[str(first)], None), (second, batches[str(second)], None))


def test_two_loads_of_one_id_with_different_sources_are_refused(
    start: Start, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    (workdir / "wrapper.py").write_text(WRAPPER.replace('f"b{number}"', '"b1"'), encoding="utf-8")
    sources = json.dumps([str(small_dataset(4)), str(small_dataset(3, seed=9))])
    _, _, stderr = finish(start(*LUIGI, "wrapper", "Nightly", "--sources", sources))
    assert "Batch b1 is being loaded by this process with other parameters." in stderr
    assert world.query(settings.database_url.reveal(), "SELECT count(*) FROM ingest.batches") == [(0,)]


def test_a_build_right_after_a_failed_one_has_the_lock(start: Start, workdir: Path, small_dataset: MakeDataset) -> None:
    code, stdout, stderr = finish(start(sys.executable, "-c", AGAIN, small_dataset(4)))
    assert code == 0, stderr
    assert json.loads((workdir / "result.json").read_text()) == [False, True, [True]]
    assert stdout.count("Batch b1 is done: 4 recognitions") == 1
    assert "Failed: UploadShard(batch_id=b1" in stderr


def test_a_build_whose_lock_is_lost_runs_no_further_task(
    start: Start, small_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = small_dataset(6)
    _, _, stderr = finish(start(sys.executable, "-c", LOST, dataset, env={"PIPELINE_BATCH_SIZE": "2"}))
    assert "Another run of batch b1 is going on." in stderr
    steps = "SELECT step, count(*) FROM ingest.batch_state GROUP BY step ORDER BY step"
    assert world.query(settings.database_url.reveal(), steps) == [("discover", 1), ("upload", 1)]
    load = (sys.executable, "-m", "pipeline", "load", "--source", dataset, "--batch-id", "b1")
    assert finish(start(*load))[0] == 0
    world.check(settings, (dataset, "b1", None))
