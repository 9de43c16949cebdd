"""Mutated photos, documents and annotations files for tests/fuzz.py, each made from a seed and a number alone."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from PIL import Image

from pipeline.dataset.layout import MAXIMUM_DOCUMENT_BYTES

PHOTO, MENU, RECEIPT, ANNOTATIONS = "photo", "menu", "receipt", "annotations"
_WEIGHTS = {PHOTO: 60, MENU: 13, RECEIPT: 12, ANNOTATIONS: 15}
_LARGE = 500_000
#: Less than a load reads, because mutations are in the same memory; tests/test_memory.py has the largest photos.
_LARGEST_PHOTO = 20_000_000

Mutation = Callable[[random.Random, bytes], bytes]


def mutant(seed: int, number: int) -> tuple[str, bytes]:
    """Return the kind and the content of a file, which is cut where it is too large."""
    chance = random.Random(f"{seed}:{number}")
    kind = chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    if kind == PHOTO:
        content = chance.choice(_photos())
        mutations = (*_BYTES, *_PHOTOS, *_PHOTOS)
        limit = _LARGEST_PHOTO
    else:
        content = _as_document(chance, kind, _DOCUMENTS[kind](chance))
        mutations = (*_BYTES[:4], *_JSON, *_JSON)
        limit = MAXIMUM_DOCUMENT_BYTES * (1 if kind != ANNOTATIONS else 4)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        # Mutations of the structure take many times the size of the file in memory.
        usable = mutations if len(content) < _LARGE else _BYTES[:4]
        content = chance.choice(usable)(chance, content)[:limit]
    return kind, content


def _times(chance: random.Random, most: int) -> int:
    """Return a number up to `most`; small ones are likelier."""
    return int(most ** chance.random())


def _span(chance: random.Random, content: bytes) -> tuple[int, int]:
    start = chance.randrange(len(content) + 1)
    return start, min(len(content), start + _times(chance, 5000))


# Bytes, whatever they mean


def _flip(chance: random.Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(_times(chance, 60) if content else 0):
        damaged[chance.randrange(len(damaged))] = chance.choice((0, 0xFF, 0xD9, 0x0D, chance.randrange(256)))
    return bytes(damaged)


def _cut(chance: random.Random, content: bytes) -> bytes:
    start, end = _span(chance, content)
    return content[:start] + content[end:] * chance.randrange(2)


def _splice(chance: random.Random, content: bytes) -> bytes:
    start, end = _span(chance, content)
    at = chance.randrange(len(content) + 1)
    return content[:at] + content[start:end] * _times(chance, 300) + content[at:]


def _run(chance: random.Random, content: bytes) -> bytes:
    at = chance.randrange(len(content) + 1)
    run = chance.choice((b"\0", b"\xff", b"\xff\0", b" ", b"\xd0"))
    size = _times(chance, 20_000_000 if chance.random() < 0.05 else 300_000)
    kept = at + size * chance.randrange(2)  # in place of what is there, or between it
    return content[:at] + (run * size)[:size] + content[kept:]


def _line_ends(chance: random.Random, content: bytes) -> bytes:
    before, after = chance.choice(((b"\n", b"\r\n"), (b"\r\n", b"\n"), (b"\r", b"\n")))
    return content.replace(before, after)


def _as_text(chance: random.Random, content: bytes) -> bytes:
    return content.decode("latin-1" if chance.random() < 0.5 else "utf-8", "replace").encode()


_BYTES: tuple[Mutation, ...] = (_flip, _cut, _splice, _run, _line_ends, _as_text)


# Photos


@cache
def _photos() -> list[bytes]:
    """Encode photos of every kind, most of them small, so that many fit into a minute."""
    found = []
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("RGB", {}),
        ("L", {}),
        ("CMYK", {}),
        ("RGB", {"progressive": True}),
        ("L", {"progressive": True}),
        ("RGB", {"restart_marker_blocks": 2}),
        ("RGB", {"exif": _exif()}),
    )
    for size in ((48, 32), (48, 32), (160, 120), (640, 480)):
        for mode, options in kinds:
            stream = io.BytesIO()
            noise = Image.frombytes("L", size, random.Random(0).randbytes(size[0] * size[1]))
            noise.convert(mode).save(stream, "JPEG", **options)
            found.append(stream.getvalue())
    for options in ({}, {"progressive": True}):
        stream = io.BytesIO()
        Image.new("RGB", (2000, 1500), (90, 90, 90)).save(stream, "JPEG", **options)
        found += [stream.getvalue()] * 2
    return found


def _exif() -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = 6
    return block


def _segments(content: bytes) -> list[bytes]:
    """Split at markers; whatever is between two of them belongs to the first."""
    starts = [match.start() for match in re.finditer(rb"\xff[\xc0-\xcf\xd8-\xef\xfe]", content)][:400]
    return [content[start:end] for start, end in zip([0, *starts], [*starts, len(content)], strict=True)]


def _with_segment(change: Callable[[random.Random, bytes], bytes]) -> Mutation:
    """Return a mutation of one segment of a photo."""

    def mutate(chance: random.Random, content: bytes) -> bytes:
        parts = _segments(content)
        at = chance.randrange(len(parts))
        parts[at] = change(chance, parts[at])
        return b"".join(parts)

    return mutate


def _swap(chance: random.Random, content: bytes) -> bytes:
    parts = _segments(content)
    one, other = chance.randrange(len(parts)), chance.randrange(len(parts))
    parts[one], parts[other] = parts[other], parts[one]
    return b"".join(parts)


def _repeat(chance: random.Random, segment: bytes) -> bytes:
    return segment * _times(chance, 30_000 if len(segment) < 100 else 300)


def _another_length(chance: random.Random, segment: bytes) -> bytes:
    length = chance.choice((0, 1, 2, 3, 0xFFFF, len(segment) % 65536, chance.randrange(65536)))
    return segment[:2] + length.to_bytes(2, "big") + segment[4:]


def _another_marker(chance: random.Random, segment: bytes) -> bytes:
    return b"\xff" + bytes((chance.randrange(256),)) + segment[2:]


def _another_header(chance: random.Random, segment: bytes) -> bytes:
    """Change the first bytes behind the length: size and components of a frame, parameters of a scan."""
    damaged = bytearray(segment)
    for _ in range(chance.randrange(1, 4)):
        if len(damaged) > 4:
            damaged[chance.randrange(4, min(len(damaged), 24))] = chance.choice((0, 1, 2, 0x11, 0x22, 0x44, 0xFF))
    return bytes(damaged)


def _another_size(chance: random.Random, content: bytes) -> bytes:
    """Give the frame another width and height, up to more than a load accepts."""
    found = re.search(rb"\xff[\xc0-\xc2]....", content, re.DOTALL)
    if found is None:
        return content
    sides = b"".join(_times(chance, 65535).to_bytes(2, "big") for _ in range(2))
    return content[: found.end() - 1] + sides + content[found.end() + 3 :]


def _insert(chance: random.Random, content: bytes) -> bytes:
    """Insert a small segment many times: comment, restart interval, restart marker, end, thumbnail."""
    segments = (b"\xff\xfe\0\2", b"\xff\xdd\0\4\0\1", b"\xff\xd0", b"\xff\xd9", b"\xff\xe1\0\x0eExif\0\0MM\0*")
    parts = _segments(content)
    parts.insert(chance.randrange(len(parts) + 1), chance.choice(segments) * _times(chance, 30_000))
    return b"".join(parts)


def _padded(chance: random.Random, content: bytes) -> bytes:
    """Insert zeros or fill bytes before some segments, those at the end of coded data among them."""
    parts = _segments(content)
    for at in chance.sample(range(len(parts)), min(len(parts), _times(chance, 20))):
        parts[at] += chance.choice((b"\0", b"\xff")) * _times(chance, 100)
    return b"".join(parts)


def _closed_again(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content) + 1)] + b"\xff\xd9"


_PHOTOS: tuple[Mutation, ...] = (
    *map(_with_segment, (_repeat, _another_length, _another_marker, _another_header, _another_header, _flip)),
    _swap,
    _another_size,
    _insert,
    _padded,
    _padded,
    _closed_again,
)


# Documents


def _entry(chance: random.Random) -> dict[str, object]:
    number = chance.randrange(100)
    return {"ExternalId": str(number), "Name": f"Блюдо {number}", "Category": "Супы", "Price": number / 4}


def _menu(chance: random.Random) -> object:
    return [_entry(chance) for _ in range(_times(chance, 300))]


def _receipt(chance: random.Random) -> object:
    dishes = [[_entry(chance) for _ in range(chance.randrange(1, 4))] for _ in range(_times(chance, 20))]
    return [{"Count": chance.randrange(1, 4), "Dishes": found} for found in dishes]


def _annotations(chance: random.Random) -> object:
    found = {}
    for number in range(_times(chance, 60)):
        boxes = [
            {"bbox_2d": [number, 2, number + 300.5, 400], "label": chance.choice(("dish_0", "dish_1", "plate"))}
            for _ in range(_times(chance, 30))
        ]
        camera = chance.choice(("Main", "Qualifying"))
        key = f"export_1/recognition_{number}/photos/recognition_{number}_2025-10-11_{camera}.jpg"
        found[key] = {"dishes": {"qwen_detections": boxes}, "plates": {"qwen_detections": []}}
    return found


def _as_document(chance: random.Random, kind: str, value: Any) -> bytes:
    """Return a value as JSON; annotations in each form that a load reads."""
    is_ascii = chance.random() < 0.5
    text = json.dumps(value, ensure_ascii=is_ascii)
    form = chance.choice(("", "", "", "lines", "fenced", "nested", "gzip")) if kind == ANNOTATIONS else ""
    if form == "lines":
        text = "\n".join(json.dumps({key: one}, ensure_ascii=is_ascii) for key, one in value.items())
    elif form == "fenced":
        text = f"```json\n{text}\n```"
    elif form == "nested":
        text = json.dumps({key: json.dumps(one, ensure_ascii=is_ascii) for key, one in value.items()})
    return gzip.compress(text.encode(), mtime=0) if form == "gzip" else text.encode()


_DOCUMENTS: dict[str, Callable[[random.Random], Any]] = {MENU: _menu, RECEIPT: _receipt, ANNOTATIONS: _annotations}
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[^\s\[\]{},:"]+|[\[\]{},:]')
#: Valid JSON, which a document may not have in this place or not at all.
_VALUES = tuple(
    text.encode()
    for text in (
        *("null", "true", "[]", "{}", "-0", "0.350", "1e400", "-1e-400", "1E+99999999", '"12,50"', '" 1"', '""'),
        *('"\\u0000"', '"\\ud800"', '"\\ud83d\\ude00"', '"ExternalId"', '"externalId"', '"Count"', '"dish_99999999"'),
        *("9" * 30, "9" * 5000, "-" + "1" * 1001, "1." + "3" * 40_000, f'"{"x" * 100_000}"', "[[]]", '{"Count":1}'),
    )
)
_BROKEN = tuple(
    text.encode("utf-8", "surrogatepass")
    for text in (
        *("NaN", "Infinity", "-Infinity", "0x10", "01", "1.", ".5", '"\ud800"', '"\\"', "'1'", '"\x01"', '"\\x"', "\0"),
        *("/* */", ",", "]", "}", "[", "{", ":", "\ufeff", ""),
    )
)


def _values(chance: random.Random, content: bytes) -> bytes:
    """Replace some strings and numbers with others."""
    parts = _TOKEN.findall(content)
    scalars = [at for at, part in enumerate(parts) if part not in b"[]{},:"]
    for at in chance.sample(scalars, min(len(scalars), _times(chance, 6))):
        parts[at] = chance.choice((*_VALUES, parts[chance.choice(scalars)]))
    return b"".join(parts)


def _tokens(chance: random.Random, content: bytes) -> bytes:
    """Break, remove or double some tokens."""
    parts = _TOKEN.findall(content)
    for _ in range(_times(chance, 6) if parts else 0):
        at = chance.randrange(len(parts))
        parts[at] = chance.choice((*_BROKEN, parts[at] * 2, chance.choice(parts)))
    return b"".join(parts)


def _nested(chance: random.Random, content: bytes) -> bytes:
    """Wrap a token, or all, into brackets."""
    depth = _times(chance, 1_000_000)
    opening, closing = chance.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'{"a":[', b"]}")))
    parts = _TOKEN.findall(content) or [b""]
    at = chance.randrange(len(parts))
    closed = closing * (depth if chance.random() < 0.7 else depth // 2)
    return b"".join((*parts[:at], opening * depth, parts[at], closed, *parts[at + 1 :]))


def _many(chance: random.Random, content: bytes) -> bytes:
    """Repeat a token with a comma, which makes long arrays, and many keys of an object."""
    parts = _TOKEN.findall(content) or [b""]
    at = chance.randrange(len(parts))
    again = chance.choice((parts[at], b"[]", b"{}", b'"":0', b'"a":{}', b"0", chance.choice(_VALUES)))
    count = _times(chance, 1_500_000) // max(1, len(again) // 4)
    return b"".join((*parts[:at], (again + b",") * count, *parts[at:]))


def _encoded(chance: random.Random, content: bytes) -> bytes:
    text = content.decode("utf-8", "replace")
    encoding = chance.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp1251"))
    return gzip.compress(content, mtime=0) if chance.random() < 0.1 else text.encode(encoding, "replace")


def _marked(chance: random.Random, content: bytes) -> bytes:
    return b"\xef\xbb\xbf" * chance.randrange(1, 4) + content


def _member_twice(chance: random.Random, content: bytes) -> bytes:
    return re.sub(rb'"[^"]{1,20}": ?[^,{}\[\]]+', rb"\g<0>,\g<0>", content, count=_times(chance, 5))


_JSON: tuple[Mutation, ...] = (_values, _values, _values, _tokens, _nested, _many, _encoded, _marked, _member_twice)
