"""The page: a template that escapes whatever it is given, and a policy that lets nothing reach the network."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from importlib.resources import files
from typing import IO, Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from pipeline.observe.logger import printable
from pipeline.report.charts import WIDTH, milliseconds
from pipeline.units import duration

#: A Content-Security-Policy that forbids everything but the styles and the pictures in the page; it has no scripts.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write_page(out: IO[str], values: Mapping[str, Any]) -> None:
    """Write the page piece by piece; of what `values` has as an iterator, one element is in memory at a time.

    Every text in it is untrusted: it is escaped, and its control characters, those that turn the direction of writing
    round included, are shown.
    """
    template = _environment().get_template("page.html")
    style = Markup(_text("page.css"))
    for piece in template.generate(**values, style=style, chart_width=WIDTH, policy=POLICY):
        out.write(piece)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_text),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=_count, duration=duration, ms=milliseconds, time=_time)
    return environment


def _text(name: str) -> str:
    return files("pipeline.report").joinpath(name).read_text(encoding="utf-8")


def _finalize(value: object) -> object:
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def _count(number: int) -> str:
    return f"{number:,}"


def _time(moment: str) -> str:
    """Return a moment in ISO 8601 as it is read, in UTC."""
    return datetime.fromisoformat(moment).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
