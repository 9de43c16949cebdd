"""The annotations file of a vision model as a stream of entries.

The file is one JSON object. A key is the path of a photo, with `recognition_<id>` and `Main` or `Qualifying` in it; its
value is

    {"dishes": {"qwen_detections": [{"bbox_2d": [x1, y1, x2, y2], "label": "dish_0"}, …]},
     "plates": {"qwen_detections": [{"bbox_2d": [x1, y1, x2, y2], "label": "plate"}, …]}}

with corners in pixels. A file has hundreds of megabytes, so only one value is in memory at a time. The standard
library's decoder is the fastest for values of a few kilobytes, and returns where a value ends.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.dataset.documents import MAXIMUM_DEPTH
from pipeline.dataset.layout import MAXIMUM_DOCUMENT_BYTES, usual_sources
from pipeline.dataset.records import is_text
from pipeline.errors import BadInput, UsageError

ANNOTATIONS = "qwen_annotations.json"

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"[^\s,{}\[\]\"]*")
_TOKEN = re.compile(r'\\.|["{}\[\]]', re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """A member of the file's object.

    Attributes:
        key: the path of the photo.
        size: bytes of its value; 0 if it is too large.
        value: the parsed value, None with a `problem`.
        problem: the syntax error or limit that makes the value unusable.
    """

    key: str
    size: int
    value: object
    problem: BadInput | None


def find_annotations(given: str | None, setting: str | None, dataset_dir: str | None) -> Path:
    """Return the annotations file: `given`, else the setting, else the first one in the default places.

    Raises:
        UsageError: there is none, it is not a file, or it cannot be read.
    """
    if given or setting:
        return named_annotations(given or setting or "")
    folders = [os.path.expanduser(dataset_dir)] if dataset_dir else list(usual_sources())[:1]
    for folder in (*folders, "", Path.home() / "Downloads", Path.home()):
        path = os.path.join(folder, ANNOTATIONS)
        if os.path.isfile(path):  # False, not an error, if a folder cannot be searched
            return named_annotations(path)
    raise UsageError(
        f"No annotations file was named and none was found: looked for {ANNOTATIONS} in the dataset's folder, ., "
        "~/Downloads and ~.",
        "Name it with --file or QWEN_ANNOTATIONS.",
    )


def named_annotations(text: str) -> Path:
    """Return the file that a text names, as an absolute path.

    Raises:
        UsageError: it does not exist, is not a file, or cannot be read.
    """
    hint = "Name it with --file or QWEN_ANNOTATIONS."
    shown = text.encode(errors="replace").decode()[:200]
    if not is_text(text):
        raise UsageError(f"The path of the annotations file, {shown}, is not UTF-8.", hint)
    try:
        path = Path(text).expanduser().resolve()
        if path.exists() and not path.is_file():
            raise UsageError(f"The annotations file {shown} is not a file.", hint)
        with open(path, "rb"):
            return path
    except (OSError, RuntimeError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise UsageError(f"The annotations file {shown} cannot be read: {why}.", hint) from exc


def read_entries(stream: BinaryIO) -> Iterator[Entry]:
    """Yield the entries of an annotations file, in order.

    Raises:
        UsageError: the file is not one complete JSON object.
    """
    window = _Window(stream)
    window.expect("{", "an object")
    if window.peek() == "}":
        window.expect("}", "")
    else:
        while True:
            key = window.string()
            window.expect(":", "a colon")
            yield window.entry(key)
            if window.peek() == "}":
                window.expect("}", "")
                break
            window.expect(",", "a comma or a closing brace")
    if window.peek():
        raise window.broken("something follows its end")


class _Window:
    """The text of the file from the current position on, as far as it is read, and the position in bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        # Bytes that are not UTF-8 become surrogates, which make one entry unusable instead of the file.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._at = 0
        self._ended = False
        self._position = 0
        if self.peek() == "\ufeff":
            self._advance(self._at + 1)

    def _fill(self) -> bool:
        """Read the next chunk; return whether there was one."""
        if self._ended:
            return False
        chunk = self._stream.read(_CHUNK)
        self._ended = not chunk
        more = self._decoder.decode(chunk, final=self._ended)
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(chunk or more)

    def _advance(self, end: int) -> int:
        """Move to `end`; return the bytes in between."""
        passed = self._text[self._at : end]
        size = len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogateescape"))
        self._position += size
        self._at = end
        return size

    def peek(self) -> str:
        """Skip white space and return the next character, empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None  # the pattern matches an empty string
            self._advance(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def expect(self, letter: str, what: str) -> None:
        """Consume the next character, which must be `letter`."""
        found = self.peek()
        if found != letter:
            raise self.broken(f"{what} is missing" if found else "it ends too early")
        self._advance(self._at + 1)

    def broken(self, why: str) -> UsageError:
        """Return the error for invalid syntax at the current position."""
        return UsageError(
            f"The annotations file is not a JSON object: at byte {self._position}, {why}.",
            "Create or copy it again; nothing was loaded.",
        )

    def string(self) -> str:
        """Consume and return a key."""
        if self.peek() != '"':
            raise self.broken("a key is missing" if self.peek() else "it ends too early")
        entry = self.entry("")
        if entry.problem is not None or not isinstance(entry.value, str):
            raise self.broken("a key is broken")
        return entry.value

    def entry(self, key: str) -> Entry:
        """Consume and return a value; find the end of one that is not JSON by its brackets and quotes."""
        if not self.peek():
            raise self.broken("it ends too early")
        while True:
            value, end, problem = self._parse()
            if (end or len(self._text)) - self._at > MAXIMUM_DOCUMENT_BYTES:
                self._skip()
                return Entry(key, 0, None, _too_large())
            if end is not None:
                size = self._advance(end)
                if size > MAXIMUM_DOCUMENT_BYTES:
                    return Entry(key, 0, None, _too_large())
                return Entry(key, size, value, problem)
            if self._ended:
                raise self.broken("it ends too early")
            self._fill()

    def _parse(self) -> tuple[object, int | None, BadInput | None]:
        """Return the current value, its end (None if more text is needed), and its problem."""
        at = self._at
        if self._text[at] not in '{["':
            # The first part of a number is also a number, so find the end first.
            end = _Brackets().find_end(self._text, at)[0]
            if end is None and self._ended:
                end = len(self._text)
            try:
                return (None if end is None else _decode(self._text[at:end])), end, None
            except json.JSONDecodeError as exc:
                return None, end, _broken(exc)
        try:
            value, end = _raw_decode(self._text, at)
            _require_depth(self._text, at, end)
        except BadInput as exc:
            return None, end, exc.with_traceback(None)
        except RecursionError:
            return None, _Brackets().find_end(self._text, at)[0], _too_deep()
        except json.JSONDecodeError as exc:
            return None, _Brackets().find_end(self._text, at)[0], _broken(exc)
        return value, end, None

    def _skip(self) -> None:
        brackets = _Brackets()
        while True:
            end, resume = brackets.find_end(self._text, self._at)
            self._advance(end if end is not None else resume)
            if end is not None:
                return
            if not self._fill():
                raise self.broken("it ends too early")


def _whole(digits: str) -> float:
    # int() rejects thousands of digits; such a coordinate is out of range anyway.
    return int(digits) if len(digits) < 20 else float(digits)


# parse_int doubles the time, so it is used only for values with a number that int() rejects.
_DECODER = json.JSONDecoder()
_LONG_INT_DECODER = json.JSONDecoder(parse_int=_whole)


def _decode(text: str) -> object:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _LONG_INT_DECODER.decode(text)


def _raw_decode(text: str, start: int) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _LONG_INT_DECODER.raw_decode(text, start)


class _Brackets:
    """Find the end of a value, JSON or not, by its brackets and quotes, over several chunks of text."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._in_scalar = False

    def find_end(self, text: str, start: int) -> tuple[int | None, int]:
        """Return where the value ends (None if more text is needed), and where to continue."""
        if self._in_scalar or (not self._depth and not self._in_string and text[start] not in '{["'):
            match = _SCALAR.match(text, start)
            assert match is not None  # the pattern matches an empty string
            end = match.end() if self._in_scalar else max(match.end(), start + 1)
            self._in_scalar = True
            return (end if end < len(text) else None), end
        for match in _TOKEN.finditer(text, start):
            letter = match[0]
            if letter == '"':
                self._in_string = not self._in_string
            elif self._in_string or letter.startswith("\\"):
                continue
            else:
                self._depth += 1 if letter in "{[" else -1
            if not self._depth and not self._in_string:
                return match.end(), match.end()
        # A backslash at the end escapes the first character of the next chunk.
        cut = (len(text) - len(text.rstrip("\\"))) % 2 if self._in_string else 0
        return None, len(text) - cut


def _require_depth(text: str, start: int, end: int) -> None:
    """Raise BadInput if brackets are nested more deeply than a parser's stack may allow."""
    if text.count("{", start, end) + text.count("[", start, end) <= MAXIMUM_DEPTH:
        return
    depth = 0
    in_string = False
    for match in _TOKEN.finditer(text, start, end):
        letter = match[0]
        if letter == '"':
            in_string = not in_string
        elif not in_string:
            depth += 1 if letter in "{[" else -1
            if depth > MAXIMUM_DEPTH:
                raise _too_deep()


def _too_deep() -> BadInput:
    return BadInput("json_shape", "the value is nested too deeply")


def _too_large() -> BadInput:
    return BadInput("json_too_large", f"the value has more than {MAXIMUM_DOCUMENT_BYTES} bytes")


def _broken(exc: json.JSONDecodeError) -> BadInput:
    return BadInput("json_broken", f"the value is not JSON: {exc.msg}")
