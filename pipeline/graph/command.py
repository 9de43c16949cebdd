"""Luigi's own command with a task of ours: `luigi --module pipeline LoadBatch`.

Importing the package changes nothing of Luigi. What is here is put in place when the task that the command names is
made, and it is one of ours. The process then belongs to that task.
"""

from __future__ import annotations

import logging
from functools import partial

import luigi.interface
from luigi.cmdline_parser import CmdlineParser

from pipeline.graph.luigid import use_packaged_settings
from pipeline.graph.memory import bound_memory
from pipeline.graph.run import Run, RunRegistry
from pipeline.graph.signals import Interrupts
from pipeline.graph.worker import SchedulerFactory
from pipeline.observe.logger import configure_logging


def is_root(family: str) -> bool:
    """Return whether Luigi's command of this process names a task family as the one to run."""
    parser = CmdlineParser.get_instance()
    return parser is not None and parser.known_args.root_task == family


def prepare() -> None:
    """Set up this process for Luigi's command with a task of ours."""
    bound_memory()
    use_packaged_settings()
    if not logging.getLogger().handlers:
        configure_logging()


def take_over(registry: RunRegistry, run: Run) -> None:
    """Let Luigi's command use our scheduler and our worker for a run.

    Luigi has no public way to give its command another factory.
    """
    registry.owns_worker = True
    interrupts = Interrupts(registry.cancel_statements)
    interrupts.__enter__()  # until the process ends
    factory = partial(SchedulerFactory, registry, run, interrupts, bare=True)
    setattr(luigi.interface, "_WorkerSchedulerFactory", factory)  # noqa: B010 (mypy: a type is no variable)
