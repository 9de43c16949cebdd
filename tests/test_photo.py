"""photo.py: whole photos of every kind pass, damaged ones are told by their code, and nothing but BadInput escapes.

test_dataset.py has the plain cases; here are the ones that need a closer look at the format.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.dataset.photo import MAXIMUM_PIXELS, Dimensions, check_photo
from pipeline.errors import BadInput

SIZE = (160, 120)
ORIENTATION = 0x0112
END = b"\xff\xd9"


def encoded(mode: str = "RGB", size: tuple[int, int] = SIZE, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[ORIENTATION] = orientation
    data[0x010F] = "A maker of cameras"
    return data


def refusal(content: bytes) -> str:
    with pytest.raises(BadInput) as caught:
        check_photo(content)
    assert caught.value.message
    return caught.value.code


def segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and position of the segments of a JPEG up to the first scan."""
    position = 2
    while True:
        marker, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], "big")
        yield marker, position
        if marker == 0xDA:
            return
        position += 2 + length


def segment(content: bytes, *markers: int) -> int:
    return next(position for marker, position in segments(content) if marker in markers)


def with_size(content: bytes, width: int, height: int) -> bytes:
    start = segment(content, 0xC0, 0xC2) + 5
    return content[:start] + struct.pack(">HH", height, width) + content[start + 4 :]


# Whole photos


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("options", [{}, {"quality": 5}, {"quality": 95, "subsampling": 0}, {"optimize": True}])
def test_every_kind_of_jpeg_passes(mode: str, progressive: bool, options: dict[str, Any]) -> None:
    assert check_photo(encoded(mode, progressive=progressive, **options)) == Dimensions(*SIZE, 1)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (1, 1000), (1000, 1), (1281, 719)])
def test_the_dimensions_are_those_of_the_file_not_of_the_small_picture_that_is_decoded(size: tuple[int, int]) -> None:
    found = check_photo(encoded(size=size))
    assert (found.width, found.height) == size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_told_and_the_dimensions_stay_as_stored(orientation: int) -> None:
    assert check_photo(encoded(exif=exif(orientation))) == Dimensions(*SIZE, orientation)


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation: int) -> None:
    assert check_photo(encoded(exif=exif(orientation))).orientation == 1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kept", [0, 3, 8, 9, 12, 20, 30, 43])
def test_a_damaged_exif_block_does_not_make_a_good_picture_bad(kept: int) -> None:
    content = encoded(exif=exif(6))
    start = segment(content, 0xE1) + 4 + len(b"Exif\0\0")
    length = int.from_bytes(content[start - 8 : start - 6], "big") - 8
    damaged = content[: start + kept] + b"\xff" * (length - kept) + content[start + length :]
    found = check_photo(damaged)
    assert (found.width, found.height) == SIZE
    assert 1 <= found.orientation <= 8


@pytest.mark.parametrize("trailer", [b"\0", b"\n", b"\0" * 5000, b"made by a camera", END, encoded(size=(8, 8))])
def test_bytes_after_the_end_do_no_harm(trailer: bytes) -> None:
    assert check_photo(encoded() + trailer) == Dimensions(*SIZE, 1)


def test_a_photo_with_a_second_picture_in_it_has_the_dimensions_of_the_first() -> None:
    stream = io.BytesIO()
    second = Image.new("RGB", (8, 8))
    Image.effect_noise(SIZE, 60).convert("RGB").save(stream, "MPO", save_all=True, append_images=[second])
    assert check_photo(stream.getvalue()) == Dimensions(*SIZE, 1)


# Photos that end too early


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_truncation_that_loses_scan_data_is_noticed(mode: str, progressive: bool) -> None:
    content = encoded(mode, (96, 64), progressive=progressive)
    scan = segment(content, 0xDA)
    cuts = {*range(scan, len(content) - 1, 41), *range(len(content) - 40, len(content))}
    assert {refusal(content[:cut]) for cut in cuts} == {"photo_truncated"}


