"""photo.py: whole photos of every kind pass, damaged ones are told by their code, and nothing but BadInput escapes.

test_dataset.py has the plain cases; here are the ones that need a closer look at the format.
"""

from __future__ import annotations

import io
import re
import struct
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.dataset.jpeg import read_structure
from pipeline.dataset.layout import MAXIMUM_PHOTO_BYTES
from pipeline.dataset.photo import MAXIMUM_PIXELS, MAXIMUM_SCANNED_PIXELS, CheckedPhoto, Dimensions, check_photo
from pipeline.errors import BadInput

SIZE = (160, 120)
ORIENTATION = 0x0112
END = b"\xff\xd9"


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.frombytes("L", size, Random(seed).randbytes(size[0] * size[1]))


def encoded(
    mode: str = "RGB", size: tuple[int, int] = SIZE, kind: str = "JPEG", seed: int = 0, **options: Any
) -> bytes:
    stream = io.BytesIO()
    noise(size, seed).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[ORIENTATION] = orientation
    data[0x010F] = "A maker of cameras"
    return data


def dimensions(content: bytes) -> Dimensions:
    return check_photo(content).dimensions


def codes(photo: CheckedPhoto) -> list[str]:
    return [code for code, sentence in photo.deviations if sentence]


def refusal(content: bytes) -> str:
    with pytest.raises(BadInput) as caught:
        dimensions(content)
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
    assert dimensions(encoded(mode, progressive=progressive, **options)) == Dimensions(*SIZE, 1)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (1, 1000), (1000, 1), (1281, 719)])
def test_the_dimensions_are_those_of_the_file_not_of_the_small_picture_that_is_decoded(size: tuple[int, int]) -> None:
    found = dimensions(encoded(size=size))
    assert (found.width, found.height) == size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_told_and_the_dimensions_stay_as_stored(orientation: int) -> None:
    assert dimensions(encoded(exif=exif(orientation))) == Dimensions(*SIZE, orientation)


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation: int) -> None:
    assert dimensions(encoded(exif=exif(orientation))).orientation == 1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kept", [0, 3, 8, 9, 12, 20, 30, 43])
def test_a_damaged_exif_block_does_not_make_a_good_picture_bad(kept: int) -> None:
    content = encoded(exif=exif(6))
    start = segment(content, 0xE1) + 4 + len(b"Exif\0\0")
    length = int.from_bytes(content[start - 8 : start - 6], "big") - 8
    damaged = content[: start + kept] + b"\xff" * (length - kept) + content[start + length :]
    found = dimensions(damaged)
    assert (found.width, found.height) == SIZE
    assert 1 <= found.orientation <= 8


@pytest.mark.parametrize("trailer", [b"\0", b"\n", b"\0" * 5000, b"made by a camera", END, encoded(size=(8, 8))])
def test_bytes_after_the_end_are_noticed(trailer: bytes) -> None:
    found = check_photo(encoded() + trailer)
    assert found.dimensions == Dimensions(*SIZE, 1)
    assert codes(found) == ["photo_trailing_bytes"]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_missing_end_marker_is_noticed(progressive: bool, missing: int) -> None:
    assert codes(check_photo(encoded(progressive=progressive)[:-missing])) == ["photo_no_end"]


def test_a_progressive_photo_that_ends_after_an_early_scan_is_truncated() -> None:
    content = encoded(progressive=True)
    for scan in re.finditer(b"\xff\xda", content):
        if scan.start() != content.index(b"\xff\xda"):
            assert refusal(content[: scan.start()]) == "photo_truncated"


@pytest.mark.parametrize("padding", [b"\0", b"\0" * 4096, b"\xff" * 3, b"\0\0\xff\xff", b"\xff" * 5_000_000])
def test_padding_between_segments_is_noticed(padding: bytes) -> None:
    content = encoded()
    start = segment(content, 0xDB)
    found = check_photo(content[:start] + padding + content[start:])
    assert found.dimensions == Dimensions(*SIZE, 1)
    assert codes(found) == ["photo_padding"]


@pytest.mark.parametrize("progressive", [False, True])
def test_zeros_between_coded_data_and_end_marker_are_noticed(progressive: bool) -> None:
    content = encoded(progressive=progressive)
    for padding in (bytes(1000), bytes(1000) + b"\xff\xff"):
        assert codes(check_photo(content[:-2] + padding + END)) == ["photo_padding"]


@pytest.mark.parametrize(("seed", "zeros"), [(0, 0), (1, 1), (32, 2), (34, 2)])
@pytest.mark.parametrize("trailing", [b"", b"t" * 2000])
def test_zeros_behind_the_last_scan_are_padding_whatever_other_scans_end_in(
    seed: int, zeros: int, trailing: bytes
) -> None:
    content = encoded(seed=seed, progressive=True)
    coded = [end - start for start, end, _ in read_structure(content).coded_padding]
    assert max(coded, default=0) == zeros
    for count in (*range(8), 9, 1000):
        found = check_photo(content[:-2] + bytes(count) + END + trailing)
        padding = [one.message for one in found.deviations if one.code == "photo_padding"]
        if count > 8:  # the decoder tolerates fewer behind a scan
            assert padding == [f"{count} bytes of padding between the segments"]


