"""Exactly once, whatever is killed: SIGKILL between any two writes, and at random moments, then the same command again.

After each kill the rows that readers see are whole and have their objects; after the re-run rows, by natural key, and
objects, by content, are those of an undisturbed run. What was loaded is then reset, killed in its turn, so that one
database serves all moments.
"""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from pipeline.config import Settings
from pipeline.sample.writer import ANNOTATIONS
from tests import world
from tests.people import NOTES, People
from tests.runner import ForkServer, Runner, moments
from tests.services import MakeDataset
from tests.sweeps import PARTS

SERIAL = {"PIPELINE_THREAD_COUNT": "1", "PIPELINE_BATCH_SIZE": "2"}


@pytest.fixture
def runner(workdir: Path, fork_server: ForkServer) -> Runner:
    """Commands in the working directory, one thread each, so that the order of their writes is always the same."""
    return Runner(fork_server, workdir, SERIAL)


@dataclass(frozen=True)
class Scenario:
    """A command that is killed, the reset that undoes it, and what there has to be with and without it."""

    command: Sequence[str | Path]
    reset: Sequence[str]
    loaded: Callable[[], None]
    unloaded: Callable[[], None]


def load(runner: Runner, settings: Settings, first: Path, second: Path) -> Scenario:
    return Scenario(
        ("load", "--source", first, "--batch-id", "b1"),
        ("reset", "--batch-id", "b1", "--confirm"),
        partial(world.compare, settings, world.wanted((first, "b1", None))),
        partial(world.nothing, settings),
    )


def forced(runner: Runner, settings: Settings, first: Path, second: Path) -> Scenario:
    """The same recognitions with other photos, menus and receipts, on top of a version with annotations, which go."""
    qwen = first / ANNOTATIONS
    assert runner("load", "--source", first, "--batch-id", "b1").code == 0
    assert runner("load-qwen", "--file", qwen, "--batch-id", "q1").code == 0
    former = (first, "b1", None)
    return Scenario(
        ("load", "--source", second, "--batch-id", "b2", "--force"),
        ("reset", "--batch-id", "b2", "--confirm"),
        partial(world.compare, settings, world.wanted((second, "b2", None), superseded=[former])),
        partial(world.compare, settings, world.wanted(former, qwen=qwen)),
    )


def qwen(runner: Runner, settings: Settings, first: Path, second: Path) -> Scenario:
    """Annotations in the place of others."""
    assert runner("load", "--source", first, "--batch-id", "b1").code == 0
    assert runner("load-qwen", "--file", first / ANNOTATIONS, "--batch-id", "q1").code == 0
    shown = (first, "b1", None)
    return Scenario(
        ("load-qwen", "--file", second / ANNOTATIONS, "--batch-id", "q2", "--force"),
        ("reset", "--batch-id", "q2", "--confirm"),
        partial(world.compare, settings, world.wanted(shown, qwen=second / ANNOTATIONS)),
        partial(world.compare, settings, world.wanted(shown, qwen=first / ANNOTATIONS)),
    )


def worked_on(runner: Runner, settings: Settings, first: Path, second: Path) -> Scenario:
    """What changed, where work on one recognition is older than the load, and on another begins after its upload.

    All receipts are others, and one photo is; the rest is copied in the bucket.
    """
    dsn = settings.database_url.reveal()
    assert runner("load", "--source", first, "--batch-id", "b1").code == 0
    known, late, *others = sorted(world.folders(first))
    for number in (known, late, *others):
        for camera in ("Main", "Qualifying"):
            if (number, camera) != (others[0], "Main"):
                [former], [latter] = (world.folders(one)[number].rglob(f"*{camera}.jpg") for one in (first, second))
                latter.write_bytes(former.read_bytes())
    world.query(dsn, NOTES)
    people = People(dsn, "own")
    people.begin(known)
    people.begin_at("copy", late)
    loaded = world.wanted((first, "b1", [known, late]), (second, "b2", others), superseded=[(first, "b1", others)])
    files = sum(path.is_file() for path in second.rglob("*"))

    def check_loaded() -> None:
        world.compare(settings, loaded)
        notices = "SELECT recognition_id, step FROM ingest.notices WHERE code = 'in_use' ORDER BY id"
        assert world.query(dsn, notices) == [(known, "discover"), (late, "transform")]
        ((found,),) = world.query(dsn, "SELECT files FROM ingest.batches WHERE id = 'b2'")
        assert (sum(found.values()), found["rejected"], found["not_taken"]) == (files, 0, 8)

    def check_unloaded() -> None:
        world.compare(settings, world.wanted((first, "b1", None)))
        people.end(late)
        world.query(dsn, "DELETE FROM public.begun")

    command = ("load", "--source", second, "--batch-id", "b2", "--changed")
    return Scenario(command, ("reset", "--batch-id", "b2", "--confirm"), check_loaded, check_unloaded)


def unusable(dataset: Path) -> Path:
    """Remove ten of fourteen recognitions' photos."""
    for _, folder in sorted(world.folders(dataset).items())[:10]:
        next(folder.rglob("*_Main.jpg")).unlink()
    return dataset


