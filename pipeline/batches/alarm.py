"""Say how a command ended: to a monitor that misses what does not run, and to people once for each problem.

PING_URL is told of every run, NOTIFY_URLS of a problem that is new for the command and of the first success after it.
A held batch is a problem until somebody publishes or resets it, whatever later nights load. What people were told is in
ingest.notifications; while the database does not respond, it is in a file below PIPELINE_HOME.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple, TypeVar

from pipeline import errors
from pipeline.batches.state import KIND_LOAD, KIND_QWEN
from pipeline.config import Secret, read_alarms, redact
from pipeline.database import Connection, Database
from pipeline.errors import PipelineError, RefusedError, UsageError
from pipeline.files import replacing
from pipeline.observe.logger import log_tail
from pipeline.observe.notify import is_installed, notify
from pipeline.observe.ping import Ping

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Commands that are watched, and the kind of batch that they hold back, as a pattern.
WATCHED = {"load": KIND_LOAD, "load-qwen": KIND_QWEN, "finish": "%", "verify": ""}
_NEWS_SECONDS = 30.0  # to look up what people know, to notify them, and to record that
_ANSWER_SECONDS = 7.0  # of the database, to each of the two
_SHOWN_CHARACTERS = 3000


class Memory(NamedTuple):
    """What people know of: problems of a command, as `problem_of` names them, and the batches that are held.

    `unfinished` says whether another batch is neither held nor done: it may claim what is new as well.
    """

    told: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    unfinished: bool = False


def problem_of(code: int, error: PipelineError | None, detail: str = "") -> str:
    """Return a name for how a command ended, the same for the same problem; empty for a success.

    Numbers in a message are left out: they change from run to run, as those in the id of a batch.
    """
    if not code:
        return ""
    if error is None:
        return f"exit code {code} {detail}".strip()
    text = error.code
    if isinstance(error, (UsageError, RefusedError)):
        text = re.sub(r"\d+", "#", redact(error.message).partition("\n")[0])
    return f"{type(error).__name__} {text}".strip()


def in_words(problem: str) -> str:
    """Return a problem as people read it: names of errors as words, as in `unfinished: storage unavailable`."""
    names = [name for name in problem.split()[:2] if hasattr(errors, name)]
    words = [" ".join(re.findall("[A-Z][a-z]+", name)).lower() for name in names]
    words = [one.removesuffix(" error") if one.endswith(("ed error", "held error")) else one for one in words]
    return ": ".join(filter(None, [*words, " ".join(problem.split()[len(names) :])]))


def news(problem: str, memory: Memory) -> tuple[frozenset[str], frozenset[str]]:
    """Return the problems to tell of and those that are over, of a run that ended with a problem or without one."""
    held = frozenset(f"held {batch_id}" for batch_id in memory.held)
    if not problem:
        return frozenset(), memory.told - held
    is_of_held = problem == "HeldError" or (problem == "ClaimedError" and not memory.unfinished)
    found = held if held and is_of_held else frozenset({problem})
    return found - memory.told, frozenset()


class Alarm:
    """The alarms of one run of a command; `find_database` returns the one that it works with, if it got that far."""

    def __init__(self, command: str, production: bool, find_database: Callable[[], Database | None]) -> None:
        self._command, self._find_database = command, find_database
        self._settings = read_alarms(production)
        self._ping = Ping(self._settings.ping_url) if self._settings.ping_url is not None else None
        self._file = self._settings.home / ("told-production.json" if production else "told.json")
        self.detail = ""  # what tells one problem with the same exit code from another

    def start(self) -> None:
        """Say that the command begins."""
        if self._settings.notify_urls is not None and not is_installed():
            logger.warning("NOTIFY_URLS is set, and nobody is notified without apprise: `pip install '.[notify]'`.")
        if self._ping is not None:
            self._ping.start()

    def finish(self, code: int, error: PipelineError | None = None) -> None:
        """Tell the monitor and, if there is news, people how the command ended."""
        if self._ping is not None:
            self._ping.finish(code, _text(error))
        if self._settings.notify_urls is None or not is_installed():
            return
        arguments = self._settings.notify_urls, code, error
        # In a thread, so that a database that hangs does not hold up the command.
        thread = threading.Thread(target=self._tell, args=arguments, name="alarm", daemon=True)
        thread.start()
        thread.join(_NEWS_SECONDS)
        if thread.is_alive():
            logger.warning("Nobody was notified within %.0f s.", _NEWS_SECONDS)

    def _tell(self, urls: Secret, code: int, error: PipelineError | None) -> None:
        new, over = news(problem_of(code, error, self.detail), self._read())
        if (new or over) and notify(urls, self._title(code), self._body(over, error), good=not code):
            self._write(new, over)

    def _title(self, code: int) -> str:
        what = {0: "succeeds again", 5: "found differences", 6: "holds a batch back", 130: "was interrupted"}
        return f"pipeline {self._command} {what.get(code, f'failed with exit code {code}')} on {socket.gethostname()}"

    def _body(self, over: Iterable[str], error: PipelineError | None) -> str:
        after = "".join(f"Over: {in_words(problem)}\n" for problem in sorted(over))
        target, _, rest = _text(error).partition("\n")
        return f"{after}{target[:_SHOWN_CHARACTERS]}\n{rest[-_SHOWN_CHARACTERS:]}"

    def _read(self) -> Memory:
        """Return what people know from the database and from the file."""

        def read(connection: Connection) -> Memory:
            told = {row.problem for row in connection.execute("list_told", command=self._command)}
            rows = connection.execute("list_states", kind=WATCHED[self._command])
            held = frozenset(row.id for row in rows if row.state == "held")
            return Memory(frozenset(told), held, len(held) < len(rows))

        memory = self._ask(read) or Memory()
        return memory._replace(told=memory.told.union(self._read_file().get(self._command, ())))

    def _write(self, new: frozenset[str], over: frozenset[str]) -> None:
        """Record what people were told, in the file as long as the database does not respond."""

        def write(connection: Connection) -> bool:
            connection.execute("insert_told", command=self._command, problems=[*new])
            connection.execute("delete_told", command=self._command, problems=[*over])
            return True

        is_kept = self._ask(write)
        known = self._read_file()
        here = set(known.get(self._command, ())) - over | (frozenset() if is_kept else new)
        if here != set(known.get(self._command, ())):
            try:
                self._file.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
                with replacing(self._file) as file:
                    json.dump({**known, self._command: sorted(here)}, file)
            except OSError as exc:
                logger.warning("%s cannot be written: %s. The next run tells the same again.", self._file, exc.strerror)

    def _ask(self, work: Callable[[Connection], Result]) -> Result | None:
        """Return what `work` returns, None without an answer in time: a silent host may have many addresses."""
        answers: list[Result] = []

        def ask() -> None:
            with suppress(PipelineError):
                if (database := self._find_database()) is not None:
                    with database.transaction(_ANSWER_SECONDS) as connection:
                        answer = work(connection)
                    answers.append(answer)

        thread = threading.Thread(target=ask, name="alarm-database", daemon=True)
        thread.start()
        thread.join(_ANSWER_SECONDS)
        return answers[0] if answers else None

    def _read_file(self) -> dict[str, list[str]]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return {str(name): list(map(str, told)) for name, told in found.items()}
        except (OSError, ValueError, AttributeError, TypeError):  # there is none, or somebody changed it
            return {}


def _text(error: PipelineError | None) -> str:
    """Return the end of the log, and the error that is not there yet."""
    tail, cause = log_tail(), redact(error.message) if error is not None else ""
    return tail if cause in tail else f"{tail}\n{cause}".lstrip()
