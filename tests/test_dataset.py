"""dataset.py and photo.py: every kind of reject, with real files."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from datetime import date
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.dataset.documents import check_menu, check_receipt, json_of
from pipeline.dataset.layout import find_source, list_folders
from pipeline.dataset.photo import check_photo
from pipeline.dataset.recognition import inspect_folder
from pipeline.dataset.records import Folder, Notice, Recognition, Reject
from pipeline.errors import BadInput, UsageError


def jpeg(size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    image = Image.frombytes("L", size, Random(0).randbytes(size[0] * size[1])).convert("RGB")
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def make(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


GOOD = {
    "photos/recognition_7_2025-10-11_Main.jpg": jpeg(),
    "photos/recognition_7_2025-10-11_Qualifying.jpg": jpeg(),
}


def look(tmp_path: Path, files: dict[str, bytes], name: str = "recognition_7") -> Recognition | Reject:
    make(tmp_path / name, files)
    return inspect_folder(tmp_path, Folder(7, name)).result


def test_a_hidden_folder_is_not_searched_and_says_so(tmp_path: Path) -> None:
    photo = tmp_path / ".hidden" / "recognition_5" / "5_Main.jpg"
    photo.parent.mkdir(parents=True)
    photo.touch()
    [notice] = list_folders(tmp_path, Counter())
    assert isinstance(notice, Notice)
    assert (notice.code, notice.path) == ("folder_unknown", ".hidden")
    assert notice.message == "a folder whose name begins with a dot is not searched; it has 1 file"


def test_both_layouts_and_names_are_found(tmp_path: Path) -> None:
    for path in ("recognition_1", "2", "export_b/recognition_3", "export_b/4", "export_a/3", "notes/x", ".git/5"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "recognition_6").write_text("a file")
    found = {(one.recognition_id, one.path) for one in list_folders(tmp_path, Counter()) if isinstance(one, Folder)}
    assert found == {
        (1, "recognition_1"),
        (2, "2"),
        (3, "export_b/recognition_3"),
        (4, "export_b/4"),
        (3, "export_a/3"),
    }


def test_numbers_beyond_bigint_are_rejected(tmp_path: Path) -> None:
    (tmp_path / str(2**63 - 1)).mkdir()
    (tmp_path / f"recognition_{2**63}").mkdir()
    (tmp_path / ("9" * 250)).mkdir()
    found = {one.path: one for one in list_folders(tmp_path, Counter())}
    assert isinstance(found[str(2**63 - 1)], Folder)
    for path in (f"recognition_{2**63}", "9" * 250):
        reject = found[path]
        assert isinstance(reject, Reject)
        assert reject.code == "id_invalid"


def test_a_whole_recognition(tmp_path: Path) -> None:
    found = look(
        tmp_path,
        {
            **GOOD,
            "7_recognition_2025-10-11_AM.json": b"[]",
            "7_recognition_2025-10-11_correct_dishes.json": b"[]",
            "photos/.DS_Store": b"x",
            "photos/._Main.jpg": b"resource fork",
            "notes.txt": b"x",
        },
    )
    assert isinstance(found, Recognition)
    assert [photo.path for photo in found.photos] == [f"recognition_7/{name}" for name in GOOD]
    assert [photo.size for photo in found.photos] == [len(content) for content in GOOD.values()]
    assert found.menu is not None
    assert found.menu.path == "recognition_7/7_recognition_2025-10-11_AM.json"
    assert found.receipt is not None
    assert found.captured_on == date(2025, 10, 11)


@pytest.mark.parametrize(
    "names",
    [
        ("Main.jpg", "Qualifying.jpg"),
        ("photos/x_MAIN.JPEG", "photos/x_qualifying.JpG"),
        ("recognition_7_Main.jpg", "photos/recognition_7_Qualifying.jpeg"),
    ],
)
def test_photos_by_any_letter_case_with_or_without_their_folder(tmp_path: Path, names: tuple[str, str]) -> None:
    found = look(tmp_path, {names[0]: b"1", names[1]: b"22", "AM.json": b"[]", "CD.json": b"[]"})
    assert isinstance(found, Recognition)
    assert [photo.size for photo in found.photos] == [1, 2]
    assert found.menu is not None
    assert found.receipt is not None
    assert found.captured_on is None


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({}, "photo_count"),
        ({"photos/a_Main.jpg": b"x"}, "photo_count"),
        ({**GOOD, "photos/b_Main.jpg": b"x"}, "photo_count"),
        ({"photos/a_Main.jpg": b"x", "photos/b_Main.jpg": b"x"}, "photo_cameras"),
        ({"photos/a.jpg": b"x", "photos/b_Main.jpg": b"x"}, "photo_cameras"),
        ({"photos/a_Main_Qualifying.jpg": b"x", "photos/b_Main.jpg": b"x"}, "photo_cameras"),
        ({"photos/a_Main.jpg": b"", "photos/b_Qualifying.jpg": b"x"}, "photo_empty"),
    ],
)
def test_rejects_that_need_no_reading(tmp_path: Path, files: dict[str, bytes], code: str) -> None:
    (tmp_path / "recognition_7").mkdir()
    found = look(tmp_path, files)
    assert isinstance(found, Reject)
    assert (found.recognition_id, found.code) == (7, code)
    assert found.message


@pytest.mark.parametrize(
    ("name", "code"), [(b"caf\xe9_AM.json", "path_encoding"), (b"caf\xe9.json", ""), (b"caf\xe9.txt", "")]
)
def test_a_name_that_is_not_utf8_rejects_only_what_would_use_it(tmp_path: Path, name: bytes, code: str) -> None:
    make(tmp_path / "recognition_7", GOOD)
    with open(os.path.join(os.fsencode(tmp_path / "recognition_7"), name), "wb"):
        pass
    inspected = inspect_folder(tmp_path, Folder(7, "recognition_7"))
    if code:
        assert isinstance(inspected.result, Reject)
        assert inspected.result.code == code
        inspected.result.message.encode()
    else:
        assert isinstance(inspected.result, Recognition)
        (notice,) = inspected.notices
        assert "caf\ufffd" in notice.path


def test_the_source_given_the_setting_and_the_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UsageError, match="looked for"):
        find_source(None, None)
    (tmp_path / "home" / "Downloads" / "RRS_Dataset 2").mkdir(parents=True)
    assert find_source(None, None) == tmp_path / "home" / "Downloads" / "RRS_Dataset 2"
    (tmp_path / "RRS_Dataset").mkdir()
    assert find_source(None, None) == tmp_path / "RRS_Dataset"
    (tmp_path / "dataset").mkdir()
    assert find_source(None, None) == tmp_path / "dataset"
    assert find_source(None, str(tmp_path / "home")) == tmp_path / "home"
    assert find_source("dataset", str(tmp_path / "home")) == tmp_path / "dataset"
    with pytest.raises(UsageError, match="does not exist"):
        find_source("nowhere", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        find_source("file", None)
    with pytest.raises(UsageError, match=r"nobody-of-that-name/x cannot be accessed: .*[^.]\.$"):
        find_source("~nobody-of-that-name/x", None)


def test_a_source_whose_path_is_not_utf8_is_refused_behind_a_link_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    try:
        os.makedirs(folder + b"/dataset")
    except OSError:
        pytest.skip("the file system takes no such name")
    (tmp_path / "link").symlink_to(os.fsdecode(folder))
    monkeypatch.chdir(os.fsdecode(folder))
    for name in (os.fsdecode(folder), str(tmp_path / "link"), None):
        with pytest.raises(UsageError, match=r"The path of the dataset, .*/\ufffd.*, is not UTF-8"):
            find_source(name, None)


MENU = [{"ExternalId": "1", "Name": "Борщ", "Category": "Супы", "Price": 120.5, "Weight": {"g": 300}}]
RECEIPT = [{"Count": 2, "Dishes": [{"Name": "Борщ", "ExternalId": "1"}, {"Name": "Щи", "ExternalId": 2}]}]


def encoded(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def test_documents_are_carried_through_as_they_are() -> None:
    for check, value in ((check_menu, MENU), (check_receipt, RECEIPT)):
        text = json.dumps(value, ensure_ascii=False, indent=3)
        check(text.encode())
        check(b"\xef\xbb\xbf" + text.encode())
        assert json_of(text.encode()) == json_of(b"\xef\xbb\xbf" + text.encode()) == text.encode()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "json_broken"),
        (b"[", "json_broken"),
        (b"[] []", "json_broken"),
        (b"[NaN]", "json_broken"),
        (b"[Infinity]", "json_broken"),
        (b'["\xd0"]', "json_broken"),
        (encoded(MENU).decode().encode("utf-16"), "json_broken"),
        (b'[{"ExternalId": "1", "Name": "\\ud83d"}]', "json_broken"),
        (b'[{"ExternalId": "1", "Name": "a\\u0000b"}]', "json_nul"),
        (b'[{"ExternalId": "1", "Name": "a", "x": {"k\\u0000": 1}}]', "json_nul"),
        (b'[{"ExternalId": "1", "Name": "\\u0000", "Name": "a"}]', "json_broken"),
        (b"{}", "json_shape"),
        (b"[1]", "json_shape"),
        (b'[{"Name": "a"}]', "json_shape"),
        (b'[{"ExternalId": true, "Name": "a"}]', "json_shape"),
        (b'[{"ExternalId": "1"}]', "json_shape"),
        (b'[{"ExternalId": "1", "Name": 5}]', "json_shape"),
        (b'[{"ExternalId": "1", "Name": "a", "Price": [1]}]', "json_shape"),
        (b'[{"ExternalId": "1", "Name": "a", "Price": 1e99999}]', "json_shape"),
        (b'[{"ExternalId": "1", "Name": "a", "Price": 1e-99999}]', "json_shape"),
        (b'[{"ExternalId": "1", "Name": "a", "Price": ' + b"9" * 5000 + b"}]", "json_shape"),
        (b"[" * 3000 + b"]" * 3000, "json_shape"),
        (b"[" * 200_000 + b"]" * 200_000, "json_shape"),
    ],
)
def test_menus_that_are_rejected(content: bytes, code: str) -> None:
    with pytest.raises(BadInput) as caught:
        check_menu(content)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("receipt", "code"),
    [
        ({}, "json_shape"),
        ([[]], "json_shape"),
        ([{"Dishes": []}], "json_shape"),
        ([{"Count": "two", "Dishes": RECEIPT[0]["Dishes"]}], "json_shape"),
        ([{"Count": True, "Dishes": RECEIPT[0]["Dishes"]}], "json_shape"),
        ([{"Count": 0, "Dishes": RECEIPT[0]["Dishes"]}], "receipt_count"),
        ([{"Count": -3, "Dishes": RECEIPT[0]["Dishes"]}], "receipt_count"),
        ([{"Count": 10**9, "Dishes": RECEIPT[0]["Dishes"]}], "receipt_count"),
        ([{"Count": 1, "Dishes": []}], "json_shape"),
        ([{"Count": 1, "Dishes": [{"Name": "a"}]}], "json_shape"),
        ([{"Count": 1, "Dishes": [{"ExternalId": "1"}]}], "json_shape"),
        ([{"Count": 1, "Dishes": ["a"]}], "json_shape"),
    ],
)
def test_receipts_that_are_rejected(receipt: object, code: str) -> None:
    with pytest.raises(BadInput) as caught:
        check_receipt(encoded(receipt))
    assert caught.value.code == code


@given(st.binary(max_size=200))
def test_no_bytes_break_the_documents(content: bytes) -> None:
    for check in (check_menu, check_receipt):
        try:
            check(content)
        except BadInput as exc:
            refused = exc.code
        else:
            assert isinstance(json.loads(content.decode("utf-8-sig")), list)
            continue
        assert refused.startswith(("json_", "receipt_"))


def test_a_good_photo_and_its_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    found = check_photo(jpeg((160, 90), exif=exif)).dimensions
    assert (found.width, found.height, found.orientation) == (160, 90, 6)
    assert check_photo(jpeg((33, 17), progressive=True)).dimensions.orientation == 1


def test_a_photo_cut_anywhere_is_noticed() -> None:
    content = jpeg((200, 120))
    for cut in (*range(2, 700, 13), *range(700, len(content) - 2, 97), len(content) - 3):
        with pytest.raises(BadInput) as caught:
            check_photo(content[:cut])
        assert caught.value.code == "photo_truncated"


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "photo_empty"),
        (png(), "photo_not_jpeg"),
        (b"GIF89a", "photo_not_jpeg"),
        (b"\xff\xd8" + b"\0" * 100 + b"\xff\xd9", "photo_undecodable"),
        (b"\xff\xd8\xff\xd9", "photo_undecodable"),
        (jpeg()[:20] + Random(0).randbytes(400) + b"\xff\xd9", "photo_undecodable"),
    ],
)
def test_photos_that_are_rejected(content: bytes, code: str) -> None:
    with pytest.raises(BadInput) as caught:
        check_photo(content)
    assert caught.value.code == code


def test_a_picture_too_large_is_refused_before_it_is_decoded() -> None:
    content = bytearray(jpeg((64, 64)))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = (60000).to_bytes(2, "big") * 2
    with pytest.raises(BadInput) as caught:
        check_photo(bytes(content))
    assert caught.value.code == "photo_too_large"


def test_an_external_id_that_no_index_takes_is_refused() -> None:
    for external_id in ("x" * 501, " " * 500 + "x"):
        menu = json.dumps([{"ExternalId": external_id, "Name": "n"}]).encode()
        with pytest.raises(BadInput, match="more than 500 characters as ExternalId"):
            check_menu(menu)
    check_menu(json.dumps([{"ExternalId": "ы" * 500, "Name": "n"}]).encode())


def test_counts_that_add_up_to_too_much_are_refused() -> None:
    line = {"Count": 1000, "Dishes": [{"Name": "n", "ExternalId": "1"}]}
    check_receipt(json.dumps([line] * 10).encode())
    with pytest.raises(BadInput, match="has 11000 dishes") as refused:
        check_receipt(json.dumps([line] * 11).encode())
    assert refused.value.code == "receipt_count"
