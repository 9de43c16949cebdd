"""The annotations file as a stream of entries, whatever it contains."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import annotations as module
from pipeline.dataset.annotations import Entry, read_entries
from pipeline.dataset.detections import detections_of, photo_of
from pipeline.dataset.layout import MAXIMUM_DOCUMENT_BYTES
from pipeline.errors import BadInput, UsageError
from tests.annotations_support import STEADY, attempt, box, key_of, value_of

A_CHUNK = module._CHUNK


def stream(content: bytes, chunk: int = A_CHUNK, maximum: int = MAXIMUM_DOCUMENT_BYTES) -> list[Entry]:
    """Read a file in pieces of so many bytes."""
    with patch.object(module, "_CHUNK", chunk), patch.object(module, "MAXIMUM_DOCUMENT_BYTES", maximum):
        return list(read_entries(io.BytesIO(content), set()))


def look(content: bytes, chunk: int = A_CHUNK, maximum: int = MAXIMUM_DOCUMENT_BYTES) -> list[tuple[str, object]]:
    """Return of each entry its key with its value, or with the code of its problem."""
    entries = stream(content, chunk, maximum)
    return [(entry.key, entry.problem.code if entry.problem else entry.value) for entry in entries]


# The file as a whole


def test_an_entry_is_its_key_its_value_and_its_size() -> None:
    content = b'{\n  "first": {"a": [1, 2.5]} ,\n\t"\xd0\xb1\xd0\xbb\xd1\x8e\xd0\xb4\xd0\xbe":[ ]\r\n}\n'
    assert stream(content) == [
        Entry("first", 15, {"a": [1, 2.5]}, None),
        Entry("блюдо", 3, [], None),
    ]


@pytest.mark.parametrize("content", [b"{}", b" { } ", b"\n{\n}\n", b"\xef\xbb\xbf{}"])
@pytest.mark.parametrize("chunk", [1, 2, A_CHUNK])
def test_a_file_without_entries(content: bytes, chunk: int) -> None:
    assert stream(content, chunk) == []


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, A_CHUNK])
def test_a_byte_order_mark_is_passed(chunk: int) -> None:
    [entry] = stream(b'\xef\xbb\xbf{"a": "b"}', chunk)
    assert (entry.key, entry.value, entry.size) == ("a", "b", 3)


BAD_FILES = {
    "empty": b"",
    "only white space": b" \n\t\r\n ",
    "only a byte order mark": b"\xef\xbb\xbf",
    "two byte order marks": b'\xef\xbb\xbf\xef\xbb\xbf{"a": 1}',
    "no JSON": b"key,value\n1,2\n",
    "gzip in gzip": gzip.compress(gzip.compress(b'{"a": 1}')),
    "a photo": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-16 without a mark": '{"a": 1}'.encode("utf-16-le"),
    "UTF-16, big end first": '{"a": 1}'.encode("utf-16-be"),
    "UTF-32": '{"a": 1}'.encode("utf-32"),
    "an array": b'[{"a": 1}]',
    "a string": b'"{}"',
    "a number": b"12",
    "null": b"null",
    "a brace alone": b"{",
    "the wrong bracket": b'{"a": 1]',
    "a trailing comma": b'{"a": 1,}',
    "a comma alone": b"{,}",
    "two commas": b'{"a": 1,,"b": 2}',
    "no comma": b'{"a": 1 "b": 2}',
    "no colon": b'{"a" 1}',
    "two colons": b'{"a":: 1}',
    "no value": b'{"a"}',
    "a key without quotes": b"{a: 1}",
    "a key in single quotes": b"{'a': 1}",
    "a number as a key": b"{1: 1}",
    "an array as a key": b"{[]: 1}",
    "null as a key": b"{null: 1}",
    "a key with a wrong escape": b'{"\\x": 1}',
    "a key with half an escape": b'{"\\u00": 1}',
    "a key over two lines": b'{"a\nb": 1}',
    "a key with the byte NUL": b'{"a\0b": 1}',
    "a comment": b'{"a": 1} // the end',
    "a comment before": b'/* annotations */ {"a": 1}',
    "two objects on a line": b'{"a": 1} {"b": 2}\n',
    "an object over two lines, and another one": b'{"a":\n 1}\n{"b": 2}\n',
    "a brace too many": b'{"a": 1}}',
    "a byte at the end": b'{"a": 1}\0',
    "a letter that is cut at the end": b'{"a": 1}\xe2\x82',
    "no UTF-8 at the end": b'{"a": 1}\xff',
    "another white space": '{"a":\u00a01}'.encode(),
    "a brace that is never closed": b'{"a": {"b": 1}, "c": {"d": 2}',
    "a string that is never closed": b'{"a": "b}',
}


@pytest.mark.parametrize("chunk", [1, 7, A_CHUNK])
@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_not_one_object(content: bytes, chunk: int) -> None:
    with pytest.raises(UsageError, match=r"^The annotations file is not a JSON object: at byte [0-9]+, ") as caught:
        stream(content, chunk)
    assert caught.value.hint
    assert caught.value.message.isprintable()


def test_the_error_tells_the_byte() -> None:
    with pytest.raises(UsageError, match="at byte 20, a comma or a closing brace is missing"):
        stream('{"ключ": [1, 2] "b": 1}'.encode())
    with pytest.raises(UsageError, match="at byte 9, something follows its end"):
        stream(b'{"a": 1} x')
    with pytest.raises(UsageError, match="at byte 0, it ends too early"):
        stream(b"")


WHOLE = '{"a\\u0444\\"": {"x": ["б\\\\", 1.5e3, {"€": "\\ud83d\\ude00"}]}, "ключ": [true, null]}'.encode()


@pytest.mark.parametrize("chunk", [1, 2, 3, A_CHUNK])
def test_a_file_that_was_cut_at_any_byte_is_refused(chunk: int) -> None:
    assert len(stream(WHOLE, chunk)) == 2
    for end in range(len(WHOLE)):
        with pytest.raises(UsageError, match="at byte"):
            stream(WHOLE[:end], chunk)


def test_what_comes_before_the_cut_is_not_held_back() -> None:
    entries = read_entries(io.BytesIO(b'{"a": [1], "b": [2], "c'), set())
    assert [next(entries).key, next(entries).key] == ["a", "b"]
    with pytest.raises(UsageError, match="at byte 21, it ends too early"):
        next(entries)


def test_a_key_of_millions_of_letters_is_refused() -> None:
    with pytest.raises(UsageError, match="a key is broken"):
        stream(b'{"' + b"a" * (MAXIMUM_DOCUMENT_BYTES + 10) + b'": 1}')


# One entry

BROKEN_VALUES = {
    "no value in it": '{"dishes": }',
    "a trailing comma": "[1, 2,]",
    "two commas": "[1,, 2]",
    "no comma": "[1 2]",
    "no colon": '{"a" 1}',
    "a key without quotes": "{a: 1}",
    "single quotes": "{'a': 'b'}",
    "the wrong bracket": "[1}",
    "an unknown word": '{"a": [nil]}',
    "a number with a leading plus": "[+1]",
    "a number with a leading zero": "[01]",
    "a number without digits": "[-]",
    "a wrong escape": '{"a": "\\x"}',
    "half an escape": '{"a": ["\\u12"]}',
    "a tab in a string": '["a\tb"]',
    "the byte NUL in a string": '["a\0b"]',
    "the byte NUL": "[\0]",
    "a word": "none",
    "half a word": "tru",
    "a string with a wrong escape": '"\\q, }"',
    "a comment": "[1 /* one */]",
    "Cyrillic": "[да]",
}


@pytest.mark.parametrize("value", BROKEN_VALUES.values(), ids=BROKEN_VALUES)
def test_a_value_that_is_no_json_is_one_problem_and_no_more(value: str) -> None:
    content = f'{{"a": [1], "b": {value}, "c": {{"d": 2}}, "e": {value} }}'.encode()
    for chunk in (*range(1, len(content) + 1), A_CHUNK):
        entries = stream(content, chunk)
        assert [entry.key for entry in entries] == ["a", "b", "c", "e"]
        assert [entry.value for entry in entries] == [[1], None, {"d": 2}, None]
        size = len(value.encode())
        assert [entry.size for entry in entries] == [3, size, 8, size]
        assert [entry.problem and entry.problem.code for entry in entries] == [None, "json_broken", None, "json_broken"]


SCALARS = [
    "true",
    "false",
    "null",
    "0",
    "-1",
    "12.25",
    "-0.5e-3",
    "1E5",
    "1e+5",
    '""',
    '"a, }"',
    '"\\"\\\\"',
    '"\\u0416"',
]


@pytest.mark.parametrize("value", SCALARS)
def test_a_value_that_is_no_object_is_read_wherever_a_chunk_ends(value: str) -> None:
    content = f'{{"a":{value},"b": {value} ,"c":{value}}}'.encode()
    wanted = [(key, json.loads(value)) for key in "abc"]
    for chunk in range(1, len(content) + 1):
        assert look(content, chunk) == wanted


def test_letters_escapes_and_brackets_are_read_wherever_a_chunk_ends() -> None:
    whole = stream(WHOLE)
    assert [(entry.key, entry.value) for entry in whole] == [
        ('aф"', {"x": ["б\\", 1500.0, {"€": "\U0001f600"}]}),
        ("ключ", [True, None]),
    ]
    for chunk in range(1, len(WHOLE) + 1):
        assert stream(WHOLE, chunk) == whole


ODD = 'бж€\U0001f600\\\\\\"\\u0444\\ud83d\\ude00}]{[,:é'


@pytest.mark.parametrize("before", range(len(ODD.encode()) + 1))
def test_what_lies_across_the_end_of_a_real_chunk_is_read(before: int) -> None:
    head, tail = b'{"a": "', f'{ODD}", "b": ["{ODD}"]}}'.encode()
    content = head + b"x" * (A_CHUNK - len(head) - before) + tail
    assert len(content) - len(tail) + before == A_CHUNK
    first, second = stream(content)
    letters = json.loads(f'"{ODD}"')
    assert first.value == "x" * (A_CHUNK - len(head) - before) + letters
    assert (second.key, second.value) == ("b", [letters])
    assert second.size == len(f'["{ODD}"]'.encode())


@pytest.mark.parametrize("depth", [90, 500, 900, 940, 960, 980, 990, 5000, 300_000])
def test_a_value_that_is_nested_deeply_is_read_or_one_problem(depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    first, last = stream(b'{"deep": ' + nested + b', "after": 1}')
    assert (last.key, last.value) == ("after", 1)
    assert first.size == len(nested)
    if first.problem is not None:
        assert depth > 90
        assert first.problem.code == "json_shape"
        assert "nested too deeply" in first.problem.message


@pytest.mark.parametrize("opening", ['{"a":', '[{"a":[', '["', '{"a": ['])
def test_a_value_that_is_nested_deeply_and_broken_is_one_problem(opening: str) -> None:
    depth = 20_000
    closing = "".join({"[": "]", "{": "}"}.get(letter, "") for letter in reversed(opening))
    nested = opening.replace('["', '[["",') * depth + closing.replace("]", "]]", opening == '["') * depth
    entries = stream(f'{{"deep": {nested}, "after": 1}}'.encode())
    assert [entry.key for entry in entries] == ["deep", "after"]
    assert entries[0].problem is not None


def test_equal_keys_are_all_told_in_their_order() -> None:
    assert look(b'{"a": 1, "b": 2, "a": 3, "\\u0061": 4}') == [("a", 1), ("b", 2), ("a", 3), ("a", 4)]


def test_equal_keys_within_a_value_make_it_unusable() -> None:
    assert look(b'{"a": {"dishes": 1, "dishes": 2}, "b": 1}') == [("a", "json_broken"), ("b", 1)]


def test_escapes_in_a_key_are_resolved() -> None:
    [entry] = stream(b'{"x\\\\recognition\\u005f7\\/\\u004dain \\ud83d\\ude00": []}')
    assert entry.key == "x\\recognition_7/Main \U0001f600"
    assert photo_of(entry.key) == (7, 1)


@pytest.mark.parametrize("chunk", [1, 2, 5, A_CHUNK])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\xaf"])
def test_bytes_that_are_no_utf8_spoil_their_entry_alone(bad: bytes, chunk: int) -> None:
    good = json.dumps(value_of(box()), ensure_ascii=False).encode()
    spoilt = good.replace(b"dish_0", b"dish_0" + bad)
    name = key_of(7).encode()
    content = b'{"' + name + bad + b'": ' + good + b', "x": ' + spoilt + b', "' + name + b'": ' + good + b"}"
    first, second, third = stream(content, chunk)
    assert [entry.size for entry in (first, second, third)] == [len(good), len(spoilt), len(good)]
    with pytest.raises(BadInput) as caught:
        photo_of(first.key)
    assert caught.value.code == "annotation_key"
    usable, problems = detections_of(second.value, set())
    assert (usable, [problem.code for problem in problems]) == ([], ["label_unknown"])
    assert photo_of(third.key) == (7, 1)
    assert detections_of(third.value, set()) == ([("dish_0", 1, 2, 30, 40)], [])


@pytest.mark.parametrize("escape", ["\\u0000", "\\ud800", "\\udc00", "\\udc00\\ud800"])
def test_a_key_that_the_database_does_not_take_is_no_photo(escape: str) -> None:
    entries = stream(f'{{"recognition_7/{escape}Main.jpg": 1, "recognition_8/Main.jpg": 2}}'.encode())
    assert [entry.value for entry in entries] == [1, 2]
    with pytest.raises(BadInput, match="is not valid UTF-8, or contains") as caught:
        photo_of(entries[0].key)
    assert caught.value.code == "annotation_key"
    assert photo_of(entries[1].key) == (8, 1)


# Numbers


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 25, "-" + "9" * 5000])
def test_numbers_that_are_no_coordinates_spoil_their_box_alone(number: str) -> None:
    bad = f'{{"bbox_2d": [1, 2, {number}, 40], "label": "dish_1"}}'
    good = json.dumps(box())
    content = f'{{"a": {{"dishes": {{"qwen_detections": [{good}, {bad}, {good}]}}}}}}'.encode()
    for chunk in (1, 9, A_CHUNK):
        [entry] = stream(content, chunk)
        usable, problems = detections_of(entry.value, set())
        assert usable == [("dish_0", 1, 2, 30, 40)] * 2
        assert [problem.code for problem in problems] == ["box_malformed"]


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1" * 30_000, "-" + "1" * 30_000, "1" * 9000 + ".5"])
def test_a_number_of_any_length_as_a_value_is_passed(value: str) -> None:
    first, last = stream(f'{{"a": {value}, "b": [2]}}'.encode(), chunk=4096)
    assert (last.key, last.value) == ("b", [2])
    with pytest.raises(BadInput, match="not an object"):
        detections_of(first.value, set())


# Values that are too large

NUMBERS = b"[" + b"123456789," * (MAXIMUM_DOCUMENT_BYTES // 10) + b"1234567]"
TOO_LARGE = {
    "an array": NUMBERS,
    "an object": b'{"dishes": {"qwen_detections": ' + NUMBERS + b"}}",
    "a string": b'"' + b"a" * MAXIMUM_DOCUMENT_BYTES + b'"',
    "a string of brackets, quotes and backslashes": b'["' + b'}\\"]\\\\{' * (MAXIMUM_DOCUMENT_BYTES // 7) + b'"  ]',
    "a number": b"7" * (MAXIMUM_DOCUMENT_BYTES + 1),
    "no JSON": b"[" + b"nil " * (MAXIMUM_DOCUMENT_BYTES // 4) + b"]",
    "letters of two bytes": b'"' + "ж".encode() * (MAXIMUM_DOCUMENT_BYTES // 2) + b'"',
}


@pytest.mark.slow
@pytest.mark.parametrize("value", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_value_that_is_too_large_is_passed_and_what_follows_is_read(value: bytes) -> None:
    assert len(value) > MAXIMUM_DOCUMENT_BYTES
    content = b'{"a": [1], "large": ' + value + b', "b": {"c": "}"}, "again": ' + value + b"}"
    entries = stream(content)
    assert [entry.key for entry in entries] == ["a", "large", "b", "again"]
    assert [entry.problem and entry.problem.code for entry in entries] == [
        None,
        "json_too_large",
        None,
        "json_too_large",
    ]
    assert [entry.size for entry in entries] == [3, 0, 10, 0]


def test_a_value_that_is_just_not_too_large_is_read() -> None:
    value = b'"' + b"a" * (MAXIMUM_DOCUMENT_BYTES - 2) + b'"'
    [entry] = stream(b'{"a": ' + value + b"}")
    assert (entry.problem, entry.size) == (None, len(value))


def test_a_too_large_value_that_never_ends_is_the_end_of_the_file() -> None:
    for value in (NUMBERS[:-1], b'"' + b"a" * MAXIMUM_DOCUMENT_BYTES, b"1" * (MAXIMUM_DOCUMENT_BYTES + 1)):
        with pytest.raises(UsageError, match="it ends too early"):
            stream(b'{"a": [1], "b": ' + value)


@pytest.mark.parametrize(
    "value",
    [
        '["' + '\\\\\\"' * 12 + '"]',
        '{"a": {"b": ["]", "}", "\\"", {"c": []}, {"\\\\": "\\\\"}]}}',
        '"' + "\\\\" * 20 + '"',
        "1" * 45,
        "[nil, nil, nil, nil, nil, nil, nil, nil, nil]",
        '{"a": "\\x}", "b": "\\"}", "c": ["\\\\"], "ddddd": }',
    ],
)
def test_a_value_that_is_too_large_is_passed_wherever_a_chunk_ends(value: str) -> None:
    content = f'{{"a":[1],"large":{value},"b": "x","again": {value} }}'.encode()
    for chunk in range(1, len(content) + 1):
        assert look(content, chunk, maximum=40) == [
            ("a", [1]),
            ("large", "json_too_large"),
            ("b", "x"),
            ("again", "json_too_large"),
        ]


# Memory


class Generated(io.RawIOBase):
    """A file that is made while it is read, and never all there."""

    def __init__(self, pieces: Callable[[], Iterator[bytes]]) -> None:
        self._make, self._pieces = pieces, pieces()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return 0

    def seek(self, offset: int, whence: int = 0) -> int:
        assert (offset, whence) == (0, 0)
        self._pieces, self._rest = self._make(), b""
        return 0

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def peak_of(work: Callable[[], None]) -> int:
    """Return how many bytes Python held at most while working."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _realistic(photos: int) -> Iterator[bytes]:
    # The frequent fields of a real file that are of no use here make most of its bytes.
    value = {**value_of(*(box(f"dish_{k}") for k in range(4)), plates=(box("plate"),)), "raw": "ответ модели " * 250}
    text = json.dumps(value, ensure_ascii=False).encode()
    for number in range(photos):
        yield (b", " if number else b"{") + json.dumps(key_of(number)).encode() + b": " + text
    yield b"}"


