"""logger.py: where lines go, how they look, and that no secret is in any of them."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from pipeline import config
from pipeline.config import Secret
from pipeline.errors import UsageError
from pipeline.observe.logger import RedactingFormatter, configure_logging, get_logger, say

PASSWORD = "correct-horse-battery"
NAMES = ("", "pipeline", "luigi", "luigi-interface")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put logging back as it was: it belongs to the whole process."""
    monkeypatch.setattr(config, "_redactor", config.Redactor())
    levels = {name: logging.getLogger(name).level for name in NAMES}
    handlers = list(logging.getLogger().handlers)
    interface = logging.getLogger("luigi-interface")
    filters = list(interface.filters)
    yield
    logging.getLogger().handlers[:] = handlers
    interface.filters[:] = filters
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in the place of stderr; not a fixture, for pytest sets stderr anew between set-up and test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_verbose_tells_the_steps_and_otherwise_only_warnings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    logger = get_logger("pipeline.steps.discover")
    configure_logging()
    logger.info("discover: 1 recognition")
    logger.warning("one was left out")
    configure_logging(verbose=True)
    logger.info("discover: 2000 recognitions")
    logger.debug("nobody asked for this")
    assert stderr.getvalue() == "[WARNING] one was left out\n[INFO] discover: 2000 recognitions\n"


def test_calling_it_again_does_not_double_the_lines_nor_take_away_other_handlers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = terminal(monkeypatch)
    mine = logging.StreamHandler(io.StringIO())
    logging.getLogger().addHandler(mine)
    for _ in range(3):
        configure_logging(verbose=True)
    get_logger("upload").info("once")
    assert stderr.getvalue() == "[INFO] once\n"
    assert mine in logging.getLogger().handlers


def test_where_nobody_is_watching_a_line_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging(verbose=True)
    get_logger("upload").info("shard 3 done")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[INFO\] shard 3 done\n", stream.getvalue())


def test_other_libraries_are_heard_from_warnings_on_and_luigi_not_at_all_unless_verbose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = terminal(monkeypatch)
    configure_logging()
    logging.getLogger("urllib3").info("a connection")
    logging.getLogger("luigi-interface").error("a task failed, with a traceback")
    logging.getLogger("urllib3").warning("odd")
    assert stderr.getvalue() == "[WARNING] odd\n"
    configure_logging(verbose=True)
    logging.getLogger("luigi-interface").info("scheduled")
    assert stderr.getvalue().endswith("[INFO] scheduled\n")


def test_of_luigis_errors_the_one_that_ends_its_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("verbose", [False, True])
def test_an_error_of_ours_is_a_sentence_and_a_hint_and_has_a_traceback_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, verbose: bool
) -> None:
    stderr = terminal(monkeypatch)
    logging.getLogger().handlers.clear()  # a record keeps the traceback as the first handler words it: pytest's
    configure_logging(verbose)
    try:
        raise UsageError("There is no batch x.", "See status.")
    except UsageError:
        get_logger("load").exception("failed")
    written = stderr.getvalue()
    assert written.startswith("[ERROR] failed\n")
    assert ("Traceback" in written) == verbose
    if not verbose:
        assert written == "[ERROR] failed\nError: There is no batch x.\nHint: See status.\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pipeline.storage", "pipeline.storage"), ("storage", "pipeline.storage"), ("__main__", "pipeline.__main__")],
)
def test_every_logger_is_below_the_root_of_the_package(name: str, expected: str) -> None:
    assert get_logger(name).name == expected


def test_no_secret_is_in_a_line_whichever_way_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    Secret(PASSWORD)
    configure_logging(verbose=True)
    logger = get_logger("pipeline.database")
    logger.info("connecting with %s", PASSWORD)
    logger.info("to postgresql://postgres:pa55@db.co/postgres as %r", Secret(PASSWORD))
    try:
        raise ValueError(f"could not log in with {PASSWORD}")
    except ValueError:
        logger.exception("failed")
    logging.getLogger("urllib3").warning("retry of http://u:hunter2@proxy:3128 with %s", {"key": PASSWORD})
    written = stderr.getvalue()
    assert PASSWORD not in written
    assert "pa55" not in written
    assert "hunter2" not in written
    assert "ValueError: could not log in with ***" in written
    assert written.count("***") >= 5


def test_the_stack_of_a_line_is_redacted_as_well() -> None:
    Secret(PASSWORD)
    formatter = RedactingFormatter(timestamp=False, tracebacks=False)
    record = logging.LogRecord("pipeline", logging.INFO, __file__, 1, "see %s", (PASSWORD,), None)
    record.stack_info = f"Stack:\n  password = {PASSWORD!r}"
    assert PASSWORD not in formatter.format(record)


def test_a_line_of_json_is_json_and_without_secrets_whatever_letters_these_have(
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
        get_logger("pipeline.database").exception("failed")
    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert lines[0]["message"] == "no login with ***"
    assert (lines[0]["task"], lines[0]["shard"], lines[0]["hint"]) == ("Load(***)", 3, None)
    assert "hunter22" not in lines[1]["message"]
    assert "could not log in with ***" in lines[2]["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", lines[2]["time"])
    assert (lines[2]["level"], lines[2]["logger"]) == ("error", "pipeline.database")
