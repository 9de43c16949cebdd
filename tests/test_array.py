"""Processes of an array: in any order, twice, beside each other and beside a load, killed, and never beside a reset."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from benchmarks.processes import tree
from embedded_supabase.files import wait_until
from pipeline import cli
from pipeline.batches.lock import BatchLock
from pipeline.batches.state import ALONE, ARRAY, COPY, UPLOAD
from pipeline.cli import array
from pipeline.cli.array import INDEX_VARIABLES
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.graph.markers import BatchStateTarget, MarkerCache
from pipeline.graph.run import registry
from pipeline.graph.tasks import CopyShard, TransformBatch, send_shard
from pipeline.sample.writer import ANNOTATIONS
from pipeline.steps import transform
from pipeline.storage import Storage
from tests import world
from tests.database_support import recorded_statements
from tests.listeners import listening
from tests.reset_support import WAITING
from tests.runner import ForkServer, Runner, moments
from tests.services import MakeDataset, RunPipeline, subprocess_environment
from tests.sweeps import PARTS
from tests.test_kill import SERIAL, killed, unusable
from tests.test_prometheus import samples

MARKED = "SELECT step, count(*) FROM ingest.batch_state WHERE batch_id = 'a1' GROUP BY step ORDER BY step"


@pytest.fixture
def runner(workdir: Path, fork_server: ForkServer) -> Runner:
    """Commands in the working directory, in processes of their own, with shards of two recognitions."""
    return Runner(fork_server, workdir, SERIAL)


class Here:
    """Commands in this process, with shards of two recognitions: each call is one command and its exit code."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str | Path) -> int:
        code = cli.main([str(one) for one in arguments])
        self.out, self.err = self._capsys.readouterr()
        return code

    def discover(self, dataset: Path, batch_id: str = "a1") -> int:
        """Discover a dataset and return the number of its shards."""
        assert self("discover", "--source", dataset, "--batch-id", batch_id, "--json") == 0, self.err
        found = json.loads(self.out)
        assert found["batch_id"] == batch_id
        return int(found["shards"])

    def shard(self, *indices: object, of: int, batch_id: str = "a1") -> int:
        return self("shard", "--batch-id", batch_id, "--of", str(of), "--index", *map(str, indices))

    def finish(self, batch_id: str = "a1") -> int:
        return self("finish", "--batch-id", batch_id)


