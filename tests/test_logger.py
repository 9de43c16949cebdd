"""observe/logger.py: destination, format and redaction of log lines."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator

import pytest

from pipeline.config import Secret
from pipeline.errors import UsageError
from pipeline.observe.logger import ConsoleHandler, configure_logging, say

PASSWORD = "correct-horse-battery"
NAMES = ("", "pipeline", "luigi", "luigi-interface")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Restore logging, which belongs to the process."""
    levels = {name: logging.getLogger(name).level for name in NAMES}
    handlers = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace stderr by a terminal; not a fixture, because pytest replaces stderr between set-up and test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_steps_are_logged_only_with_verbose(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    logger = logging.getLogger("pipeline.steps.discover")
    configure_logging()
    logger.info("discover: 1 recognition")
    logger.warning("one was rejected")
    configure_logging(verbose=True)
    logger.info("discover: 2000 recognitions")
    logger.debug("details")
    assert stderr.getvalue() == "[WARNING] one was rejected\n[INFO] discover: 2000 recognitions\n"


def test_configuring_again_replaces_only_its_own_handler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = terminal(monkeypatch)
    mine = logging.StreamHandler(io.StringIO())
    logging.getLogger().addHandler(mine)
    for _ in range(3):
        configure_logging(verbose=True)
    logging.getLogger("pipeline.upload").info("once")
    assert stderr.getvalue() == "[INFO] once\n"
    assert mine in logging.getLogger().handlers


def test_a_line_starts_with_its_time_unless_stderr_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging(verbose=True)
    logging.getLogger("pipeline.upload").info("shard 3 done")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[INFO\] shard 3 done\n", stream.getvalue())


def test_libraries_log_warnings_and_luigi_nothing_unless_verbose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = terminal(monkeypatch)
    configure_logging()
    logging.getLogger("sqlalchemy").info("a connection")
    logging.getLogger("luigi-interface").error("a task failed, with a traceback")
    logging.getLogger("sqlalchemy").warning("odd")
    logging.getLogger("urllib3.connection").warning("Failed to parse headers (url=http://monitor:80/5f0c)")
    assert stderr.getvalue() == "[WARNING] odd\n"
    configure_logging(verbose=True)
    logging.getLogger("luigi-interface").info("scheduled")
    assert stderr.getvalue().endswith("[INFO] scheduled\n")


def test_of_luigis_errors_only_the_one_that_ends_its_command_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    interface = logging.getLogger("luigi-interface")

    def run_with_retcodes() -> None:
        interface.error("an unknown parameter")

    for _ in range(2):
        configure_logging()
    run_with_retcodes()
    interface.error("a task failed")
    assert stderr.getvalue() == "[ERROR] an unknown parameter\n"
    configure_logging(verbose=True)
    interface.error("a task failed")
    assert stderr.getvalue().endswith("[ERROR] a task failed\n")


@pytest.mark.parametrize("number", [2, 64, 1000])
def test_a_warning_never_keeps_another_one_from_the_log(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    stderr = terminal(monkeypatch)
    configure_logging()
    logger, formats = logging.getLogger("pipeline.storage"), [f"the {n}th request: %s" for n in range(number)]
    if number == 2:  # the slots of a table of 64 by checksum would be the same
        slots = {zlib.crc32(one.encode()) % 64: one for one in (f"another {n}: %s" for n in range(1000))}
        formats[1] = slots[zlib.crc32(formats[0].encode()) % 64]
    for one in formats:
        logger.warning(one, "failed")
        logger.warning(one, "failed again")
    assert stderr.getvalue() == "".join(f"[WARNING] {one % 'failed'}\n" for one in formats)
    logger.warning(formats[-1], "failed once more")
    assert "once more" not in stderr.getvalue()


def test_a_warning_passes_once_a_minute_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    configure_logging()
    logger, context = logging.getLogger("pipeline.storage"), multiprocessing.get_context("fork")
    child = context.Process(target=logger.warning, args=("the request %d failed", 1))
    child.start()
    child.join()
    logger.warning("the request %d failed", 2)
    assert stderr.getvalue() == ""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    logger.warning("the request %d failed", 3)
    assert stderr.getvalue() == "[WARNING] the request 3 failed\n"


@pytest.mark.parametrize("verbose", [False, True])
def test_a_pipeline_error_has_a_traceback_only_with_verbose(monkeypatch: pytest.MonkeyPatch, verbose: bool) -> None:
    stderr = terminal(monkeypatch)
    logging.getLogger().handlers.clear()  # the first handler's traceback is cached in the record
    configure_logging(verbose)
    try:
        raise UsageError("There is no batch x.", "See status.")
    except UsageError:
        logging.getLogger("pipeline.load").exception("failed")
    written = stderr.getvalue()
    assert written.startswith("[ERROR] failed\n")
    assert ("Traceback" in written) == verbose
    if not verbose:
        assert written == "[ERROR] failed\nError: There is no batch x.\nHint: See status.\n"


def test_secrets_are_redacted_in_messages_arguments_and_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    Secret(PASSWORD)
    configure_logging(verbose=True)
    logger = logging.getLogger("pipeline.database")
    logger.info("connecting with %s", PASSWORD)
    logger.info("to postgresql://postgres:pa55@db.co/postgres as %r", Secret(PASSWORD))
    try:
        raise ValueError(f"could not log in with {PASSWORD}")
    except ValueError:
        logger.exception("failed")
    logging.getLogger("sqlalchemy").warning("retry of http://u:hunter2@proxy:3128 with %s", {"key": PASSWORD})
    written = stderr.getvalue()
    assert PASSWORD not in written
    assert "pa55" not in written
    assert "hunter2" not in written
    assert "ValueError: could not log in with ***" in written
    assert written.count("***") >= 5


def test_secrets_are_redacted_in_the_stack() -> None:
    Secret(PASSWORD)
    record = logging.LogRecord("pipeline", logging.INFO, __file__, 1, "see %s", (PASSWORD,), None)
    record.stack_info = f"Stack:\n  password = {PASSWORD!r}"
    assert PASSWORD not in ConsoleHandler(verbose=True, json=False).format(record)


def test_json_lines_are_valid_and_redacted_before_escaping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = terminal(monkeypatch)
    secret = 'pa"ss\\word'
    Secret(secret)
    Secret("message")
    configure_logging(verbose=True, log_format="json")
    say(f"no login with {secret}", task=f"Load({secret})", shard=3, hint=None)
    say('bad option "password=hunter22", see the manual')
    try:
        raise ValueError(f"could not log in with {secret}")
    except ValueError:
        logging.getLogger("pipeline.database").exception("failed")
    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert lines[0]["message"] == "no login with ***"
    assert (lines[0]["task"], lines[0]["shard"], lines[0]["hint"]) == ("Load(***)", 3, None)
    assert "hunter22" not in lines[1]["message"]
    assert "could not log in with ***" in lines[2]["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", lines[2]["time"])
    assert (lines[2]["level"], lines[2]["logger"]) == ("error", "pipeline.database")


def test_json_lines_have_the_stack_and_every_extra_field(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    Secret(PASSWORD)
    configure_logging(log_format="json")
    logger = logging.getLogger("pipeline.storage")
    logger.warning("слишком много %s", "запросов", stack_info=True, extra={"path": [PASSWORD], "n": 1.5})
    assert "слишком много запросов" in stderr.getvalue()
    line = json.loads(stderr.getvalue())
    assert list(line)[:4] == ["time", "level", "logger", "message"]
    assert (line["level"], line["path"], line["n"]) == ("warning", "['***']", 1.5)
    assert "test_logger.py" in line["stack"]


def test_a_pipeline_error_in_json_is_its_message_and_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    logging.getLogger().handlers.clear()
    configure_logging(log_format="json")
    try:
        raise UsageError("There is no batch x.", "See status.")
    except UsageError:
        logging.getLogger("pipeline.load").exception("failed")
    assert json.loads(stderr.getvalue())["exception"] == "Error: There is no batch x.\nHint: See status."


def test_a_message_to_a_full_disk_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        say("x" * 100_000)
        assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))
