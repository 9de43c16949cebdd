"""The annotations file of a vision model as a stream of entries.

The file is one JSON object. A key is the path of a photo, with `recognition_<id>` and `Main` or `Qualifying` in it; its
value is

    {"dishes": {"qwen_detections": [{"bbox_2d": [x1, y1, x2, y2], "label": "dish_0"}, …]},
     "plates": {"qwen_detections": [{"bbox_2d": [x1, y1, x2, y2], "label": "plate"}, …]}}

A file has hundreds of megabytes, so only one value is in memory at a time. Instead of an object, a file can have one on
each line; it can be in a block of Markdown, and compressed with gzip.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.dataset.detections import photo_of
from pipeline.dataset.documents import uncollected, unique_keys
from pipeline.dataset.forms import FENCED, GZIP, LINES
from pipeline.dataset.kinds import JSON_OBJECT, kind_of
from pipeline.dataset.layout import MAXIMUM_DOCUMENT_BYTES, find_input, usual_sources
from pipeline.dataset.records import Deviation
from pipeline.errors import BadInput, UsageError

ANNOTATIONS = "qwen_annotations.json"

_CHUNK = 1 << 20
#: Characters that may be kept before a broken value: each error of the decoder counts the lines in them.
_CONSUMED = 1 << 14
#: A compressed file may unpack to so many bytes, or to so many times its size if that is more.
_UNPACKED, _RATIO = 32 << 20, 100
_NO_SPACE = re.compile(r"[^ \t\n\r]")
#: The first characters of values that say themselves where they end, and what ends the others.
_OPENING = '{["'
_DELIMITER = re.compile(r'[\s,{}\[\]"]')
_TOKEN = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_HEAD = 4096
#: So many lines may be empty before and between the first two objects of a file of lines.
_EMPTY_LINES = 1000
#: Fields of a line that name its photo, and those of a photo's detections.
_NAMES = ("image", "path", "key", "image_path", "file", "photo")
_SECTIONS = frozenset({"dishes", "plates"})
_CORRECT = "Create or copy it again; nothing was loaded."


@dataclass(frozen=True)
class Entry:
    """A member of the file's object, or of a line's: `size` is the bytes of its value or of the line, 0 if too large.

    With a `problem` the value is None. The key of a line that cannot be read is its number.
    """

    key: str
    size: int
    value: object
    problem: BadInput | None


def find_annotations(given: str | None, setting: str | None, dataset_dir: str | None) -> Path:
    """Return the annotations file: `given`, else the setting, else the first one in the default places.

    Raises what `find_input` raises.
    """
    name = given or setting
    if not name:
        folders = [os.path.expanduser(dataset_dir)] if dataset_dir else list(usual_sources())[:1]
        places = (*folders, "", *map(os.path.expanduser, ("~/Downloads", "~")))
        usual = (os.path.join(place, ANNOTATIONS) for place in places)
        name = next(filter(os.path.isfile, usual), None)  # False, not an error, if a folder cannot be searched
    looked_for = f"{ANNOTATIONS} in the dataset's folder, ., ~/Downloads and ~"
    return find_input("annotations file", "file", name, looked_for, "Name it with --file or QWEN_ANNOTATIONS.")


def read_entries(stream: BinaryIO, forms: set[Deviation]) -> Iterator[Entry]:
    """Yield the entries of an annotations file, in order, and add the forms that it has to `forms`.

    The file can be read from another position. Raises UsageError if it is neither one complete JSON object nor one on
    each line.
    """
    if stream.read(2) == b"\x1f\x8b":
        stream.seek(0)
        forms.add(GZIP)
        try:
            yield from _read_text(_Unpacked(stream), forms)
        except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
            why = str(exc).rstrip(".")
            raise UsageError(f"The annotations file is damaged gzip data: {why}.", _CORRECT) from exc
    else:
        stream.seek(0)
        yield from _read_text(stream, forms)


class _Unpacked(gzip.GzipFile):
    """A compressed file that raises UsageError once it unpacks to far more than it has bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._limit = max(_UNPACKED, _RATIO * stream.seek(0, os.SEEK_END))
        stream.seek(0)
        super().__init__(fileobj=stream)

    def read(self, size: int | None = -1) -> bytes:
        return self._checked(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._checked(super().readline(-1 if size is None else size))

    def _checked(self, chunk: bytes) -> bytes:
        if self.tell() > self._limit:
            raise UsageError(f"The annotations file unpacks to more than {self._limit} bytes.", _CORRECT)
        return chunk


def _read_text(stream: BinaryIO | gzip.GzipFile, forms: set[Deviation]) -> Iterator[Entry]:
    is_lines = _is_lines(stream)
    stream.seek(0)
    if is_lines:
        forms.add(LINES)
        for number, line in enumerate(iter(lambda: stream.readline(MAXIMUM_DOCUMENT_BYTES + 1), b""), 1):
            try:
                yield from _read_line(line)
            except BadInput as exc:
                yield Entry(f"line {number}", 0, None, exc)
            while len(line) > MAXIMUM_DOCUMENT_BYTES and not line.endswith(b"\n"):  # drop the rest of it
                line = stream.readline(MAXIMUM_DOCUMENT_BYTES + 1)
        return
    window = _Window(stream)
    is_fenced = window.peek() == "`"
    if is_fenced:
        forms.add(FENCED)
        window.expect_fence()
    window.expect("{", "an object")
    if window.peek() != "}":
        yield window.entry()
        while window.peek() != "}":
            window.expect(",", "a comma or a closing brace")
            yield window.entry()
    window.expect("}", "")
    if is_fenced:
        window.expect_fence()
    if window.peek():
        raise window.broken("something follows its end")


def _is_lines(stream: BinaryIO | gzip.GzipFile) -> bool:
    """Return whether the first line is a whole object, and another one follows or it names its photo in a field."""
    head = itertools.islice(iter(lambda: stream.readline(MAXIMUM_DOCUMENT_BYTES), b""), _EMPTY_LINES)
    lines = filter(bytes.strip, head)
    text = next(lines, b"").decode("utf-8-sig", "surrogateescape").strip()
    if not (text.startswith("{") and text.endswith("}")):
        return False
    value, end, problem = _parse(text, 0)
    if problem is not None or end != len(text) or not isinstance(value, dict):
        return False
    if following := next(lines, b""):
        return following.lstrip().startswith(b"{")
    return bool(_SECTIONS & value.keys()) and any(isinstance(value.get(name), str) for name in _NAMES)


def _read_line(line: bytes) -> list[Entry]:
    """Return the entries of a line: the members of its object, or the photo that it names in a field."""
    if len(line) > MAXIMUM_DOCUMENT_BYTES:
        raise BadInput("json_too_large", f"the line has more than {MAXIMUM_DOCUMENT_BYTES} bytes")
    text = line.decode("utf-8-sig", "surrogateescape").strip(" \t\n\r")
    if not text:
        return []
    value, end, problem = _parse(text, 0)
    if problem is not None:
        raise problem
    if end < len(text) or not isinstance(value, dict):
        raise BadInput("json_broken", "the line is not one whole JSON object")
    photos = [value[field] for field in _NAMES if isinstance(value.get(field), str)]
    if len(photos) > 1:
        raise BadInput("annotation_key", "the line names its photo in several fields")
    if photos:
        rest = {field: one for field, one in value.items() if field not in _NAMES}
        is_only = len(rest) == 1 and not _SECTIONS & rest.keys()  # a field that has the detections
        return [Entry(photos[0], _size(text), next(iter(rest.values())) if is_only else rest, None)]
    if len(value) > 1 and not any(map(_is_photo, value)):
        raise BadInput("annotation_key", "the line names no photo")
    return [Entry(key, _size(text), one, None) for key, one in value.items()]


def _is_photo(key: str) -> bool:
    try:
        return bool(photo_of(key))
    except BadInput:
        return False


class _Window:
    """The text of the file that is read and not yet consumed."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile) -> None:
        self._stream = stream
        self._head = b""
        # Bytes that are not UTF-8 become surrogates, which make one entry unusable instead of the file.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at = "", 0
        self._is_ended = False  # whether the stream is read to its end
        self._is_begun = False  # whether the beginning was as expected
        self._offset = 0  # of the text in the file, in bytes
        if self.peek() == "\ufeff":
            self._at += 1

    def _fill(self) -> bool:
        """Drop what is consumed and read the next chunk; return whether there was one."""
        if self._is_ended:
            return False
        chunk = self._stream.read(_CHUNK)
        self._is_ended = not chunk
        self._head = self._head or chunk[:_HEAD]
        more = self._decoder.decode(chunk, final=not chunk)
        self._drop()
        self._text += more
        return bool(chunk or more)

    def _drop(self) -> None:
        """Drop what is consumed."""
        self._offset += _size(self._text[: self._at])
        self._text, self._at = self._text[self._at :], 0

    def peek(self) -> str:
        """Skip white space and return the next character, empty at the end of the file."""
        while (match := _NO_SPACE.search(self._text, self._at)) is None:
            self._at = len(self._text)
            if not self._fill():
                return ""
        self._at = match.start()
        return match[0]

    def expect(self, letter: str, what: str) -> None:
        """Consume the next character, which must be `letter`."""
        if self.peek() != letter:
            raise self._missing(what)
        self._at += 1

    def expect_fence(self) -> None:
        """Consume an outer line of a block of Markdown: three backquotes, and perhaps the name of a language."""
        for _ in range(3):
            self.expect("`", "a line of three backquotes")
        while self.peek().isalpha():
            self._at += 1

    def broken(self, why: str, back: int = 0) -> UsageError:
        """Return the error for invalid syntax, so many bytes before the current position."""
        position = self._offset + _size(self._text[: self._at]) - back
        what = "" if self._is_begun else kind_of(self._head).replace(JSON_OBJECT, "")
        message = f"The annotations file is not a JSON object: at byte {position}, {why}"
        return UsageError(f"{message}{f'; the file is {what}' if what else ''}.", _CORRECT)

    def _missing(self, what: str) -> UsageError:
        return self.broken(f"{what} is missing" if self.peek() else "it ends too early")

    def entry(self) -> Entry:
        """Consume a member of the file's object."""
        if self.peek() != '"':
            raise self._missing("a key")
        _, key, problem = self.value()
        if problem is not None or not isinstance(key, str):
            raise self.broken("a key is broken")
        self.expect(":", "a colon")
        self._is_begun = True
        return Entry(key, *self.value())

    def value(self) -> tuple[int, object, BadInput | None]:
        """Consume a value; return its bytes, the value, and the problem that makes it unusable."""
        if self.peek() in ("", ",", "}", "]"):
            raise self._missing("a value")
        while True:
            value, end, problem = _parse(self._text, self._at)
            # What is cut at the end of the window is broken as well, and may be whole with the next chunk.
            if problem is None or len(self._text) - self._at > MAXIMUM_DOCUMENT_BYTES or not self._fill():
                break
        if problem is not None and self._at > _CONSUMED:
            self._drop()
        size = self._take(end) if problem is None else self._skip()
        if size > MAXIMUM_DOCUMENT_BYTES:
            return 0, None, BadInput("json_too_large", f"the value has more than {MAXIMUM_DOCUMENT_BYTES} bytes")
        return size, value, problem

    def _take(self, end: int) -> int:
        """Move to `end`; return the bytes in between."""
        size = _size(self._text[self._at : end])
        self._at = end
        return size

    def _skip(self) -> int:
        """Consume a value that is not JSON, or not read, by its brackets and quotes; return its bytes."""
        pattern = _TOKEN if self._text[self._at] in _OPENING else _DELIMITER
        size = depth = 0
        in_string = False
        while True:
            for match in pattern.finditer(self._text, self._at):
                if pattern is _DELIMITER:
                    return size + self._take(match.start())
                token = match[0]
                if token == '"':
                    in_string = not in_string
                elif not in_string and token in "{[":
                    depth += 1
                elif not in_string and token in "}]":
                    depth -= 1
                if not depth and not in_string:
                    return size + self._take(match.end())
            # A backslash at the end escapes the first character of the next chunk.
            cut = (len(self._text) - len(self._text.rstrip("\\"))) % 2
            size += self._take(len(self._text) - cut)
            if not self._fill():
                raise self.broken("it ends too early", size)


def _size(text: str) -> int:
    """Return the bytes of a text in the file."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
#: For values with an integer of thousands of digits, which int() rejects; float() makes it infinite.
_FLOAT_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_int=float)


def _parse(text: str, start: int, decoder: json.JSONDecoder = _DECODER) -> tuple[object, int, BadInput | None]:
    """Return the value that begins at `start`, its end, and its problem if it is not JSON."""
    try:
        with uncollected():
            value, end = decoder.raw_decode(text, start)
        if text[start] not in _OPENING and not _DELIMITER.match(text, end):
            raise json.JSONDecodeError("Extra data", text, end)  # the first part of a number is also a number
    except json.JSONDecodeError as exc:
        return None, start, BadInput("json_broken", f"the value is not JSON: {exc.msg}")
    except BadInput as exc:
        return None, start, exc
    except RecursionError:
        return None, start, BadInput("json_shape", "the value is nested too deeply")
    except ValueError:
        return _parse(text, start, _FLOAT_DECODER)
    return value, end, None