def test_a_copy_whose_end_is_zeros_is_truncated() -> None:
    whole = encoded("L", (320, 240), optimize=True)
    flat = Image.new("RGB", (320, 240), (200, 200, 190))
    stream = io.BytesIO()
    for seed in range(20):
        chance = Random(seed)
        spot = Image.frombytes("RGB", (3, 3), chance.randbytes(27)).resize((40, 30), Image.Resampling.BICUBIC)
        flat.paste(spot, (chance.randint(0, 319), chance.randint(0, 239)))
    flat.save(stream, "JPEG", optimize=True, quality=60)
    for content in (whole, stream.getvalue()):
        for lost in (24, 60, 120):
            assert refusal(content[: -2 - lost] + bytes(lost + 2)) == "photo_truncated"


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_of_jfif_is_noticed(version: int) -> None:
    content = encoded()
    start = segment(content, 0xE0) + 9
    assert codes(check_photo(content[:start] + bytes([version]) + content[start + 1 :])) == ["photo_header"]


def test_scan_parameters_without_a_meaning_are_noticed() -> None:
    for mode in ("RGB", "L"):
        for values in (b"\0\0\0", b"\0\x3f\x12", b"\1\5\0"):
            content = encoded(mode)
            start = segment(content, 0xDA)
            end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
            wrong = content[: end - 3] + values + content[end:]
            assert codes(check_photo(wrong)) == ["photo_header"]
            assert codes(check_photo(wrong[:-2] + bytes(99) + END)) == ["photo_padding", "photo_header"]
            assert refusal(wrong[: len(wrong) * 2 // 3] + END) == "photo_undecodable"


def test_a_progressive_scan_with_wrong_parameters_is_rejected() -> None:
    content = encoded(progressive=True)
    last = content.rindex(b"\xff\xda")
    end = last + 2 + int.from_bytes(content[last + 2 : last + 4], "big")
    assert refusal(content[: end - 3] + b"\0\0\0" + content[end:]) == "photo_undecodable"


def test_sampling_factors_that_the_decoder_does_not_know_are_named() -> None:
    content = bytearray(encoded(subsampling=0))
    frame = segment(bytes(content), 0xC0)
    for place, factors in zip((11, 14, 17), (0x21, 0x12, 0x11), strict=True):
        content[frame + place] = factors
    for unusual in (bytes(content), encoded("CMYK", subsampling=2)):
        with pytest.raises(BadInput, match="or its sampling factors unusual"):
            check_photo(unusual)


def test_a_table_of_zeros_is_damaged() -> None:
    content = encoded()
    start = segment(content, 0xDB) + 5
    assert refusal(content[:start] + bytes(64) + content[start + 64 :]) == "photo_undecodable"


def test_a_photo_without_deviation_has_no_notice() -> None:
    for base in BASES:
        assert check_photo(base).deviations == ()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "an AVIF image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "an AVIF image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "a HEIC image"),
        (b"/annex/objects/SHA256E-s9--0.jpg\n", "a git-annex pointer"),
        (b"RIFF\x24\0\0\0WEBPVP8 ", "a WebP image"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"II*\0\x08\0\0\0", "a TIFF image or a camera's raw file"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"\xef\xbb\xbf\n<HTML>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, whose content was not"),
        (b"\x1f\x8b\x08", "gzip data"),
        (b"PK\x03\x04", "a ZIP archive"),
        (bytes(5000), "filled with zero bytes"),
        (b'{"error": "not found"}', "a JSON object"),
        (b"what is this", "not a JPEG"),
    ],
)
def test_a_reject_names_what_the_file_is(content: bytes, what: str) -> None:
    with pytest.raises(BadInput, match=re.escape(what)) as caught:
        check_photo(content)
    assert caught.value.code == "photo_not_jpeg"


@pytest.mark.parametrize(("frame", "what"), [(0xC9, "arithmetic"), (0xCA, "arithmetic"), (0xC3, "lossless")])
def test_frames_that_browsers_do_not_show_are_rejected(frame: int, what: str) -> None:
    content = bytearray(encoded())
    content[segment(bytes(content), 0xC0) + 1] = frame
    with pytest.raises(BadInput, match=what) as caught:
        check_photo(bytes(content))
    assert caught.value.code == "photo_undecodable"


def repeated_scan() -> bytes:
    content = encoded(size=(1200, 1200), progressive=True, quality=5)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * 1500 + END


@pytest.mark.parametrize(
    "content",
    [
        encoded()[:2] + b"\xff\xfe\0\2" * 5_000_000 + encoded()[2:],
        b"\xff\xd8" + b"\xff" * 20_000_000,
        b"\xff\xd8" + b"\xff\xda\0\2" + b"\xff\0" * 10_000_000,
        repeated_scan(),
    ],
    ids=["empty segments", "fill bytes", "stuffed bytes", "one scan repeated"],
)
def test_no_file_takes_more_than_seconds_of_a_processor(content: bytes) -> None:
    begin = time.process_time()
    with pytest.raises(BadInput):
        check_photo(content)
    assert time.process_time() - begin < 5  # the contract allows ten; each takes a fraction of a second


