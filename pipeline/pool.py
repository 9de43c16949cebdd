"""Worker processes that run one task after another, so that each is forked, connects and warms up once.

Luigi forks for every task. A task is then a process that connects anew to PostgreSQL and Storage, copies pages that it
touches, and finds out anew how many requests Storage takes. Here the processes stay until the worker has ended.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

import luigi


class Child:
    """A process of the pool, and what it was given last."""

    def __init__(self, process: Any, orders: Connection) -> None:
        self.process, self.orders = process, orders
        self.errand: Errand | None = None


class Errand:
    """A task for a process of the pool; to Luigi's worker it looks like the process that it would have forked."""

    use_multiprocessing = True
    #: A task that may take so long only has a process of its own, which can be ended without harm to others.
    timeout_time = None
    worker_timeout = 0

    def __init__(self, pool: Pool, task: luigi.Task, status_reporter: Any) -> None:
        self.task, self.status_reporter = task, status_reporter
        self._pool = pool
        self._child: Child | None = None

    def start(self) -> None:
        """Give the task to a process that has none."""
        self._child = self._pool.give(self)

    @property
    def pid(self) -> int | None:
        """Return the process id, None before the start."""
        return self._child.process.pid if self._child else None

    @property
    def exitcode(self) -> int | None:
        """Return how the process ended, None while it goes on."""
        return self._child.process.exitcode if self._child else None

    def is_alive(self) -> bool:
        """Return whether the process goes on."""
        return self._child is not None and bool(self._child.process.is_alive())

    def terminate(self) -> None:
        """End the process."""
        if self.is_alive():
            os.kill(self.pid or 0, signal.SIGTERM)


class Pool:
    """The processes of a worker.

    Arguments:
        make: returns what runs a task to its end and tells its result; called in the process that runs it.
        around: entered once in each process.
        running: what has not ended, by the ids of the tasks, as Luigi keeps it.
    """

    def __init__(
        self,
        make: Callable[[luigi.Task], Any],
        around: Callable[[], AbstractContextManager[None]],
        running: Mapping[str, Any],
    ) -> None:
        self._make, self._around, self._running = make, around, running
        self._children: list[Child] = []

    def give(self, errand: Errand) -> Child:
        """Send a task to a process that has none, a new one where all are busy."""
        self._children = [child for child in self._children if child.process.is_alive()]
        child = next((child for child in self._children if self._is_idle(child)), None) or self._fork()
        child.errand = errand
        # Where it has just ended, Luigi finds that out, and tells that the task failed.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            child.orders.send(errand.task)  # as it is: made anew from its parameters, it would ask which batch is meant
        return child

    def _is_idle(self, child: Child) -> bool:
        return child.errand is None or self._running.get(child.errand.task.task_id) is not child.errand

    def close(self) -> None:
        """Let every process end once it has done what it is at, and wait for that."""
        for child in self._children:
            child.orders.close()
        for child in self._children:
            child.process.join()
        self._children.clear()

    def end(self) -> None:
        """End every process at once, and wait for that."""
        for child in self._children:
            if child.process.is_alive():
                os.kill(child.process.pid, signal.SIGTERM)
        self.close()

    def _fork(self) -> Child:
        context = multiprocessing.get_context("fork")
        theirs, ours = context.Pipe(duplex=False)
        others = [child.orders for child in self._children]
        process = context.Process(target=self._work, args=(theirs, [ours, *others]))
        process.start()
        theirs.close()
        child = Child(process, ours)
        self._children.append(child)
        return child

    def _work(self, orders: Connection, inherited: Collection[Connection]) -> None:
        """Run what is ordered until nobody orders any more."""
        for connection in inherited:  # or no process would ever learn that the worker is gone
            connection.close()
        with self._around():
            while True:
                try:
                    task = orders.recv()
                except EOFError:
                    return
                self._make(task).run()
