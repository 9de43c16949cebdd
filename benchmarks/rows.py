"""What a measurement says: rows of ours beside a reference of the same run, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import memory_of_machine


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        what: what was measured, and against what.
        ours: the number of the pipeline.
        reference: the number of a peer or a limit, of the same run.
        unit: of both.
    """

    what: str
    ours: float
    reference: float
    unit: str

    @property
    def ratio(self) -> float:
        """Return ours in units of the reference."""
        return self.ours / self.reference


def middle(what: str, pairs: Iterable[tuple[float, float]], unit: str) -> Row:
    """Return the row of the (ours, reference) whose ratio is the median; each pair was measured back to back."""
    ordered = sorted(pairs, key=lambda pair: pair[0] / pair[1])
    return Row(what, *ordered[len(ordered) // 2], unit)


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processors": os.cpu_count() or 1,
        "memory_gb": round(memory_of_machine() / 1e9, 1),
    }


def as_table(title: str, rows: Sequence[Row], seconds: float) -> str:
    """Return rows as text, aligned, below a title."""
    lines = [("", "ours", "reference", "", "ratio")]
    lines += [(row.what, _number(row.ours), _number(row.reference), row.unit, f"{row.ratio:.3f}") for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    text = [f"{title} ({seconds:.0f} s)"]
    for what, ours, reference, unit, ratio in lines:
        text.append(
            f"  {what:<{widths[0]}}  {ours:>{widths[1]}}  {reference:>{widths[2]}} {unit:<{widths[3]}}"
            f"  {ratio:>{widths[4]}}"
        )
    return "\n".join(text)


def _number(value: float) -> str:
    for digits, bound in ((0, 1000), (1, 10)):
        if abs(value) >= bound:
            return f"{value:,.{digits}f}"
    return f"{value:.3f}"


def write_json(path: Path, size: str, questions: Sequence[tuple[str, str, Sequence[Row]]]) -> None:
    """Write the machine and all rows, by the name and title of their question."""
    found = [
        {"name": name, "title": title, "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
        for name, title, rows in questions
    ]
    content = {"machine": machine(), "size": size, "command": sys.argv[1:], "questions": found}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
