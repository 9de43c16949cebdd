"""Worker processes that run one task after another, so that each is forked, connects and warms up once.

Luigi forks for every task. A task is then a process that connects anew to PostgreSQL and Storage, copies pages that it
touches, and finds out anew how many requests Storage takes. Here the processes stay until the worker has ended.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

import luigi
from luigi.task_register import load_task


class Child:
    """A process of the pool, and the task that it was given last."""

    def __init__(self, process: Any, orders: Connection) -> None:
        self.process, self.orders = process, orders
        self.task_id = ""


class Errand:
    """A task for a process of the pool; to Luigi's worker it looks like the process that it would have forked."""

    use_multiprocessing = True
    #: A task that may take so long only has a process of its own, which can be ended without harm to others.
    timeout_time = None
    worker_timeout = 0

    def __init__(self, pool: Pool, task: luigi.Task) -> None:
        self.task = task
        self._pool = pool
        self._child: Child | None = None

    def start(self) -> None:
        """Give the task to a process that has none."""
        self._child = self._pool.give(self.task)

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
        running: the ids of the tasks that have not ended, as Luigi keeps them.
    """

    def __init__(
        self,
        make: Callable[[luigi.Task], Any],
        around: Callable[[], AbstractContextManager[None]],
        running: Collection[str],
    ) -> None:
        self._make, self._around, self._running = make, around, running
        self._children: list[Child] = []

    def give(self, task: luigi.Task) -> Child:
        """Send a task to a process that has none, a new one where all are busy."""
        self._children = [child for child in self._children if child.process.is_alive()]
        idle = (child for child in self._children if child.task_id not in self._running)
        child = next(idle, None) or self._fork()
        child.task_id = task.task_id
        # Where it has just ended, Luigi finds that out, and tells that the task failed.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            child.orders.send((task.task_module, task.task_family, task.to_str_params()))
        return child

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
                    module, family, parameters = orders.recv()
                except EOFError:
                    return
                self._make(load_task(module, family, parameters)).run()
