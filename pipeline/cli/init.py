"""`init`: write the settings, luigi.cfg and the nightly jobs into the working directory, and check the settings."""

from __future__ import annotations

import argparse
import getpass
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

from dotenv import dotenv_values

from pipeline import doctor
from pipeline.cli.batches import examine, judge
from pipeline.cli.output import ask, print_result
from pipeline.config import KEY, REQUIRED, URL, check_required, command_line, home_directory
from pipeline.dataset.layout import find_source, usual_sources
from pipeline.doctor.finding import OK
from pipeline.errors import RefusedError, SettingsError, UsageError, remedy_of
from pipeline.extras import DISTRIBUTION
from pipeline.files import replacing
from pipeline.graph.luigid import read_again
from pipeline.observe.logger import say

TIMERS = ("pipeline-load.timer", "pipeline-verify.timer")
UNITS = ("pipeline-load.service", "pipeline-verify.service", "pipeline-luigid.service", *TIMERS)
_DATASET = "/srv/datasets/RRS_Dataset"  # in the templates
#: What a shell, cron or systemd would not take as part of a path.
_SYNTAX = re.compile(r"[\"'\\$`]|\s$")
_ATTEMPTS = 3
_QUESTIONS = {
    URL: "URL of the project's API, for instance https://abcdefgh.supabase.co: ",
    KEY: "Its service role key (not shown): ",
    REQUIRED[2]: "DATABASE_URL, postgresql://user:password@host:port/database (not shown): ",
}


def init(options: argparse.Namespace) -> int:
    """Write the files that are not there yet, and check the settings with the doctor; return the exit code of that."""
    if not options.non_interactive and (sys.stdin is None or not sys.stdin.isatty()):
        hint = f"Export {', '.join(REQUIRED)}, and add --non-interactive."
        raise RefusedError("`init` asks for settings, and there is no terminal: nothing was written.", hint)
    if any((parent / "CACHEDIR.TAG").exists() for parent in Path(sys.prefix).parents):
        message = f"{sys.prefix} is in a cache, which may be emptied: nightly jobs cannot run from there."
        raise UsageError(message, f"Install the package, as with `uv tool install {DISTRIBUTION}`, and run that.")
    folder = Path.cwd()
    dataset = _dataset(options.source)
    for path in (folder, dataset, Path(sys.executable), home_directory()):
        if _SYNTAX.search(str(path)) or not str(path).isprintable():
            message = f"{path} has characters that a shell, cron or systemd would take as syntax."
            hint = "Use a path without quotes, backslashes, dollar signs and control characters."
            raise UsageError(message, hint)
    settings_file = folder / (".env.production" if options.production else ".env.local")
    planned: dict[Path, str] = {}
    services = home_directory() / "env"
    named = options.production or options.url or settings_file.exists() or all(map(os.environ.get, REQUIRED))
    is_embedded = not named and os.path.isfile(services)  # False where it cannot be looked up
    if is_embedded:
        settings_file = services
    elif not settings_file.exists():
        values = _variables(options)
        if os.path.isdir(dataset):
            values["DATASET_DIR"] = str(dataset)
        _, _, rest = _template("env.example").partition("\n")  # without the line that says to copy it
        first = f"# Settings of the loads {'with' if options.production else 'without'} --production.\n"
        planned[settings_file] = fill_in(first + rest, values)
    planned[folder / "luigi.cfg"] = files("pipeline.graph").joinpath("luigi.cfg").read_text(encoding="utf-8")
    planned.update(_jobs(folder, dataset, options, is_embedded))
    written, kept = _write(planned)
    if settings_file not in planned:
        kept.insert(0, str(settings_file))
    read_again()  # luigi.cfg
    findings = examine(options, str(dataset) if os.path.isdir(dataset) else None)
    result = {"written": written, "kept": kept, **doctor.as_dict(findings)}
    text = [*(f"written  {path}" for path in written), *(f"kept     {path}, which was there" for path in kept)]
    # What `migrate`, one of the next steps, does is not wrong yet.
    code = judge(one for one in findings if one.check != "migrations" or one.kind is not SettingsError)
    is_migrated = any((one.check, one.level) == ("migrations", OK) for one in findings)
    text += [doctor.as_text(findings), "Next:"]
    if code:
        check = command_line("status --check", options.production)
        text.append(f"  Correct what is named above, then `{check}`.")
    text += _next_steps(options, dataset, is_embedded, is_migrated)
    print_result(options, result, "\n".join(text))
    return code


def _dataset(source: str | None) -> Path:
    """Return the folder of the dataset, that of the templates if none is named and none is found."""
    setting = os.environ.get("DATASET_DIR")
    if source or setting or next(usual_sources(), None) is not None:
        return find_source(source, setting)
    return Path(_DATASET)


