"""Render the page with autoescaping, under a Content-Security-Policy that blocks every network request."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import IO, Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from pipeline.errors import printable
from pipeline.report.charts import Chart, milliseconds
from pipeline.units import duration, moment

#: Allows inline styles and data: images only. There is no script-src, so default-src blocks scripts.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write_page(out: IO[str], values: Mapping[str, Any]) -> None:
    """Write the page as a stream, so that an iterator in `values` is consumed one element at a time.

    Every string is untrusted: it is escaped, and control and bidirectional formatting characters are made visible.
    """
    style = Markup(_text("page.css"))
    for piece in _environment().get_template("page.html").generate(**values, style=style, policy=POLICY):
        out.write(piece)


def draw_chart(chart: Chart) -> Markup:
    """Return the figure of a chart: its title, its SVG, the legend and the caption."""
    macros: Any = _environment().get_template("chart.html").module
    return Markup(macros.chart(chart))


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
    environment.globals["chart"] = draw_chart
    environment.filters.update(count=_count, duration=duration, ms=milliseconds, time=moment)
    return environment


def _text(name: str) -> str:
    return files("pipeline.report").joinpath(name).read_text(encoding="utf-8")


def _finalize(value: object) -> object:
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def _count(number: int) -> str:
    return f"{number:,}"