@pytest.fixture
def here(workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    for name, value in SERIAL.items():
        monkeypatch.setenv(name, value)
    for name in INDEX_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return Here(capsys)


# The three commands


def test_slices_in_any_order_and_twice_load_what_a_load_does(
    here: Here, settings: Settings, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset(12)
    assert here.discover(dataset) == here.discover(dataset) == 6
    assert here.finish() == 3
    assert "6 of 6 shards are not done: 0-5." in here.err
    for index in (3, 0, 3):
        assert here.shard(index, of=4) == 0, here.err
    assert world.counts(settings.database_url.reveal())["public.recognitions"] == 0
    assert here.finish() == 3
    again = re.search(r"Do them with `python -m pipeline (.*?)`", here.err)
    assert again is not None
    assert here(*shlex.split(again[1])) == 0
    assert here.out == "Batch a1: 3 shards done.\n"
    assert here.finish() == 0
    assert "Batch a1 is done: 12 recognitions" in here.out
    assert here.finish() == 0
    assert "already" in here.out
    assert here.shard("0-3", of=4) == 0
    assert "0 shards done, 6 were done before" in here.out
    assert here.discover(dataset) == 6
    world.check(settings, (dataset, "a1", None))


def test_several_indices_and_ranges_are_one_process(here: Here, settings: Settings, small_dataset: MakeDataset) -> None:
    assert here.discover(small_dataset(12)) == 6
    assert here("shard", "--batch-id", "a1", "--of", "20", "--index", "19", "0-9", "4", "--json") == 0
    assert json.loads(here.out) == {"batch_id": "a1", "shards": 4, "done": 4}  # of 20 slices, 14 are empty
    assert here.shard("3", of=20) == 0
    assert here.shard("10-18", of=20) == 0
    assert here.finish() == 0
    world.check(settings, (small_dataset(12), "a1", None))


@pytest.mark.parametrize("variable", INDEX_VARIABLES)
def test_the_engines_variable_is_the_index_unless_one_is_given(
    variable: str, here: Here, settings: Settings, small_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert here.discover(small_dataset(4)) == 2
    for name in INDEX_VARIABLES[INDEX_VARIABLES.index(variable) :]:
        monkeypatch.setenv(name, "1" if name == variable else "0")  # the first of them counts
    assert here("shard", "--batch-id", "a1", "--of", "2") == 0
    done = "SELECT DISTINCT shard FROM ingest.batch_state WHERE step = 'copy' ORDER BY 1"
    assert world.query(settings.database_url.reveal(), done) == [(2,)]
    assert here.shard(0, of=2) == 0
    assert world.query(settings.database_url.reveal(), done) == [(1,), (2,)]
    monkeypatch.setenv(variable, "two")
    assert here("shard", "--batch-id", "a1", "--of", "2") == 2
    assert f"{variable} is 'two'" in here.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--of", "2", "--index", "2"], "--index is '2'"),
        (["--of", "2", "--index", "-1"], "-1"),
        (["--of", "2", "--index", "1-0"], "--index is '1-0'"),
        (["--of", "2", "--index", "0-2"], "--index is '0-2'"),
        (["--of", "2", "--index", "x"], "--index is 'x'"),
        (["--of", "2", "--index", "1.0"], "--index is '1.0'"),
        (["--of", "0", "--index", "0"], "0 is less than 1"),
        (["--index", "0"], "--of"),
        (["--of", "2"], "No index says which slice"),
    ],
)
def test_wrong_indices_are_refused(arguments: list[str], message: str, here: Here) -> None:
    assert here("shard", "--batch-id", "a1", *arguments) == 2
    assert message in here.err


def test_options_of_both_kinds_exclude_each_other(here: Here, small_dataset: MakeDataset) -> None:
    dataset = small_dataset(2)
    assert here("discover", "--source", dataset, "--file", dataset / ANNOTATIONS) == 2
    assert "options of load and of load-qwen" in here.err


@pytest.mark.parametrize("command", [("shard", "--of", "1", "--index", "0"), ("finish",)])
def test_a_batch_that_is_unknown_or_reset_is_refused(
    command: Sequence[str], here: Here, small_dataset: MakeDataset
) -> None:
    assert here(*command, "--batch-id", "a1") == 2
    assert "There is no batch a1." in here.err
    assert here(*command, "--batch-id", "../a1") == 2
    here.discover(small_dataset(2))
    assert here("reset", "--batch-id", "a1", "--confirm") == 0
    assert here(*command, "--batch-id", "a1") == 4
    assert "Batch a1 is reset." in here.err


def test_where_there_is_nothing_to_load_all_three_say_so(here: Here, small_dataset: MakeDataset) -> None:
    assert here("load", "--source", small_dataset(2), "--batch-id", "b1", "--local-scheduler") == 0
    assert here("discover", "--source", small_dataset(2), "--batch-id", "a1") == 0
    assert "Nothing to load" in here.out
    assert here.discover(small_dataset(2)) == 0
    assert here.shard(0, of=3) == 0
    assert here.out == "Batch a1: nothing to load, nothing to do.\n"
    assert here.finish() == 0
    assert "Nothing to load" in here.out


def test_annotations_are_copied_by_discovery(here: Here, settings: Settings, small_dataset: MakeDataset) -> None:
    dataset = small_dataset(4)
    assert here("load", "--source", dataset, "--batch-id", "b1", "--local-scheduler") == 0
    file = dataset / ANNOTATIONS
    assert here("discover", "--file", file, "--batch-id", "q1", "--json") == 0
    assert (json.loads(here.out)["kind"], json.loads(here.out)["shards"]) == ("qwen", 1)
    assert here.shard("0-4", of=5, batch_id="q1") == 0
    assert "0 shards done, 1 were done before" in here.out
    assert here.finish("q1") == 0
    world.check(settings, (dataset, "b1", None), qwen=file)


def test_a_batch_that_is_held_ends_with_6_until_it_is_published(
    here: Here, settings: Settings, own_dataset: MakeDataset
) -> None:
    dataset = unusable(own_dataset(14))
    assert here.discover(dataset) == 2
    assert here.shard("0-1", of=2) == 0
    assert [here.finish(), here.finish(), here.shard(0, of=1)] == [6, 6, 0]
    assert here("discover", "--source", dataset, "--batch-id", "a1") == 6
    assert here("finish", "--batch-id", "a1", "--max-rejects", "90%") == 6
    assert here("publish", "--batch-id", "a1") == 0
    assert here.finish() == 0
    world.check(settings, (dataset, "a1", sorted(world.folders(dataset))[10:]))


def test_finish_decides_what_may_be_rejected(here: Here, settings: Settings, own_dataset: MakeDataset) -> None:
    dataset = unusable(own_dataset(14))
    assert here.discover(dataset) == 2
    assert here.shard("0-1", of=2) == 0
    assert here("finish", "--batch-id", "a1", "--max-rejects", "90%") == 0
    world.check(settings, (dataset, "a1", sorted(world.folders(dataset))[10:]))


def test_finish_writes_the_numbers_of_the_batch_however_it_ends(
    here: Here, settings: Settings, own_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset, dsn, file = unusable(own_dataset(14)), settings.database_url.reveal(), tmp_path / "finish.prom"
    finish = ("finish", "--batch-id", "a1", "--metrics-file", file)

    def ends(code: int, state: str, *options: str) -> None:
        file.unlink(missing_ok=True)
        assert here(*finish, *options) == code
        found = samples(file, "finish")
        assert (found["pipeline_batch_info a1"], found[f"pipeline_batch_state {state}"]) == (1, 1)
        assert sum(value for name, value in found.items() if name.startswith("pipeline_batch_rejects")) == 10

    assert here.discover(dataset) == 2
    assert here.shard(0, of=2) == 0
    ends(3, "loading")
    assert here.shard(1, of=2) == 0
    never = "ALTER TABLE ingest.batch_state ADD CONSTRAINT never CHECK (step <> 'transform') NOT VALID"
    world.query(dsn, never)
    ends(3, "loading", "--max-rejects", "90%")
    world.query(dsn, "ALTER TABLE ingest.batch_state DROP CONSTRAINT never")
    ends(6, "held")
    ends(6, "held")
    assert here("publish", "--batch-id", "a1") == 0
    ends(0, "done")


def test_another_bucket_is_refused(
    here: Here, settings: Settings, small_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, other = small_dataset(4), f"{settings.bucket}-other"
    assert here.discover(dataset) == 2
    for codes, commands in (
        ([4, 3], (partial(here.shard, 0, of=1), here.finish)),
        ([0, 4], (partial(here.shard, 0, of=1), here.finish)),
    ):
        monkeypatch.setenv("STORAGE_BUCKET", other)
        assert [command() for command in commands] == codes, here.err
        assert world.objects(settings) == {} or codes == [0, 4]
        monkeypatch.delenv("STORAGE_BUCKET")
        assert here.shard(0, of=1) == 0
    assert here.finish() == 0
    world.check(settings, (dataset, "a1", None))


def test_a_machine_without_the_dataset_rejects_nothing(
    here: Here, settings: Settings, own_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset = own_dataset(4)
    assert here.discover(dataset) == 2
    dataset.rename(tmp_path / "elsewhere")
    assert here.shard(0, of=1) == 2
    assert "is not on this host" in here.err
    (tmp_path / "elsewhere").rename(dataset)
    assert here.shard(0, of=1) == 0
    (dataset).rename(tmp_path / "elsewhere")
    assert here.finish() == 0, "it needs no file"
    (tmp_path / "elsewhere").rename(dataset)
    world.check(settings, (dataset, "a1", None))


def test_production_is_another_project(
    here: Here, settings: Settings, small_dataset: MakeDataset, workdir: Path
) -> None:
    commands = (
        ("discover", "--source", small_dataset(2), "--batch-id", "a1"),
        ("shard", "--batch-id", "a1", "--of", "1", "--index", "0"),
        ("finish", "--batch-id", "a1"),
    )
    assert [here(*command, "--production") for command in commands] == [2, 2, 2]
    (workdir / ".env.local").rename(workdir / ".env.production")
    for command in commands:
        assert here(*command, "--production") == 0, here.err
        if command[0] == "discover":
            assert "`python -m pipeline finish --batch-id a1 --production`" in here.out
    world.check(settings, (small_dataset(2), "a1", None))


def test_what_the_bucket_lost_since_is_sent_again(here: Here, settings: Settings, small_dataset: MakeDataset) -> None:
    dataset = small_dataset(4)
    assert here.discover(dataset) == 2
    assert here.shard(0, of=1) == 0
    with closing(Storage(settings)) as storage:
        storage.remove([next(iter(world.objects(settings)))])
    assert here.finish() == 0
    world.check(settings, (dataset, "a1", None))


def test_a_shard_of_bad_data_keeps_no_other_from_its_turn(
    here: Here, settings: Settings, small_dataset: MakeDataset
) -> None:
    dsn = settings.database_url.reveal()
    assert here.discover(small_dataset(6)) == 3
    world.query(dsn, "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard <> 2)")
    assert here.shard("0-2", of=3) == 3
    assert "Failed: shard 2 of batch a1" in here.err
    assert world.query(dsn, MARKED) == [("copy", 2), ("discover", 1), ("upload", 2)]
    assert here.finish() == 3
    assert "1 of 3 shards are not done: 1." in here.err
    world.query(dsn, "ALTER TABLE raw.menus DROP CONSTRAINT never")
    assert here.shard(1, of=3) == 0
    assert here.finish() == 0
    world.check(settings, (small_dataset(6), "a1", None))


def test_a_slice_that_is_done_asks_the_same_at_any_size(here: Here, small_dataset: MakeDataset) -> None:
    numbers = []
    for batch_id, count in (("a1", 4), ("a2", 20)):
        assert here.discover(small_dataset(count, seed=count, first_id=1000 * count), batch_id) == count // 2
        assert here.shard(0, of=1, batch_id=batch_id) == 0
        with recorded_statements() as asked:
            assert here.shard(0, of=1, batch_id=batch_id) == 0
            numbers.append(len(asked))
    assert numbers[0] == numbers[1] < 10


@pytest.mark.parametrize(("number", "code"), [(4, 0), (14, 6)], ids=["finished", "held"])
def test_a_shard_that_a_load_does_in_the_meantime_is_done(
    number: int,
    code: int,
    here: Here,
    run_pipeline: RunPipeline,
    own_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = own_dataset(number)
    if code:
        unusable(dataset)
    here.discover(dataset)

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(array, "send_shard", send_shard)
        assert run_pipeline("load", "--batch-id", "a1", "--source", dataset).returncode == code
        send_shard(*arguments)

    monkeypatch.setattr(array, "send_shard", late)
    assert here.shard(0, of=1) == 0


def test_a_batch_that_a_load_publishes_in_the_meantime_loses_no_shard(
    here: Here,
    settings: Settings,
    run_pipeline: RunPipeline,
    small_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = small_dataset(4)
    here.discover(dataset)
    assert here.shard(0, of=1) == 0
    withdraw = transform._withdraw

    def late(*arguments: Any, **options: Any) -> bool | None:
        monkeypatch.setattr(transform, "_withdraw", withdraw)
        load = run_pipeline("load", "--batch-id", "a1", "--source", dataset, "--local-scheduler")
        assert load.returncode == 0, load.stderr
        return withdraw(*arguments, **options)

    monkeypatch.setattr(Storage, "list_objects", lambda *_: iter(()))  # as the bucket was before it was repaired
    monkeypatch.setattr(transform, "_withdraw", late)
    assert here.finish() == 0, here.err
    monkeypatch.undo()
    world.check(settings, (dataset, "a1", None))


def test_finish_waits_for_the_commit_of_a_load(
    here: Here, runner: Runner, settings: Settings, small_dataset: MakeDataset
) -> None:
    here.discover(small_dataset(4))
    assert here.shard(0, of=1) == 0
    dsn = settings.database_url.reveal()
    with closing(psycopg2.connect(dsn)) as load, load.cursor() as cursor:
        cursor.execute("UPDATE ingest.batches SET state = 'done', version = 1, finished_at = clock_timestamp()")
        marker = (
            "INSERT INTO ingest.batch_state (batch_id, step, started_at, worker) VALUES ('a1', 'transform', now(), '')"
        )
        cursor.execute(marker)
        finish = runner.start("finish", "--batch-id", "a1")
        assert wait_until(lambda: world.query(dsn, WAITING) == [(1,)], 30)
        load.commit()
    ended = finish.finish()
    assert ended.code == 0, ended


def test_a_load_groups_shards_into_its_tasks(
    here: Here, settings: Settings, small_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert here.discover(small_dataset(14)) == 7
    assert here.shard(4, of=7) == 0
    ran: list[list[int]] = []
    run = CopyShard.run

    def recorded(self: CopyShard) -> None:
        ran.append([*self.shard_numbers])
        run(self)

    monkeypatch.setattr(CopyShard, "run", recorded)
    monkeypatch.setattr("pipeline.graph.tasks.MAXIMUM_SHARDS", 3)
    assert here("load", "--source", small_dataset(14), "--batch-id", "a1", "--local-scheduler") == 0, here.err
    assert sorted(ran) == [[1, 2, 3], [4, 5, 6], [7]]
    world.check(settings, (small_dataset(14), "a1", None))


@pytest.mark.parametrize("before", [[], [1], [2], [1, 2], [3]])
def test_shards_of_a_group_that_others_do_after_the_first_question_are_found(
    before: list[int], here: Here, settings: Settings, database: Database, small_dataset: MakeDataset
) -> None:
    assert here.discover(small_dataset(6)) == 3
    for shard in before:
        assert here.shard(shard - 1, of=3) == 0
    markers = MarkerCache(database, "a1", schedules=True)
    tasks = [BatchStateTarget(markers, "a1", step, range(1, 4)) for step in (COPY, UPLOAD)]
    assert [one.exists() for one in tasks] == [False, False]
    assert here.shard("0-2", of=3) == 0
    assert [one.exists() for one in tasks] == [True, True]


def test_a_load_has_less_than_a_thousand_tasks_for_any_number_of_shards(here: Here, small_dataset: MakeDataset) -> None:
    here.discover(small_dataset(2))
    registry.open(production=False)
    transform = TransformBatch(batch_id="a1")  # type: ignore[call-arg]
    for total in (1, 490, 491, 981, 10_000):
        groups = [[*one.shard_numbers] for one in transform._copies(range(1, total + 1), total)]
        assert len(groups) <= 490
        assert [one for group in groups for one in group] == [*range(1, total + 1)]
        assert [*transform._copies([total], total)[0].shard_numbers] == groups[-1]


def test_finish_alone_is_told_to_the_monitor(
    here: Here, small_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening() as monitor:
        monkeypatch.setenv("PING_URL", f"{monitor.url}/ping")
        here.discover(small_dataset(2))
        assert monitor.paths() == []
        assert here.finish() == 3
        assert monitor.paths() == ["/ping/start", "/ping/3"]
        assert here.shard(0, of=1) == 0
        assert monitor.paths() == []
        assert here.finish() == 0
        assert monitor.paths() == ["/ping/start", "/ping"]


# Beside each other, and killed


def test_processes_beside_each_other_and_beside_a_load(
    runner: Runner, settings: Settings, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset(12)
    discover = ("discover", "--source", dataset, "--batch-id", "a1")
    assert [one.finish().code for one in [runner.start(*discover) for _ in range(2)]] == [0, 0]
    shard, load = (
        ("shard", "--batch-id", "a1", "--of", "1", "--index", "0"),
        ("load", *discover[1:], "--local-scheduler"),
    )
    finish = ("finish", "--batch-id", "a1")
    started = [runner.start(*command) for command in (shard, load, finish, shard, discover)]
    ended = [one.finish() for one in started]
    assert [one.code for one in ended] == [0, 0, ended[2].code, 0, 0], ended
    assert ended[2].code == 0 or "shards are not done" in ended[2].stderr
    finished = [one.finish() for one in [runner.start(*finish) for _ in range(2)]]
    assert [one.code for one in finished] == [0, 0], finished
    world.check(settings, (dataset, "a1", None))


def test_a_reset_waits_for_the_processes_of_an_array_and_is_refused(
    here: Here, settings: Settings, small_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, reset = small_dataset(4), ("reset", "--batch-id", "a1", "--confirm")
    here.discover(dataset)
    monkeypatch.setattr("pipeline.graph.run.BatchLock", partial(BatchLock, patience=0.1))
    process = BatchLock(settings, "a1", print, mode=ARRAY)
    try:
        assert here(*reset) == 4
        assert "Another run of batch a1 is going on." in here.err
        assert here.shard(0, of=1) == 0, "processes share the lock"
        assert here("load", "--source", dataset, "--batch-id", "a1", "--local-scheduler") == 0, "and a load takes none"
        with closing(Storage(settings)) as storage:
            storage.upload("a1/recognitions/1/camera1.jpg", b"of a shard that is under way")
        assert here("verify", "--repair") == 5
        assert "a run of batch a1 is going on" in here.out
    finally:
        process.release()
    resetting = BatchLock(settings, "a2", print, mode=ALONE)
    try:
        assert here("discover", "--source", dataset, "--force", "--batch-id", "a2") == 4
    finally:
        resetting.release()
    assert here(*reset) == 0
    world.nothing(settings)


def disturbed(
    runner: Runner, settings: Settings, dataset: Path, chance: random.Random, check: Callable[[], None]
) -> int:
    """Do a batch with four processes at a time that are killed at random; return how many were.

    They are killed after some of their writes, which no machine is too fast for, and ended at any time.
    """
    discover = ("discover", "--source", dataset, "--batch-id", "a1")
    kills = int(runner(*discover, kill_after=chance.randrange(3)).code == -signal.SIGKILL)
    assert runner(*discover).code == 0
    pending = [0, 1, 2, 3, 4, 5, 0, 3]
    while pending:
        chance.shuffle(pending)
        command = ("shard", "--batch-id", "a1", "--of", "6", "--index")
        turn = [(one, runner.start(*command, str(one), kill_after=chance.randrange(16))) for one in pending[:4]]
        for index, running in turn:
            if chance.random() < 0.3:
                running.wait(chance.uniform(0, 0.3))
                running.signal(signal.SIGTERM)
            ended = running.finish()
            code = ended.code
            assert code in (0, 130, -signal.SIGKILL, -signal.SIGTERM)
            assert code != 130 or "Interrupted. Run the same command again." in ended.stderr
            kills += code != 0
            if code == 0:
                pending.remove(index)
        assert world.dangling(settings) == []
    for after in (chance.randrange(3), None):
        code = runner("finish", "--batch-id", "a1", kill_after=after).code
        kills += code != 0
    assert code == 0
    check()
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(1), range(1, 4)])
def test_killed_at_random_the_same_processes_end_as_if_undisturbed(
    seeds: range, runner: Runner, settings: Settings, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset(12)
    check = partial(world.compare, settings, world.wanted((dataset, "a1", None)))
    kills = 0
    for seed in seeds:
        print(f"seed {seed}")
        kills += disturbed(runner, settings, dataset, random.Random(seed), check)
        assert runner("reset", "--batch-id", "a1", "--confirm").code == 0
        world.nothing(settings)
    assert kills > len(seeds)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_between_any_two_writes_of_each_command(
    part: int, runner: Runner, settings: Settings, small_dataset: MakeDataset
) -> None:
    dataset = small_dataset(4)
    commands: tuple[tuple[str | Path, ...], ...] = (
        ("discover", "--source", dataset, "--batch-id", "a1"),
        ("shard", "--batch-id", "a1", "--of", "1", "--index", "0"),
        ("finish", "--batch-id", "a1"),
    )
    undisturbed = [moments(runner(*command).writes) for command in commands]
    world.check(settings, (dataset, "a1", None))
    assert [len(one) > 4 for one in undisturbed] == [True, True, True]
    for turn in range(part, max(map(len, undisturbed)), PARTS):
        assert runner("reset", "--batch-id", "a1", "--confirm").code == 0
        for command, chosen in zip(commands, undisturbed, strict=True):
            print(f"{command[0]} killed after {chosen[turn % len(chosen)]} writes")
            killed(runner, settings, command, chosen[turn % len(chosen)])
        world.check(settings, (dataset, "a1", None))


def xargs(workdir: Path, shards: int, indices: int, kills: int, chance: random.Random) -> tuple[int, int]:
    """Run `xargs -P 4` once over all shards, and kill so many of its processes; return its exit code and the kills."""
    python = shlex.join([sys.executable, "-m", "pipeline", "shard", "--batch-id", "a1", "--of", str(shards)])
    shell = ["sh", "-c", f'{python} --index "$@" || exit 1', "shard"]  # xargs stops where a process is killed
    process = subprocess.Popen(
        ["xargs", "-P", "4", "-n", str(indices), *shell],
        cwd=workdir,
        env=subprocess_environment({"PIPELINE_THREAD_COUNT": "2"}),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write("\n".join(map(str, range(shards))))
    process.stdin.close()
    done = 0
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, indices / 10))
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in tree(process.pid)}
            ours = [pid for pid, command in commands.items() if command.startswith(sys.executable.encode())]
            if ours and done < kills:
                os.kill(chance.choice(ours), signal.SIGKILL)
                done += 1
    return process.returncode, done


@pytest.mark.slow
def test_xargs_whose_processes_are_killed_at_random_beside_a_load(
    runner: Runner, workdir: Path, settings: Settings, small_dataset: MakeDataset
) -> None:
    shards = int(os.environ.get("ARRAY_SHARDS", "40"))  # 10000 takes half an hour
    dataset, chance, one = small_dataset(shards), random.Random(7), {"PIPELINE_BATCH_SIZE": "1"}
    arguments = ("--source", dataset, "--batch-id", "a1")
    assert runner("discover", *arguments, env=one).code == 0
    assert world.query(settings.database_url.reveal(), "SELECT shards FROM ingest.batches") == [(shards,)]
    indices, kills = max(5, shards // 40), max(4, shards // 250)
    code, killed = xargs(workdir, shards, indices, kills, chance)
    assert (code, killed > 1) == (123, True)
    load = runner.start("load", *arguments, "--workers", "2", "--local-scheduler", env=one)
    while code:
        code, more = xargs(workdir, shards, indices, kills - killed, chance)
        killed += more
    loaded = load.finish(timeout=3600)
    assert loaded.code == 0, loaded.stderr
    assert runner("finish", "--batch-id", "a1").code == 0
    print(f"{shards} shards, {killed} processes killed")
    world.check(settings, (dataset, "a1", None))
