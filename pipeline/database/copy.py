"""The text format of COPY (PostgreSQL manual, COPY, File Formats): rows -> lines -> a stream for the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

#: The backslash first.
_ESCAPES = ((b"\\", rb"\\"), (b"\t", rb"\t"), (b"\n", rb"\n"), (b"\r", rb"\r"))


class CopySource:
    """A readable file of lines in the text format of COPY."""

    #: The bytes that libpq sends at once; while the server reads them, the next lines are made.
    CHUNK = 1 << 13

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)
        self.failure: BaseException | None = None

    def read(self, size: int = CHUNK) -> bytes:
        """Return whole lines, of at least `size` bytes together if there are any more."""
        lines = []
        length = 0
        try:
            for line in self._lines:
                lines.append(line)
                length += len(line)
                if length >= size:
                    break
        except BaseException as exc:
            self.failure = exc
            raise
        return b"".join(lines)

    #: types-psycopg2 requires it; the driver calls only `read`.
    readline = read


def line_of(row: Sequence[object]) -> bytes:
    """Return a row as a line: None, str, bytes (UTF-8), int, float, bool, or a list or tuple of those except bytes."""
    return b"\t".join([_FORMATS.get(value.__class__, _other)(value) for value in row]) + b"\n"


def _escaped(text: bytes) -> bytes:
    for character, escape in _ESCAPES:
        text = text.replace(character, escape)
    return text


def _element(value: object) -> str:
    if value is None:
        return "NULL"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _other(value: object) -> bytes:
    text = f"{{{','.join(map(_element, value))}}}" if isinstance(value, (list, tuple)) else str(value)
    return _escaped(text.encode())


_FORMATS: dict[type, Callable[[Any], bytes]] = {
    str: lambda text: _escaped(text.encode()),
    bytes: _escaped,
    int: lambda number: b"%d" % number,
    type(None): lambda _: rb"\N",
}
