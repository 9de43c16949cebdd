"""Luigi's own command with a task of ours: `luigi --module pipeline LoadBatch`.

Importing the package changes nothing of Luigi. What is here is put in place when the task that the command names is
made, and it is one of ours. The process then belongs to that task.
"""

from __future__ import annotations

import configparser
import logging
from functools import partial
from importlib import resources

import luigi.interface
from luigi.cmdline_parser import CmdlineParser

from pipeline.graph.memory import bound_memory
from pipeline.graph.run import Run, RunRegistry
from pipeline.graph.signals import Interrupts
from pipeline.graph.worker import SchedulerFactory
from pipeline.observe.logger import configure_logging

#: Sections of the packaged luigi.cfg that concern a worker. `scheduler_url` is not among the defaults: it would win
#: over a `scheduler_host` of the user.
_SECTIONS = ("core", "worker", "execution_summary", "retcode")
_NOT_DEFAULTS = frozenset({"scheduler_url"})


def use_packaged_settings() -> None:
    """Let Luigi use the settings of the packaged luigi.cfg where the user's configuration has none.

    Without them Luigi reports most failures with exit code 0, and takes a task without its marker for done.
    """
    packaged = configparser.ConfigParser(interpolation=None)
    packaged.read_string(resources.files("pipeline.graph").joinpath("luigi.cfg").read_text(encoding="utf-8"))
    configuration = luigi.configuration.get_config()
    for section in _SECTIONS:
        for option, value in packaged.items(section):
            if option not in _NOT_DEFAULTS and not configuration.has_option(section, option):
                configuration.set(section, option, value)
    # Luigi reads these two past its own parameters, and would warn that nobody does.
    luigi.interface.core.ignore_unconsumed |= {"rpc_retry_attempts", "rpc_retry_wait"}


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