def test_memory_does_not_grow_with_the_file() -> None:
    content = b"".join(_realistic(8))
    photos = 40_000_000 * 8 // len(content)
    read = 0

    def work() -> None:
        nonlocal read
        with io.BufferedReader(Generated(lambda: _realistic(photos))) as file:
            for entry in read_entries(file, set()):
                read += entry.size

    assert peak_of(work) < 20_000_000
    assert read > 35_000_000


@pytest.mark.slow
@pytest.mark.parametrize("letters", [b"a" * 300, b'{"a": "' + b"b" * 300 + b'\\\\"}, ', b"1.5, " * 60])
def test_memory_does_not_grow_with_a_value_that_is_too_large(letters: bytes) -> None:
    opening, closing = (b'"', b'"') if letters.startswith(b"a") else (b"[", b"0]")
    found: list[Entry] = []

    def pieces() -> Iterator[bytes]:
        yield b'{"large": ' + opening
        for _ in range(10_000_000 // len(letters) // 100):
            yield letters * 100
        yield closing + b', "after": {"a": 1}}'

    def work() -> None:
        with io.BufferedReader(Generated(pieces)) as file:
            found.extend(read_entries(file, set()))

    # Before its size is known it is parsed: some 3 MiB of text.
    assert peak_of(work) < 45_000_000
    assert [(entry.key, entry.problem and entry.problem.code) for entry in found] == [
        ("large", "json_too_large"),
        ("after", None),
    ]


def test_memory_does_not_grow_with_what_is_wrong_in_a_value() -> None:
    value = {"dishes": {"qwen_detections": [0] * 100_000}}
    told: list[BadInput] = []

    def work() -> None:
        try:
            told.extend(detections_of(value, set())[1])
        except BadInput as exc:
            told.append(exc)

    # A value has room for fifteen times as many, and the process 250 MB for everything.
    assert peak_of(work) < 12_000_000
    assert {problem.code for problem in told} <= {"box_malformed", "json_shape", "json_too_large"}
    assert told


# Whatever the file has, it is read as every JSON reader reads it

NO_HALVES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
VALUE = st.recursive(
    SCALAR,
    lambda one: st.lists(one, max_size=4) | st.dictionaries(st.text(max_size=4), one, max_size=4),
    max_leaves=12,
)
SPACE = st.text(" \t\r\n", max_size=3)


class Pairs(list[tuple[str, Any]]):
    """An object as its pairs."""


def as_dict(value: object) -> object:
    if isinstance(value, Pairs):
        return {key: as_dict(one) for key, one in value}
    return [as_dict(one) for one in value] if isinstance(value, list) else value


@st.composite
def files(draw: st.DrawFn, keys: st.SearchStrategy[str]) -> bytes:
    """An object as text: any keys, equal ones as well, any values, any white space, letters or their escapes."""
    ascii_only = draw(st.booleans())
    space = [draw(SPACE) for _ in range(5)]
    parts = []
    for key in draw(st.lists(keys, max_size=5)):
        value = draw(VALUE)
        separators = (f"{draw(SPACE)},{draw(SPACE)}", f"{draw(SPACE)}:{draw(SPACE)}")
        text = json.dumps(value, ensure_ascii=True, separators=separators)
        if not ascii_only and "\\ud" not in text:  # half a surrogate pair has no UTF-8
            text = json.dumps(value, ensure_ascii=False, separators=separators)
        parts.append(f"{json.dumps(key, ensure_ascii=ascii_only)}{space[0]}:{space[1]}{text}")
    mark = "\ufeff" if draw(st.booleans()) else ""
    return f"{mark}{space[2]}{{{f'{space[0]},{space[3]}'.join(parts)}{space[1]}}}{space[4]}".encode()


@settings(STEADY, max_examples=250)
@given(files(NO_HALVES), st.integers(1, 60))
def test_any_object_is_read_as_the_standard_library_reads_it(content: bytes, chunk: int) -> None:
    wanted = json.loads(content.decode("utf-8-sig"), object_pairs_hook=Pairs)
    entries = stream(content, chunk)
    assert [(entry.key, entry.value) for entry in entries] == [(key, as_dict(value)) for key, value in wanted]
    for entry in entries:
        assert entry.problem is None
        assert entry.size > 0
    assert stream(content) == entries


@settings(STEADY, max_examples=150)
@given(files(st.sampled_from(["a", "b", ""])), st.integers(1, 60), st.integers(12, 40))
def test_of_any_object_what_is_too_large_is_passed_and_nothing_else(content: bytes, chunk: int, maximum: int) -> None:
    wanted = [
        (entry.key, entry.value if entry.size <= maximum else None, entry.size > maximum) for entry in stream(content)
    ]
    entries = stream(content, chunk, maximum)
    assert [(entry.key, entry.value, entry.problem is not None) for entry in entries] == wanted
    assert all(entry.problem is None or entry.size == 0 for entry in entries)


@settings(STEADY, max_examples=150)
@given(st.binary(max_size=60), st.integers(1, 20))
def test_any_bytes_are_entries_or_one_error(tail: bytes, chunk: int) -> None:
    content = b'{"a": [1], "b": ' + tail
    entries, error = attempt(lambda: stream(content, chunk))
    if entries is None:
        assert isinstance(error, UsageError)
        return
    assert entries[0].value == [1]
    assert entries[0].size == 3
