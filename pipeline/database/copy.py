"""The text format of COPY (PostgreSQL manual, COPY, File Formats): rows -> lines -> a stream for the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


class CopySource:
    """A readable file over lines in the text format of COPY (PostgreSQL manual, COPY, File Formats)."""

    #: What libpq sends at once: while the server is at it, the next lines are made.
    CHUNK = 1 << 13

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)
        self.failure: BaseException | None = None

    def read(self, size: int = CHUNK) -> bytes:
        """Return whole lines of about `size` bytes together, nothing at the end; psycopg2 takes longer ones too."""
        try:
            return self._read(size)
        except BaseException as exc:
            self.failure = exc
            raise

    def _read(self, size: int) -> bytes:
        lines = []
        length = 0
        for line in self._lines:
            lines.append(line)
            length += len(line)
            if length >= size:
                break
        return b"".join(lines)

    def readline(self, size: int = CHUNK) -> bytes:
        """Return the same as `read`: the driver asks for a file, and uses `read` only."""
        return self.read(size)


def line_of(row: Sequence[object]) -> bytes:
    """Return a row, of values that `copy_in` takes, as a line for `copy_lines`."""
    return b"\t".join([_FORMATS[value.__class__](value) for value in row]) + b"\n"


def _escaped(text: bytes) -> bytes:
    # Most texts need nothing, and to look for a letter is many times cheaper than translate().
    if b"\\" in text:
        text = text.replace(b"\\", b"\\\\")
    if b"\t" in text:
        text = text.replace(b"\t", b"\\t")
    if b"\n" in text:
        text = text.replace(b"\n", b"\\n")
    if b"\r" in text:
        text = text.replace(b"\r", b"\\r")
    return text


def _array(values: Sequence[object]) -> bytes:
    return _escaped(f"{{{','.join(map(_element, values))}}}".encode())


class _Formats(dict[type, Callable[[Any], bytes]]):
    """What makes a field of a value, by its type: looked up for every value, and found out for the first of a type."""

    def __missing__(self, kind: type) -> Callable[[Any], bytes]:
        made = next((self[known] for known in (str, list, tuple) if issubclass(kind, known)), _plain)
        self[kind] = made
        return made


def _plain(value: object) -> bytes:
    return str(value).encode()


_FORMATS = _Formats()
_FORMATS[str] = lambda text: _escaped(text.encode())
_FORMATS[bytes] = _escaped
_FORMATS[int] = lambda number: b"%d" % number
_FORMATS[type(None)] = lambda _: rb"\N"
_FORMATS[list] = _FORMATS[tuple] = _array


def _element(value: object) -> str:
    if value is None:
        return "NULL"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
