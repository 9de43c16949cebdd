"""Forms of annotation files besides one plain JSON object: read where they are clear, and else named in the error."""

from __future__ import annotations

import gc
import gzip
import io
import json
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from pipeline.config import Settings
from pipeline.dataset import annotations as module
from pipeline.dataset.annotations import read_entries
from pipeline.dataset.detections import detections_of
from pipeline.dataset.documents import check_menu
from pipeline.dataset.forms import unwrapped
from pipeline.dataset.records import Deviation
from pipeline.errors import BadInput, UsageError
from tests import annotating, world
from tests.annotating import Annotations, Run, ids_of, key_of, rejects, value_of, write
from tests.annotations_support import box
from tests.services import MakeDataset

run = annotating.run
dsn = annotating.dsn

PLAIN = {key_of(1): value_of("dish_0", "plate"), key_of(2, "Qualifying"): value_of("plate")}
DEEP = "[" * 100_000 + "]" * 100_000
GZIP, FENCED, LINES, NESTED = "annotations_gzip", "annotations_fenced", "annotations_jsonl", "annotations_nested_text"


def fence(text: str, language: str = "json") -> str:
    return f"```{language}\n{text}\n```"


def lines(*objects: object) -> str:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def plain(content: Annotations) -> str:
    return json.dumps(content, indent=1)


def each_line(content: Annotations) -> str:
    return lines(*({key: value} for key, value in content.items()))


def with_name(field: str) -> Callable[[Annotations], str]:
    return lambda content: lines(*({"id": 7, field: key, **value} for key, value in content.items()))


def with_value(field: str) -> Callable[[Annotations], str]:
    return lambda content: lines(*({field: value, "image": key} for key, value in content.items()))


def as_texts(content: Annotations) -> str:
    return plain({key: json.dumps(value) for key, value in content.items()})


def as_answers(content: Annotations) -> str:
    """Lists of detections as a model writes them."""
    return plain(
        {
            key: {part: {"qwen_detections": fence(json.dumps(one["qwen_detections"]))} for part, one in value.items()}
            for key, value in content.items()
        }
    )


def as_sections(content: Annotations) -> str:
    return plain({key: {part: json.dumps(one) for part, one in value.items()} for key, value in content.items()})


FORMS: dict[str, tuple[Callable[[Annotations], str | bytes], set[str]]] = {
    "plain": (plain, set()),
    "gzip": (lambda content: gzip.compress(plain(content).encode()), {GZIP}),
    "gzip in two parts": (
        lambda content: gzip.compress(plain(content).encode()[:50]) + gzip.compress(plain(content).encode()[50:]),
        {GZIP},
    ),
    "a block": (lambda content: fence(plain(content)), {FENCED}),
    "a block without language": (lambda content: "\n" + fence(plain(content), "") + "\n\n", {FENCED}),
    "a block on one line": (lambda content: f"```JSON {json.dumps(content)} ```", {FENCED}),
    "a block after a mark, in gzip": (
        lambda content: gzip.compress(("\ufeff" + fence(plain(content))).encode()),
        {GZIP, FENCED},
    ),
    "lines": (each_line, {LINES}),
    "lines with empty ones, a mark and Windows ends": (
        lambda content: "\ufeff" + each_line(content).replace("\n", "\r\n\r\n"),
        {LINES},
    ),
    "lines without an end": (lambda content: each_line(content).rstrip(), {LINES}),
    "lines in gzip": (lambda content: gzip.compress(each_line(content).encode()), {GZIP, LINES}),
    "lines with image": (with_name("image"), {LINES}),
    "lines with path": (with_name("path"), {LINES}),
    "lines with key": (with_name("key"), {LINES}),
    "lines with image and value": (with_value("value"), {LINES}),
    "lines with image and annotations": (with_value("annotations"), {LINES}),
    "values in strings": (as_texts, {NESTED}),
    "sections in strings": (as_sections, {NESTED}),
    "blocks in strings": (as_answers, {FENCED}),
    "lines of values in strings": (
        lambda content: lines(*({"key": key, "value": json.dumps(value)} for key, value in content.items())),
        {LINES, NESTED},
    ),
}


def as_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