def test_a_cut_before_the_picture_is_noticed_even_behind_a_thumbnail() -> None:
    whole = encoded()
    thumbnail = b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0\0\0\0\0" + encoded(size=(32, 24))
    block = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    content = whole[:2] + block + whole[2:]
    assert check_photo(content) == Dimensions(*SIZE, 1)
    for cut in (len(block) // 2, len(block), len(block) + 2, len(block) + 10, len(content) // 2):
        with pytest.raises(BadInput):
            check_photo(content[:cut])


def test_a_copy_that_was_filled_up_with_zeros_is_noticed() -> None:
    content = encoded()
    for cut in (len(content) // 3, len(content) // 2):
        assert refusal(content[:cut] + bytes(len(content) - cut)) == "photo_truncated"


# Photos that are not what they are named


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "photo_empty"),
        (encoded(kind="PNG"), "photo_not_jpeg"),
        (encoded("P", kind="GIF"), "photo_not_jpeg"),
        (encoded(kind="BMP"), "photo_not_jpeg"),
        (encoded(kind="TIFF"), "photo_not_jpeg"),
        (encoded(kind="JPEG2000"), "photo_not_jpeg"),
        (b"\xff", "photo_not_jpeg"),
        (b"<html>404</html>", "photo_not_jpeg"),
        (b"\0" * 5000, "photo_not_jpeg"),
        (b"\n" + encoded(), "photo_not_jpeg"),
        (b"\xff\xd8", "photo_truncated"),
        (b"\xff\xd8\xff", "photo_truncated"),
        (b"\xff\xd8" + encoded(kind="PNG") + END, "photo_undecodable"),
    ],
)
def test_what_is_no_jpeg(content: bytes, code: str) -> None:
    assert refusal(content) == code


def test_a_png_is_called_by_its_name() -> None:
    with pytest.raises(BadInput, match="PNG"):
        check_photo(encoded(kind="PNG"))


# Damage in the middle


@pytest.mark.parametrize("marker", [0xDB, 0xC0, 0xC4])
def test_a_table_that_the_decoder_needs_and_that_is_damaged_is_noticed(marker: int) -> None:
    content = bytearray(encoded())
    start = segment(bytes(content), marker)
    content[start + 4 : start + 12] = b"\xff" * 8
    assert refusal(bytes(content)) in ("photo_undecodable", "photo_too_large")


def test_a_frame_header_that_is_missing_is_noticed() -> None:
    content = encoded()
    start = segment(content, 0xC0)
    length = 2 + int.from_bytes(content[start + 2 : start + 4], "big")
    assert refusal(content[:start] + content[start + length :]) == "photo_undecodable"


@pytest.mark.parametrize(("width", "height"), [(65500, 65500), (65500, 1833), (12001, 10000)])
def test_a_decompression_bomb_is_refused_before_memory_is_taken(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert width * height > MAXIMUM_PIXELS

    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("simplejpeg.decode_jpeg", decode)
    assert refusal(with_size(encoded(), width, height)) == "photo_too_large"


@pytest.mark.parametrize(("width", "height"), [(0, 120), (160, 0), (0, 0)])
def test_a_picture_without_pixels_is_refused(width: int, height: int) -> None:
    assert refusal(with_size(encoded(), width, height)) == "photo_undecodable"


BASES = [
    encoded(size=(48, 32)),
    encoded(size=(48, 32), progressive=True),
    encoded("CMYK", (48, 32)),
    encoded(size=(48, 32), exif=exif(6), dpi=(72, 72), icc_profile=b"profile" * 20, comment=b"comment"),
]


@given(st.binary(max_size=300), st.booleans())
def test_only_bad_input_escapes_for_random_bytes(content: bytes, is_jpeg: bool) -> None:
    with pytest.raises(BadInput):
        check_photo(b"\xff\xd8" * is_jpeg + content)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(BASES), st.lists(st.tuples(st.integers(2, 2000), st.integers(0, 255)), min_size=1, max_size=8))
def test_only_bad_input_escapes_for_flipped_bytes(base: bytes, flips: list[tuple[int, int]]) -> None:
    content = bytearray(base)
    for position, value in flips:
        content[2 + position % (len(content) - 2)] = value
    try:
        found = check_photo(bytes(content))
    except BadInput as exc:
        code = exc.code
    else:
        assert found.width > 0
        assert found.height > 0
        return
    assert code in ("photo_truncated", "photo_undecodable", "photo_too_large")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(BASES), st.integers(2, 2000), st.integers(1, 400))
def test_only_bad_input_escapes_for_a_hole(base: bytes, position: int, length: int) -> None:
    start = 2 + position % (len(base) - 2)
    try:
        found = check_photo(base[:start] + base[start + length :])
    except BadInput as exc:
        code = exc.code
    else:
        assert found.orientation in range(1, 9)
        return
    assert code in ("photo_truncated", "photo_undecodable", "photo_too_large")


def test_a_trailer_that_looks_like_a_scan_does_no_harm() -> None:
    assert check_photo(encoded() + b"\xff\xda and the like") == Dimensions(*SIZE, 1)


def test_a_progressive_picture_whose_coefficients_would_fill_the_memory_is_refused() -> None:
    huge = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(huge, "JPEG", progressive=True, subsampling=0)
    assert refusal(huge.getvalue()) == "photo_too_large"
    baseline = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(baseline, "JPEG", subsampling=0)
    assert check_photo(baseline.getvalue()) == Dimensions(6000, 6000, 1)