def _variables(options: argparse.Namespace) -> dict[str, str]:
    """Return the variables of the process environment, and the required ones that it lacks as they are typed."""
    values = {name: value for name, value in os.environ.items() if value and name != "PIPELINE_HOME"}
    if options.url:
        values[URL] = options.url
    missing = [name for name in REQUIRED if name not in values]
    if missing and options.non_interactive:
        message = f"Not set in the process environment: {', '.join(missing)}."
        raise SettingsError(message, "Export them, or run `init` without --non-interactive: it asks for them.")
    for name in REQUIRED:
        if name in missing:
            values[name] = _ask_for(name)
        else:
            say(f"{name} is taken from {'--url' if name == URL and options.url else 'the process environment'}.")
            check_required(name, values[name])
    return values


def _ask_for(name: str, attempts: int = _ATTEMPTS) -> str:
    """Return what is typed, once it has the right form; raise SettingsError after the last attempt."""
    value = ask(_QUESTIONS[name], echo=name == URL).strip()
    try:
        check_required(name, value)
    except SettingsError as exc:
        if attempts == 1:
            raise
        say(f"{exc.message} {exc.hint}")
        return _ask_for(name, attempts - 1)
    return value


def fill_in(template: str, values: Mapping[str, str]) -> str:
    """Return the text of a file of variables with values in single quotes; raise SettingsError if one does not fit."""
    taken: dict[str, str | None] = {}

    def line(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            return match[0]
        taken[name] = values[name]
        escaped = values[name].replace("\\", "\\\\").replace("'", "\\'")
        return f"{name}='{escaped}'"

    text = re.sub(r"^(?:# )?([A-Z][A-Z_]+)=.*$", line, template, flags=re.MULTILINE)
    read = dotenv_values(stream=io.StringIO(text))
    if wrong := [name for name, value in taken.items() if read.get(name) != value]:
        message = f"The value of {', '.join(wrong)} cannot be written to a file of variables."
        raise SettingsError(message, "Percent-encode its special characters, such as ${ and line feeds.")
    return text


def _template(name: str) -> str:
    return files("pipeline.cli").joinpath(f"templates/{name}").read_text(encoding="utf-8")


def _jobs(folder: Path, dataset: Path, options: argparse.Namespace, is_embedded: bool) -> Iterator[tuple[Path, str]]:
    """Yield the files of the nightly jobs, with the paths of this machine."""
    programs = Path(sys.executable).parent
    paths = {"/srv/pipeline/.venv/bin": programs, "/srv/pipeline": folder, _DATASET: dataset}
    texts = {former: str(path).replace("%", "%%") if options.systemd else str(path) for former, path in paths.items()}
    texts |= {"BIN=.venv/bin": f"BIN={programs}", "User=pipeline": f"User={getpass.getuser()}"}
    if is_embedded:
        home = str(home_directory()).replace("%", "%%" if options.systemd else "%")
        line = 'Environment="{}={}"' if options.systemd else "{}={}"
        lines = line.format("DATASET_DIR", texts[_DATASET]), line.format("PIPELINE_HOME", home)
        texts = {"#@reboot": "@reboot", line.format("DATASET_DIR", _DATASET): "\n".join(lines), **texts}
    if not options.production:
        texts |= {" --production": "", ".env.production": ".env.local"}
    # In one pass: a new path may contain a former one.
    former = re.compile("|".join(map(re.escape, texts)))
    for name in UNITS if options.systemd else ("crontab.example",):
        text = former.sub(lambda found: texts[found[0]], _template(name))
        if shutil.which("flock") is None:  # the batch has a lock in the database as well
            text = re.sub(r"flock .*?load\.lock ", "", text)
        yield folder / "systemd" / name if options.systemd else folder / "crontab", text


def _write(planned: Mapping[Path, str]) -> tuple[list[str], list[str]]:
    """Write files, the settings for their owner alone; return which were written and which existed already."""
    written, kept = list[str](), list[str]()
    for path, text in planned.items():
        if os.path.lexists(path):
            kept.append(str(path))
            continue
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as file:
                file.write(text)
                if ".env" not in path.name:
                    os.fchmod(file.fileno(), 0o644)
        except OSError as exc:
            hint = remedy_of(exc) or "Check the owner of the folder."
            raise UsageError(f"{path} cannot be written: {exc.strerror}.", hint) from exc
        written.append(str(path))
    return written, kept


def _next_steps(options: argparse.Namespace, dataset: Path, is_embedded: bool, is_migrated: bool) -> Iterator[str]:
    if not is_migrated:  # `up` does that as well
        yield f"  {command_line('up' if is_embedded else 'migrate', options.production)}"
    source = "" if os.path.isdir(dataset) else " --source PATH"
    yield f"  {command_line(f'load --dry-run{source}', options.production)}"
    if source:
        yield f"  Name the dataset in place of {_DATASET}, in {'systemd/' if options.systemd else 'crontab'}."
    if options.systemd:
        if is_embedded:
            yield f"  Let each boot run `{command_line('up')}` before the timers."
        yield "  sudo cp systemd/* /etc/systemd/system/ && sudo systemctl daemon-reload"
        yield f"  sudo systemctl enable --now {' '.join(TIMERS)} pipeline-luigid.service"
    else:
        yield "  crontab crontab     (replaces the table of this user; else add its lines with crontab -e)"
