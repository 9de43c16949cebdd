"""pool.py: processes that run one task after another."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import luigi
import pytest
from luigi.scheduler import Scheduler

from embedded_supabase.files import wait_until
from pipeline.graph.pool import Pool, PooledTask
from pipeline.graph.process import Interrupts
from pipeline.graph.run import RunRegistry
from pipeline.graph.worker import PooledWorker

SECONDS = 20

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


class Numbered(luigi.Task):
    number = luigi.IntParameter()


def numbered(number: int) -> luigi.Task:
    parameters: dict[str, Any] = {"number": number}
    return Numbered(**parameters)  # type: ignore[no-untyped-call]


class Work:
    """What runs a task: it tells its number and its process, and ends when it is let go."""

    def __init__(self, task: Any, told: Any, go: Any) -> None:
        self._task, self._told, self._go = task, told, go

    def run(self) -> None:
        self._told.send((self._task.number, os.getpid()))
        assert self._go[self._task.number].acquire(timeout=SECONDS)


class Place:
    """A pool, what it runs, and what is told of it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        # Pipes, not queues: a process that is killed would keep the lock of a queue that it has just written to.
        self.told, self._tells = context.Pipe(duplex=False)
        self.around, self._says = context.Pipe(duplex=False)
        # One for each task: of two processes that wait for the same one, either may be let go.
        self.go = {number: context.Semaphore(0) for number in (1, 2, 3)}
        self.running: dict[str, PooledTask] = {}
        self.pool = Pool(
            lambda task: Work(task, self._tells, self.go),
            self._around,
            lambda pooled: self.running.get(pooled.task.task_id) is pooled,
        )

    @contextmanager
    def _around(self) -> Iterator[None]:
        self._says.send("entered")
        yield
        self._says.send("left")

    def close(self) -> None:
        """Close the pipes."""
        for end in (self.told, self._tells, self.around, self._says):
            end.close()

    def start(self, number: int) -> tuple[PooledTask, int]:
        """Start a task as Luigi does; return it, and the process that runs it, once it does."""
        task = numbered(number)
        pooled = PooledTask(self.pool, task, None)
        self.running[task.task_id] = pooled
        pooled.start()
        assert self.told.poll(SECONDS)
        told, pid = self.told.recv()
        assert told == number
        return pooled, pid

    def finish(self, number: int) -> None:
        """Let a task end, as far as Luigi knows."""
        self.go[number].release()
        del self.running[numbered(number).task_id]


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.pool.end()
    made.close()


def test_tasks_run_in_as_many_processes_as_there_are_tasks_at_once(place: Place) -> None:
    _, first = place.start(1)
    _, second = place.start(2)
    assert len({first, second, os.getpid()}) == 3
    place.finish(1)
    _, third = place.start(3)
    assert third == first


def test_a_task_that_runs_again_does_not_take_another_process(place: Place) -> None:
    pids = set()
    for _ in range(4):
        _, pid = place.start(1)
        pids.add(pid)
        place.finish(1)
    assert len(pids) == 1


def test_what_is_around_is_entered_once_in_a_process_and_left_at_its_end(place: Place) -> None:
    for _ in range(2):
        place.start(1)
        place.finish(1)
    place.pool.close()
    assert [place.around.recv(), place.around.recv()] == ["entered", "left"]
    assert not place.around.poll()


@pytest.mark.parametrize("name", ["Manager", "Pool"])
def test_a_worker_starts_no_process_that_a_kill_would_leave_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        pytest.fail(f"multiprocessing.{name} was started")

    monkeypatch.setattr(multiprocessing, name, start)
    configuration = luigi.configuration.get_config()
    configuration.set("worker", "cache_task_completion", "true")
    try:
        interrupts = Interrupts(lambda: None, str)
        worker = PooledWorker(registry=RunRegistry(), scheduler=Scheduler(), interrupts=interrupts)
        assert worker.add(luigi.WrapperTask(), True)
    finally:
        configuration.remove_option("worker", "cache_task_completion")


def test_a_process_that_is_killed_shows_and_is_replaced(place: Place) -> None:
    pooled, pid = place.start(1)
    assert (pooled.is_alive(), pooled.exitcode) == (True, None)
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not pooled.is_alive(), SECONDS)
    assert pooled.exitcode == -signal.SIGKILL
    del place.running[pooled.task.task_id]
    _, other = place.start(2)
    assert other != pid


def test_close_waits_for_what_a_process_is_at_and_end_does_not(place: Place) -> None:
    pooled, _ = place.start(1)
    place.finish(1)
    place.pool.close()
    assert pooled.exitcode == 0
    pooled, _ = place.start(2)
    place.pool.end()
    # By the signal, or by the handler that the process inherited from who forked it.
    assert pooled.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