def scans(content: bytes) -> int:
    return content.count(b"\xff\xda")


def with_scans(content: bytes, count: int = 1900) -> bytes:
    """Repeat the last scan of a progressive photo until it has so many, or as many bytes as a photo may have."""
    last = content[content.rindex(b"\xff\xda") : -2]
    most = (MAXIMUM_PHOTO_BYTES - len(content) - 10) // len(last)
    return content[:-2] + last * min(most, count - scans(content)) + END


def flat(mode: str, width: int, height: int, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, "JPEG", quality=60, **options)
    return stream.getvalue()


#: The most that each limit lets pass: pixels, bytes, scans with many pixels, and many scans.
WORST: dict[str, Callable[[], bytes]] = {
    "pixels": lambda: flat("RGB", 12_000, MAXIMUM_PIXELS // 12_000, subsampling=0),
    "pixels of four colours": lambda: flat("CMYK", 12_000, MAXIMUM_PIXELS // 12_000),
    "bytes": lambda: encoded("L", (5_000, 5_000), quality=97),
    "bytes of a progressive photo": lambda: encoded("L", (4_000, 4_000), quality=98, progressive=True),
    "large scans": lambda: with_scans(flat("L", 5_000, 5_000, progressive=True), MAXIMUM_SCANNED_PIXELS // 5_000**2),
    "many scans": lambda: with_scans(encoded("L", (700, 700), quality=10, progressive=True)),
    "many scans of little": lambda: with_scans(flat("L", 720, 720, progressive=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORST)
def test_the_worst_photo_that_the_limits_let_pass_takes_less_than_ten_seconds(name: str) -> None:
    content = WORST[name]()
    for padding in (b"", b"\0\0\0"):  # zeros at the end make more attempts
        whole = content[:-2] + padding + END
        assert len(whole) <= MAXIMUM_PHOTO_BYTES
        begin = time.process_time()
        try:
            check_photo(whole)
        except BadInput as exc:  # repeated scans are not data of a whole photo, which only decoding finds out
            assert exc.code == "photo_undecodable"  # noqa: PT017
        seconds = time.process_time() - begin
        print(f"{name}: {len(whole) >> 20} MiB, {scans(whole)} scans, {seconds:.2f} s")
        assert seconds < 10


def test_a_photo_with_a_second_picture_in_it_has_the_dimensions_of_the_first() -> None:
    stream = io.BytesIO()
    second = Image.new("RGB", (8, 8))
    noise(SIZE).convert("RGB").save(stream, "MPO", save_all=True, append_images=[second])
    assert dimensions(stream.getvalue()) == Dimensions(*SIZE, 1)


# Photos that end too early


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_truncation_that_loses_scan_data_is_noticed(mode: str, progressive: bool) -> None:
    content = encoded(mode, (96, 64), progressive=progressive)
    scan = segment(content, 0xDA)
    cuts = {*range(scan, len(content) - 2, 41), *range(len(content) - 40, len(content) - 2)}
    assert {refusal(content[:cut]) for cut in cuts} == {"photo_truncated"}
    assert {refusal(content[:cut] + END) for cut in cuts if cut > scan + 20} == {"photo_undecodable"}


def test_a_cut_before_the_picture_is_noticed_even_behind_a_thumbnail() -> None:
    whole = encoded()
    thumbnail = b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0\0\0\0\0" + encoded(size=(32, 24))
    block = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    content = whole[:2] + block + whole[2:]
    assert dimensions(content) == Dimensions(*SIZE, 1)
    for cut in (len(block) // 2, len(block), len(block) + 2, len(block) + 10, len(content) // 2):
        with pytest.raises(BadInput):
            dimensions(content[:cut])


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
        dimensions(encoded(kind="PNG"))


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
        dimensions(b"\xff\xd8" * is_jpeg + content)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(BASES), st.lists(st.tuples(st.integers(2, 2000), st.integers(0, 255)), min_size=1, max_size=8))
def test_only_bad_input_escapes_for_flipped_bytes(base: bytes, flips: list[tuple[int, int]]) -> None:
    content = bytearray(base)
    for position, value in flips:
        content[2 + position % (len(content) - 2)] = value
    try:
        found = dimensions(bytes(content))
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
        found = dimensions(base[:start] + base[start + length :])
    except BadInput as exc:
        code = exc.code
    else:
        assert found.orientation in range(1, 9)
        return
    assert code in ("photo_truncated", "photo_undecodable", "photo_too_large")


def test_a_trailer_that_looks_like_a_scan_does_no_harm() -> None:
    assert dimensions(encoded() + b"\xff\xda and the like") == Dimensions(*SIZE, 1)


def test_a_progressive_picture_whose_coefficients_would_fill_the_memory_is_refused() -> None:
    huge = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(huge, "JPEG", progressive=True, subsampling=0)
    assert refusal(huge.getvalue()) == "photo_too_large"
    baseline = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(baseline, "JPEG", subsampling=0)
    assert dimensions(baseline.getvalue()) == Dimensions(6000, 6000, 1)