@pytest.mark.parametrize(("make", "forms"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_form_is_read_as_the_plain_object_and_named(
    make: Callable[[Annotations], str | bytes], forms: set[str], chunk: int
) -> None:
    found: set[Deviation] = set()
    with patch.object(module, "_CHUNK", chunk):
        entries = list(read_entries(io.BytesIO(as_bytes(make(PLAIN))), found))
    assert [(entry.key, entry.problem) for entry in entries] == [(key, None) for key in PLAIN]
    assert all(entry.size > 0 for entry in entries)
    for entry, value in zip(entries, PLAIN.values(), strict=True):
        assert detections_of(entry.value, found) == detections_of(value, set())
    assert {one.code for one in found} == forms


def test_a_single_line_that_names_its_photo_is_an_entry() -> None:
    found: set[Deviation] = set()
    [entry] = read_entries(io.BytesIO(json.dumps({**value_of("plate"), "image": key_of(1)}).encode()), found)
    assert entry.key == key_of(1)
    assert [one.code for one in found] == [LINES]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('{"a": {"b": 1}', "json_broken"),
        ("[1]", "json_broken"),
        ("broken", "json_broken"),
        ('{"a": 1} {"b": 2}', "json_broken"),
        ('{"a": nil}', "json_broken"),
        (json.dumps({"image": "a", "path": "b", **value_of("plate")}), "annotation_key"),
        (f'{{"a": "{"x" * (3 << 20)}"}}', "json_too_large"),
    ],
)
def test_a_bad_line_is_one_problem_and_the_others_are_read(line: str, code: str) -> None:
    text = each_line(PLAIN) + line + "\n" + lines({key_of(3): value_of("plate")})
    entries = list(read_entries(io.BytesIO(text.encode()), set()))
    assert [entry.key for entry in entries] == [*PLAIN, "line 3", key_of(3)]
    assert [entry.problem and entry.problem.code for entry in entries] == [None, None, code, None]


@pytest.mark.parametrize(
    "value", ["", "none", "{", "[1,", "```json\n{\n```", "``````", '"{}"', "1", "```json\ntrue\n```"]
)
def test_a_string_without_json_is_no_form(value: str) -> None:
    found: set[Deviation] = set()
    content = {"dishes": {"qwen_detections": [box()]}, "note": value}
    assert len(detections_of(content, found)[0]) == 1
    [entry] = read_entries(io.BytesIO(json.dumps({"a": value}).encode()), found)
    with pytest.raises(Exception, match="not an object"):
        detections_of(entry.value, found)
    assert found == set()


def test_a_key_that_is_twice_in_a_string_with_json_makes_the_value_unusable() -> None:
    with pytest.raises(BadInput, match="qwen_detections is there twice"):
        detections_of({"dishes": '{"qwen_detections": [], "qwen_detections": []}'}, set())


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("qwen_annotations.json", "{}")
    return stream.getvalue()