def without(settings: Settings, states: set[str]) -> None:
    """Readers see nothing, and the batches have these states."""
    assert world.counts(settings.database_url.reveal())["public.recognitions"] == 0
    found = world.query(settings.database_url.reveal(), "SELECT state FROM ingest.batches")
    assert {state for (state,) in found} == states
    assert world.inconsistencies(settings) == []


def undisturbed(runner: Runner, command: Sequence[str | Path], check: Callable[[], None], code: int = 0) -> list[int]:
    """Run a command, check what it left, and return the moments at which it may be killed."""
    done = runner(*command)
    assert done.code == code, done.stderr
    check()
    assert "commit" in done.writes
    return moments(done.writes)


def killed(runner: Runner, settings: Settings, command: Sequence[str | Path], moment: int, code: int = 0) -> None:
    """Kill a command at a moment; what readers see then is sound. The same command finishes it."""
    first = runner(*command, kill_after=moment)
    assert first.code in (-signal.SIGKILL, code), first.stderr  # its own code where that moment is the very end
    assert world.dangling(settings) == []
    assert world.inconsistencies(settings) == []
    again = runner(*command)
    assert again.code == code, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_while_it_is_held_or_published_a_batch_is_published_once(
    part: int, runner: Runner, settings: Settings, own_dataset: MakeDataset
) -> None:
    dataset = unusable(own_dataset(14))
    held, loaded = (
        partial(without, settings, {"held"}),
        world.wanted((dataset, "b1", sorted(world.folders(dataset))[10:])),
    )
    command = ("load", "--source", dataset, "--batch-id", "b1")
    publish, reset = ("publish", "--batch-id", "b1"), ("reset", "--batch-id", "b1", "--confirm")
    of_command = undisturbed(runner, command, held, code=6)
    of_reset = undisturbed(runner, reset, partial(without, settings, {"reset"}))
    assert runner(*command).code == 6
    of_publish = undisturbed(runner, publish, partial(world.compare, settings, loaded))
    assert runner(*reset).code == 0
    assert len(of_publish) > 8
    turns = list(zip(of_command, itertools.cycle(of_publish), itertools.cycle(of_reset), strict=False))
    for turn, (moment, publish_moment, reset_moment) in enumerate(turns[part::PARTS]):
        print(f"killed after {moment} writes, publish after {publish_moment}, reset after {reset_moment}")
        killed(runner, settings, command, moment, code=6)
        held()
        if turn % 3 == 2:
            killed(runner, settings, reset, reset_moment)
            without(settings, {"reset"})
            continue
        killed(runner, settings, publish, publish_moment)
        world.compare(settings, loaded)
        assert runner(*reset).code == 0
        without(settings, {"reset"})


@pytest.mark.slow
@pytest.mark.parametrize(("make", "part"), [*itertools.product([load, forced, qwen, worked_on], range(PARTS))])
def test_killed_between_any_two_writes_the_same_command_ends_as_if_undisturbed(
    make: Callable[[Runner, Settings, Path, Path], Scenario],
    part: int,
    runner: Runner,
    settings: Settings,
    small_dataset: MakeDataset,
    own_dataset: MakeDataset,
) -> None:
    scenario = make(runner, settings, small_dataset(4), own_dataset(4, seed=1, first_id=100_024))
    of_command = undisturbed(runner, scenario.command, scenario.loaded)
    of_reset = undisturbed(runner, scenario.reset, scenario.unloaded)
    assert len(of_command) > 20
    assert len(of_reset) > 5
    assert len(of_command) > len(of_reset)
    for moment, reset_moment in list(itertools.zip_longest(of_command, of_reset))[part::PARTS]:
        print(f"killed after {moment} writes, the reset after {reset_moment}")
        killed(runner, settings, scenario.command, moment)
        scenario.loaded()
        if reset_moment is None:  # each was tried
            assert runner(*scenario.reset).code == 0
        else:
            killed(runner, settings, scenario.reset, reset_moment)
        scenario.unloaded()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_with_four_workers_it_ends_as_if_undisturbed(
    seed: int, runner: Runner, settings: Settings, small_dataset: MakeDataset
) -> None:
    chance = random.Random(seed)
    dataset = small_dataset(12)
    command = ("load", "--source", dataset, "--batch-id", "b1", "--workers", "4", "--local-scheduler")
    environment = {"PIPELINE_BATCH_SIZE": "2"}
    started = time.monotonic()
    assert runner(*command, env=environment).code == 0
    seconds = time.monotonic() - started
    loaded = world.wanted((dataset, "b1", None))
    world.compare(settings, loaded)
    for _ in range(10):
        assert runner("reset", "--batch-id", "b1", "--confirm").code == 0
        world.nothing(settings)
        after = chance.uniform(0, seconds)
        whole_group = chance.random() < 0.5
        print(f"seed {seed}: killed after {after:.3f} of {seconds:.3f} s, with its workers at once: {whole_group}")
        running = runner.start(*command, env=environment)
        running.wait(after)
        running.signal(signal.SIGKILL, group=whole_group)
        running.finish()
        assert world.dangling(settings) == []
        again = runner(*command, env=environment)
        assert again.code == 0, again.stderr
        world.compare(settings, loaded)
