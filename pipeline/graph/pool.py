"""Worker processes that run one task after another; Luigi forks for every task, which then connects anew."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import luigi

_PR_SET_PDEATHSIG = 1
_REPEAT_SECONDS = 0.2


class PooledTask:
    """A task for a process of the pool, with the interface of the process that Luigi would have forked for it."""

    use_multiprocessing = True
    timeout_time = None  # Luigi itself forks for a task with a timeout: ending its process harms no other task

    def __init__(self, pool: Pool, task: luigi.Task, status_reporter: Any) -> None:
        self.task, self.status_reporter, self._pool = task, status_reporter, pool
        self._process: Any = None

    def start(self) -> None:
        """Send the task to an idle process."""
        self._process = self._pool.send(self)

    @property
    def exitcode(self) -> int | None:
        """Return the exit code of the process, None while it runs."""
        return self._process.exitcode if self._process else None

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self._process is not None and bool(self._process.is_alive())

    def terminate(self) -> None:
        """End the process with SIGTERM."""
        self._process.terminate()


@dataclass
class _Child:
    """A process of the pool, the pipe to it, and the task it was sent last."""

    process: Any
    tasks: Connection
    task: PooledTask | None = None


@dataclass
class Pool:
    """The processes of a worker."""

    make: Callable[[luigi.Task], Any]  # called where the task runs; its result's `run` runs the task and reports that
    around: Callable[[], AbstractContextManager[None]]  # entered once in each process
    is_running: Callable[[PooledTask], bool]  # whether Luigi still waits for the result of a task
    forking: Callable[[], AbstractContextManager[None]] = nullcontext  # entered around each fork
    _children: list[_Child] = field(default_factory=list, init=False)

    def send(self, task: PooledTask) -> Any:
        """Send a task to an idle process, a new one where none is idle; return the process."""
        self._children = [child for child in self._children if child.process.is_alive()]
        idle = (child for child in self._children if child.task is None or not self.is_running(child.task))
        child = next(idle, None) or self._fork()
        child.task = task
        # Where the process has just ended, Luigi notices that and reports the task as failed.
        with suppress(BrokenPipeError, ConnectionResetError):
            child.tasks.send(task.task)  # pickled as it is: from its parameters, it would resolve its batch again
        return child.process

    def close(self) -> None:
        """Let every process finish its task and end, and wait for that."""
        for child in self._children:
            child.tasks.close()
        for child in self._children:
            child.process.join()
        self._children.clear()

    def end(self) -> None:
        """End every process with SIGTERM, those that Luigi itself forked included, and wait for that."""
        while children := multiprocessing.active_children():
            for child in children:
                BaseProcess.terminate(child)  # past the method of Luigi's processes, which would wait
            for child in children:
                child.join(_REPEAT_SECONDS)  # a process that was just forked discards the signals it inherits
        self.close()

    def _fork(self) -> _Child:
        context = multiprocessing.get_context("fork")
        reader, writer = context.Pipe(duplex=False)
        others = [child.tasks for child in self._children]
        process = context.Process(target=self._work, args=(reader, [writer, *others], os.getpid()))
        with self.forking():
            process.start()
        reader.close()
        self._children.append(_Child(process, writer))
        return self._children[-1]

    def _work(self, tasks: Connection, inherited: Collection[Connection], parent: int) -> None:
        """Run tasks until the worker closes its end of the pipe."""
        end_with_parent(parent)
        for connection in inherited:  # an open copy would keep the other processes from noticing that the worker ended
            connection.close()
        with self.around():
            while True:
                try:
                    task = tasks.recv()
                except EOFError:
                    return
                self.make(task).run()


def end_with_parent(parent: int) -> None:
    """Make a forked process end with its parent, and leave the signals of a terminal to the parent."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


class ChildProcess(nullcontext[None]):
    """Luigi's `task_process_context`: the process that Luigi forks for a task ends with its parent."""

    def __init__(self, task_process: Any) -> None:
        super().__init__()
        if task_process.use_multiprocessing:
            end_with_parent(os.getppid())