TEXT = plain(PLAIN)
WRONG = {
    "empty": (b"", "empty"),
    "white space": (b" \r\n\t ", "nothing but white space"),
    "zeros": (bytes(5000), "filled with zero bytes"),
    "UTF-16": (TEXT.encode("utf-16"), "UTF-16 text"),
    "UTF-16, big end first": (TEXT.encode("utf-16-be"), "UTF-16 text"),
    "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "UTF-16 text"),
    "text before a block": (f"Here are the boxes:\n{fence(TEXT)}".encode(), "text around a block of Markdown"),
    "UTF-32": (TEXT.encode("utf-32"), "UTF-32 text"),
    "two marks": (b"\xef\xbb\xbf" * 2 + TEXT.encode(), "two byte order marks"),
    "HTML": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
    "XML": (b'<?xml version="1.0"?><annotations/>', "an XML"),
    "ZIP": (zipped(), "a ZIP archive"),
    "a PNG": (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    "a JPEG": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "a JPEG image"),
    "PDF": (b"%PDF-1.7\n", "a PDF document"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
    "CSV": (b"key,x1,y1,x2,y2\na,1,2,3,4\n", "a table of text (CSV)"),
    "CSV with semicolons": (b"\xef\xbb\xbfkey;x1\r\na;1\r\n", "a table of text (CSV)"),
    "an array": (b'[{"image": "a"}]', "a JSON array"),
    "gzip twice": (gzip.compress(gzip.compress(TEXT.encode())), "gzip data"),
    "gzip of nothing": (gzip.compress(b""), "empty"),
    "gzip of UTF-16": (gzip.compress(TEXT.encode("utf-16")), "UTF-16 text"),
    "cut gzip": (gzip.compress(TEXT.encode())[:-20], "damaged gzip data"),
    "gzip with flipped bytes": (gzip.compress(TEXT.encode())[:12] + b"\xff\xff\xff\xff\xff", "damaged gzip data"),
    "a gzip header alone": (b"\x1f\x8b\x08\x00", "damaged gzip data"),
    "a block that is not closed": (f"```json\n{TEXT}".encode(), "it ends too early"),
    "a block with something after it": (f"{fence(TEXT)}\nDone.".encode(), "something follows its end"),
}


@pytest.mark.parametrize(("content", "what"), WRONG.values(), ids=WRONG)
def test_the_error_says_what_a_file_is_that_cannot_be_read(content: bytes, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        list(read_entries(io.BytesIO(content), set()))
    assert what in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.hint


def test_a_broken_object_is_not_said_to_be_something_else() -> None:
    for content in (b'{"a": 1, }', b'{"a": <html>', b"{key: 1}"):
        with pytest.raises(UsageError) as caught:
            list(read_entries(io.BytesIO(content), set()))
        assert "the file is" not in caught.value.message


@pytest.mark.parametrize("first", ["", " \r", "\n\n"])
def test_lines_may_begin_with_empty_ones(first: str) -> None:
    forms: set[Deviation] = set()
    lines = [first, *(json.dumps({key: value}) for key, value in PLAIN.items())]
    entries = list(read_entries(io.BytesIO("\n".join(lines).encode()), forms))
    assert {form.code for form in forms} == {LINES}
    assert [(entry.key, entry.problem) for entry in entries] == [(key, None) for key in PLAIN]


@pytest.mark.parametrize("name", ["a.json.gz", "a.json", "a.jsonl"])
def test_a_form_is_loaded_and_announced_once(
    name: str, run: Run, small_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = small_dataset(3)
    ids = ids_of(dataset)
    content = {key_of(number): value_of("dish_0", "plate") for number in ids}
    text = each_line(content) + "{\n"
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    done = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert done.code == 0
    codes = [GZIP] * name.endswith("gz") + [LINES]
    rows = world.query(dsn, "SELECT recognition_id, path, code FROM ingest.notices WHERE batch_id = 'q1' ORDER BY code")
    assert rows == [(None, str(file), code) for code in codes]
    assert f"Noticed: {len(codes)} (" in done.out
    assert rejects(dsn) == [(None, "json_broken", "discover")]
    assert "line 4" in done.out
    world.check(settings, (dataset, "b1", None), qwen=write(tmp_path / "plain.json", content))


def test_a_key_whose_folder_and_file_differ_annotates_neither(
    run: Run, small_dataset: MakeDataset, dsn: str, tmp_path: Path
) -> None:
    dataset = small_dataset(3)
    first, second, third = ids_of(dataset)
    content = {
        f"recognition_{first}/photos/recognition_{second}_2025-10-11_Main.jpg": value_of("plate"),
        f"export_1/{third}/photos/Main.jpg": value_of("plate"),
    }
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", write(tmp_path / "a.json", content), "--batch-id", "q1").code == 0
    assert rejects(dsn) == [(None, "annotation_key", "discover")]
    assert annotating.annotated(dsn) == {third}


@pytest.mark.slow
@pytest.mark.parametrize("text", [b"[" * (8 << 20), b"\n" * (48 << 20), b'{"a": ' + b"[" * (8 << 20)])
def test_a_small_compressed_file_does_not_cost_minutes(text: bytes) -> None:
    packed = io.BytesIO(gzip.compress(text if text[:1] != b"[" else b'{"b": ' + text))
    started = time.process_time()
    with pytest.raises(UsageError, match=r"unpacks to more|ends too early"):
        list(read_entries(packed, set()))
    assert time.process_time() - started < 20


@pytest.mark.slow
@pytest.mark.parametrize("member", [b'"a":x,', b'"a":1x,', b'"a":[x],', b'"a":"\n",', b'"a":{"b":1,"b":1},'])
def test_many_tiny_broken_values_take_seconds(member: bytes) -> None:
    count = (3 << 20) // len(member)
    content = io.BytesIO(b"{" + (member * count)[:-1] + b"}")
    started = time.process_time()
    assert sum(entry.problem is not None for entry in read_entries(content, set())) == count
    assert time.process_time() - started < 40  # that of whole values is 3, of a quadratic one a minute


def deep_value() -> None:
    [entry] = read_entries(io.BytesIO(f'{{"a": {DEEP}}}'.encode()), set())
    assert entry.problem is not None


def deep_text() -> None:
    assert unwrapped(DEEP, set()) == DEEP


def deep_document() -> None:
    with pytest.raises(BadInput):
        check_menu(DEEP.encode())


@pytest.mark.parametrize("read", [deep_value, deep_text, deep_document])
def test_finalizers_do_not_run_deep_in_a_nested_value(
    read: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)

    class Finalized:
        def __init__(self) -> None:
            self.own = self  # which only a collection frees

        def __del__(self) -> None:
            self.dig(500)

        def dig(self, depth: int) -> None:
            if depth:
                self.dig(depth - 1)

    gc.collect()
    garbage = [Finalized() for _ in range(100)]
    del garbage
    read()
    gc.collect()
    assert failed == []
