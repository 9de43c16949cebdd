"""Menus, receipts and names of photos: what is rejected says why, and what is unusual is used and noticed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from pipeline.config import Settings
from pipeline.dataset.annotations import read_entries
from pipeline.dataset.dates import captured_on, check_date
from pipeline.dataset.documents import check_menu, check_receipt
from pipeline.errors import BadInput
from tests import world
from tests.services import MakeDataset, RunPipeline

ROOT = Path(__file__).parents[1]
SMALL_PHOTO = (160, 120)
DISH = {"Name": "Борщ", "ExternalId": "1"}
ENTRY = '{"ExternalId": "1", "Name": "Борщ"}'
BOM = b"\xef\xbb\xbf"


def refusal(check: Any, content: bytes) -> tuple[str, str]:
    with pytest.raises(BadInput) as caught:
        check(content)
    return caught.value.code, caught.value.message


def menu(**fields: object) -> bytes:
    return json.dumps([{"ExternalId": "1", "Name": "n", **fields}]).encode()


def receipt(count: object = 1, **fields: object) -> bytes:
    return json.dumps([{"Count": count, "Dishes": [DISH], **fields}]).encode()


@pytest.mark.parametrize(
    ("check", "text", "key"),
    [
        (check_receipt, '[{"Count": 1, "Count": 3, "Dishes": [{"Name": "n", "ExternalId": "1"}]}]', "Count"),
        (check_receipt, '[{"Count": 1, "\\u0043ount": 1, "Dishes": [{"Name": "n", "ExternalId": "1"}]}]', "Count"),
        (check_receipt, '[{"Count": 1, "Dishes": [{"Name": "n", "ExternalId": "1", "Name": "n"}]}]', "Name"),
        (check_menu, '[{"ExternalId": "1", "ExternalId": "2", "Name": "n"}]', "ExternalId"),
        (check_menu, '[{"ExternalId": "1", "Name": "n", "x": {"a": {"Вес": 1, "Вес": 1}}}]', "Вес"),
        (check_menu, '[{"ExternalId": "1", "Name": "n", "\\u0000": 1, "\\u0000": 1}]', "\\u0000"),
        (check_menu, '[{"ExternalId": "1", "Name": "n", "\\ud83d": 1, "\\ud83d": 1}]', "?"),
    ],
)
def test_a_key_that_is_there_twice_is_named(check: Any, text: str, key: str) -> None:
    assert refusal(check, text.encode()) == ("json_broken", f"the key {key} is there twice in one object")


def test_a_key_twice_in_a_value_of_the_annotations_spoils_that_photo_alone(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    twice = '{"dishes": {"qwen_detections": [{"label": "plate", "label": "dish_0", "bbox_2d": [1, 2, 3, 4]}]}}'
    path.write_text(f'{{"a": {twice}, "b": {{"dishes": {{"qwen_detections": []}}}}}}', encoding="utf-8")
    with open(path, "rb") as stream:
        first, second = read_entries(stream, set())
    assert first.problem is not None
    assert (first.problem.code, first.problem.message) == (
        "json_broken",
        "the key label is there twice in one object",
    )
    assert (first.size, first.value) == (len(twice), None)
    assert (second.key, second.problem) == ("b", None)


LIST = f"[{ENTRY}]"


@pytest.mark.parametrize(
    ("content", "code", "sentence"),
    [
        (b"", "json_broken", "the file is empty"),
        (b" \n\t ", "json_broken", "the file is nothing but white space"),
        (BOM, "json_broken", "the file is nothing but white space"),
        (b"\0" * 512, "json_broken", "the file is filled with zero bytes"),
        (b"\0", "json_broken", "the file is filled with zero bytes"),
        (LIST.encode()[:-9] + b"\0" * 512, "json_broken", "the file is no JSON, or cut: Invalid control"),
        (LIST.encode() + b"\0" * 512, "json_broken", "the file is no JSON, or cut: Extra data"),
        (b"[" + b"\0" * 511, "json_broken", "the file is no JSON, or cut: Expecting value"),
        (LIST.encode("utf-16"), "json_broken", "the file is UTF-16 text, not UTF-8"),
        (LIST.encode("utf-16")[:-1], "json_broken", "the file is UTF-16 text, not UTF-8"),
        (LIST.encode("utf-16-le"), "json_broken", "the file is UTF-16 text, not UTF-8"),
        (LIST.encode("utf-16-be"), "json_broken", "the file is UTF-16 text, not UTF-8"),
        (LIST.encode("utf-32"), "json_broken", "the file is UTF-32 text, not UTF-8"),
        (LIST.encode("cp1251"), "json_broken", "the file is not UTF-8, or cut (byte "),
        (BOM + BOM + LIST.encode(), "json_broken", "the file is text with two byte order marks"),
        (gzip.compress(LIST.encode(), mtime=0), "json_broken", "the file is gzip data"),
        (b"PK\x03\x04\x14\0\0\0", "json_broken", "the file is a ZIP archive"),
        (b"\x89PNG\r\n\x1a\n", "json_broken", "the file is a PNG image"),
        (b"%PDF-1.7\n", "json_broken", "the file is a PDF document"),
        (b"<!DOCTYPE html><html></html>", "json_broken", "the file is an HTML page"),
        (BOM + b"<menu></menu>", "json_broken", "the file is an XML or SVG document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "json_broken", "the file is a Git LFS pointer"),
        (LIST.encode()[:-1], "json_broken", "the file is no JSON, or cut: "),
        (LIST.encode()[:12], "json_broken", "the file is no JSON, or cut: "),
        (LIST.encode()[: LIST.index("Б") + 1], "json_broken", "the file is not UTF-8, or cut (byte "),
        ((LIST[: LIST.index("Б")] + "Б").encode()[:-1], "json_broken", "the file is not UTF-8, or cut (byte "),
        (f"{ENTRY}\n{ENTRY}\n".encode(), "json_broken", "the file is no JSON, or cut: Extra data: line 2"),
        (f"[{ENTRY},]".encode(), "json_broken", "the file is no JSON, or cut: "),
        (b"ExternalId;Name\n1;n\n", "json_broken", "the file is a table of text (CSV)"),
        (menu(Price=float("nan")), "json_broken", "the file contains NaN, which is not JSON"),
        (menu(Price=float("-inf")), "json_broken", "the file contains -Infinity, which is not JSON"),
        (menu().replace(b'"n"', b'"n", "Price": 1e400'), "json_shape", "the number 1e400 is too large"),
        (menu().replace(b'"n"', b'"n", "x": -1' + b"0" * 400), "json_shape", "the number -1000000000000000000… is too"),
        (b'"' + b"[]" + b'"', "json_shape", 'the menu is "[]", not an array'),
        (b"null", "json_shape", "the menu is null, not an array"),
        (b"{}", "json_shape", "the menu is an object, not an array; its fields are none"),
        (
            b'{"value": [], "Count": 0}',
            "json_shape",
            "the menu is an object, not an array; its fields are v",
        ),
        (b'{"Name": "n"}', "json_shape", "the menu is an object, not an array; its fields are Name"),
        (b'[["1"]]', "json_shape", 'entry 1 of the menu is ["1"], not an object'),
        (
            b'[{"externalId": "1", "Name": "n"}]',
            "json_shape",
            "entry 1 of the menu has no ExternalId; its fields are ext",
        ),
        (
            b'[{"external_id": "1", "Name": "n"}]',
            "json_shape",
            "entry 1 of the menu has no ExternalId; its fields are e",
        ),
        (
            b'[{"ExternalId": "1", "name": "n"}]',
            "json_shape",
            "entry 1 of the menu has no Name; its fields are Ext",
        ),
        (b'[{"Name": "n"}]', "json_shape", "entry 1 of the menu has no ExternalId"),
        (menu(ExternalId=104500.0), "json_shape", "entry 1 of the menu has 104500.0 as ExternalId"),
        (menu(ExternalId=None), "json_shape", "entry 1 of the menu has null as ExternalId"),
        (menu(ExternalId=True), "json_shape", "entry 1 of the menu has true as ExternalId"),
        (menu(ExternalId="  "), "json_shape", 'entry 1 of the menu has "  " as ExternalId'),
        (menu(Name=5), "json_shape", "entry 1 of the menu has 5 as Name"),
        (menu(Name="n" * 1001), "json_shape", "entry 1 of the menu has more than 1,000 characters as Name"),
        (menu().replace(b'"n"', b'"n", "x": 1e-100'), "json_shape", "the number 1e-100 is too large or has too many"),
        (menu().replace(b'"n"', b'"n", "x": -1E+0100'), "json_shape", "the number -1E+0100 is too large"),
        (menu(Name=["x" * 500]), "json_shape", 'entry 1 of the menu has ["xxxx'),
        (menu(Name={"x": "\ud83d"}).replace(b"\\ud83d", b"\\\\"), "json_shape", "entry 1 of the menu has {"),
        (b'[{"ExternalId": "1", "Name": "\\udc00"}]', "json_broken", "a string contains half a surrogate pair"),
        (b"[" * 50_000 + b"]" * 50_000, "json_shape", "the file is nested too deeply"),
        (menu(x=1).replace(b"1}", b"[" * 99 + b"]" * 99 + b"}"), "json_shape", "the file is nested too deeply"),
    ],
)
def test_a_refusal_says_what_the_document_is(content: bytes, code: str, sentence: str) -> None:
    found = refusal(check_menu, content)
    assert found[0] == code
    assert found[1].startswith(sentence)
    assert len(found[1]) < 200
    assert found[1].isprintable()
    assert found[1].encode()


@pytest.mark.parametrize(
    ("content", "code", "sentence"),
    [
        (receipt(0), "receipt_count", "line 1 of the receipt has a Count of 0"),
        (receipt(-0.5), "receipt_count", "line 1 of the receipt has a Count of -0.5"),
        (receipt(1000.5), "receipt_count", "line 1 of the receipt has a Count of 1000.5"),
        (receipt(10**9), "receipt_count", "line 1 of the receipt has a Count of 1000000000"),
        (receipt("0.350"), "json_shape", 'line 1 of the receipt has "0.350" as Count'),
        (receipt(None), "json_shape", "line 1 of the receipt has null as Count"),
        (receipt(True), "json_shape", "line 1 of the receipt has true as Count"),
        (b'[{"count": 1, "Dishes": []}]', "json_shape", "line 1 of the receipt has no Count; its fields are count"),
        (
            receipt(Dishes=[{**DISH, "Name": "n" * 1001}]),
            "json_shape",
            "dish 1 of line 1 of the receipt has more than 1,0",
        ),
        (receipt(Dishes=[]), "json_shape", "line 1 of the receipt has no dish"),
        (receipt(Dishes="System.Object[]"), "json_shape", 'line 1 of the receipt has "System.Object'),
        (receipt(Dishes=["@{Name=n}"]), "json_shape", 'line 1 of the receipt has "@{Name=n}" as a dish, not an object'),
        (receipt(Dishes=[DISH, {"Name": "n", "ExternalId": 1.5}]), "json_shape", "dish 2 of line 1 of the receipt has"),
        (receipt(Dishes={"Name": "n"}), "json_shape", "dish 1 of line 1 of the receipt has no ExternalId"),
        (b'{"Count": 1}', "json_shape", "the receipt is an object, not an array; its fields are Count"),
    ],
)
def test_a_refusal_of_a_receipt_names_the_line(content: bytes, code: str, sentence: str) -> None:
    found = refusal(check_receipt, content)
    assert found[0] == code
    assert found[1].startswith(sentence)


def codes(check: Any, value: object) -> list[str]:
    return [one.code for one in check(json.dumps(value).encode())]


def test_a_document_as_the_till_writes_it_has_no_notice() -> None:
    whole = [{"ExternalId": 5, "Name": "n", "Category": None, "Price": price} for price in (None, 0, 12.5, "12.50")]
    assert check_menu(json.dumps(whole).encode()) == ()
    assert check_menu(menu(Name="n" * 1000).replace(b"}", b', "x": [1e99, -1E-99, 0e5]}')) == ()
    assert check_receipt(receipt(2)) == check_receipt(receipt(2.0)) == check_receipt(b"[]") == ()


def test_one_object_with_all_its_fields_is_an_array_of_one() -> None:
    line = {"Count": 1, "Dishes": [DISH]}
    assert codes(check_menu, DISH) == ["json_single_object"]
    assert codes(check_receipt, line) == ["json_single_object"]
    assert codes(check_receipt, [{**line, "Dishes": DISH}]) == ["json_single_object"]
    [both] = check_receipt(json.dumps({**line, "Dishes": DISH}).encode())
    assert both.message == "the receipt is one object, not an array"


@pytest.mark.parametrize("amount", [0.350, 1.5, 0.001, 250.75, 999.999])
def test_any_fraction_is_one_item_of_that_amount(amount: float) -> None:
    [found] = check_receipt(receipt(amount))
    assert found.code == "receipt_fraction"
    assert str(amount) in found.message


def test_each_kind_of_notice_is_there_once() -> None:
    lines = [{"Count": 0.5 + n, "Dishes": [DISH]} for n in range(3)]
    [found] = check_receipt(json.dumps(lines).encode())
    assert found == ("receipt_fraction", "line 1 of the receipt has a Count of 0.5: it is one item of that amount")


PRICES: dict[object, str | None] = {
    "12,50": "12.50",
    "12,5": "12.5",
    "0,350": "0.350",
    "1 234,50": "1234.50",
    "1\u00a0234,50": "1234.50",
    "1\u202f234\u2009567": "1234567",
    "1'234.50": "1234.50",
    "1’234": "1234",
    "1,234.50": "1234.50",
    "1.234,50": "1234.50",
    "12.50 ₽": "12.50",
    "12,50 €": "12.50",
    "$3.20": "3.20",
    "€ 3,20": "3.20",
    "120 руб.": "120",
    "120 РУБ": "120",
    "120р.": "120",
    "RUB 99.90": "99.90",
    " 12.50\u00a0": "12.50",
    "-12,50": "-12.50",
    "+5": "5",
    "007": "7",
    "0.340": "0.34",
    12.340000000000001: "12.34",
    "0.345": None,
    0.345: None,
    "12.3456": None,
    "1234.567": None,
    "9999999.99": "9999999.99",
    5: "5",
    -1: "-1",
    12.5: "12.5",
    9_999_999: "9999999",
    "": None,
    " ": None,
    "по запросу": None,
    "1,234": None,
    "1.234": None,
    "1.234 €": None,
    "-12.500": None,
    "uſd 5": None,
    "5 \u212azt": None,
    "12,500": None,
    "1.234.567": None,
    "12 50": None,
    "1 23,50": None,
    "12.": None,
    ",50": None,
    "12,50,00": None,
    "от 120": None,
    "2 шт": None,
    "12 руб 50 коп": None,
    "$": None,
    "1e3": None,
    "0x10": None,
    "NaN": None,
    "١٢": None,
    "12.50\n": None,
    "10000000": None,
    10_000_000: None,
    1e300: None,
    "9" * 100: None,
    "9" * 101: None,
}


@pytest.fixture
def price_in_sql(database_url: str) -> Iterator[Callable[[object], str | None]]:
    with closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:

        def price(value: object) -> str | None:
            cursor.execute("SELECT ingest.price_of(%s::jsonb)::text", (json.dumps(value),))
            found: list[tuple[str | None]] = cursor.fetchall()
            return found[0][0]

        yield price


def test_the_amount_of_a_price(price_in_sql: Callable[[object], str | None]) -> None:
    for value, amount in [*PRICES.items(), (True, None), (False, None)]:
        found = price_in_sql(value)
        assert (value, found and Decimal(found)) == (value, amount and Decimal(amount))
    assert price_in_sql(None) is None


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("recognition_7_2025-10-11_Main.jpg", date(2025, 10, 11)),
        ("recognition_7_20251011_Main.jpg", date(2025, 10, 11)),
        ("recognition_7_20251011_123000_Main.jpg", date(2025, 10, 11)),
        ("recognition_7_20251011123000_Main.jpg", date(2025, 10, 11)),
        ("recognition_7_11.10.2025_Main.jpg", date(2025, 10, 11)),
        ("recognition_7_2025_10_11_Main.jpg", date(2025, 10, 11)),
        ("recognition_7_2025.10.11_Main.jpg", date(2025, 10, 11)),
        ("recognition_7_11-10-2025_Main.jpg", date(2025, 10, 11)),
        ("recognition_7_1_10_2025_Main.jpg", date(2025, 10, 1)),
        ("recognition_7_05.06.2025_Main.jpg", date(2025, 6, 5)),
        ("7_2025-1-5_Main.jpg", date(2025, 1, 5)),
        ("Main 2025-10-11T12.30.00.jpg", date(2025, 10, 11)),
        ("recognition_7_2025-13-45_2025-10-11_Main.jpg", date(2025, 10, 11)),
    ],
)
def test_dates_in_names_are_understood(name: str, day: date) -> None:
    assert captured_on(f"recognition_7/photos/{name}", 7) == day
    assert check_date(f"recognition_7/photos/{name}", 7) == ()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("recognition_7_2025-02-30_Main.jpg", "2025-02-30"),
        ("recognition_7_20251345_Main.jpg", "20251345"),
        ("recognition_7_10.31.2025_Main.jpg", "10.31.2025"),
        ("recognition_7_11.10.25_Main.jpg", "11.10.25"),
        ("recognition_7_251011_Main.jpg", "251011"),
        ("recognition_7_11-Oct-2025_Main.jpg", "2025"),
        ("recognition_7_1760140800_Main.jpg", "1760140800"),
    ],
)
def test_what_only_looks_like_a_date_is_noticed(name: str, shown: str) -> None:
    assert captured_on(name, 7) is None
    [found] = check_date(name, 7)
    assert (found.code, found.message) == ("date_unknown", f"the name has {shown}, which is no known form of a date")


def test_a_name_without_a_date_or_with_the_recognition_for_one_is_not_noticed() -> None:
    names = ("Main.jpg", "recognition_7_Main.jpg", "recognition_7_1_Main.jpg", "recognition_7_Main (1).jpg")
    for name, number in [*((name, 7) for name in names), ("recognition_20251011_Main.jpg", 20251011)]:
        assert (captured_on(name, number), check_date(name, number)) == (None, ())
    assert (captured_on("20251011_Main.jpg", 20251011), check_date("20251011_Main.jpg", 20251011)) == (None, ())
    assert captured_on("11.10.2025_Main.jpg", 11) == date(2025, 10, 11)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("recognition_2024_10_11_2025_Main.jpg", 2024),
        ("recognition_4045_10_11_2025_Main.jpg", 4045),
        ("recognition_4045-10-11-2025_Main.jpg", 4045),
        ("4045_10_11_2025_recognition_Main.jpg", 4045),
        ("recognition_0007_10_11_2025_Main.jpg", 7),
        ("recognition_2025_2025-11-10_Main.jpg", 2025),
        ("recognition_2025-11-10_Main.jpg", 2025),
        ("2025-11-10_recognition_2025_Main.jpg", 2025),
        ("recognition_10_11_2025_Main.jpg", 10),
        ("10.11.2025_12.30_Main.jpg", 10),
        ("20240102-recognition_2025-11-10_Main.jpg", 20240102),
        ("20240102_10.11.2025_Main.jpg", 20240102),
        ("Main_20251110_4045.jpg", 4045),
    ],
)
def test_the_number_of_the_recognition_is_no_part_of_the_date(name: str, number: int) -> None:
    assert captured_on(name, number) == date(2025, 11, 10)
    assert check_date(name, number) == ()


def test_a_date_before_2000_or_in_the_future_is_used_and_noticed() -> None:
    today = datetime.now(timezone.utc).date()
    for day, usual in (
        (date(1970, 1, 1), False),
        (date(1999, 12, 31), False),
        (date(2000, 1, 1), True),
        (today, True),
        (today + timedelta(days=3), False),
        (date(9999, 12, 31), False),
    ):
        name = f"recognition_7_{day}_Main.jpg"
        assert captured_on(name, 7) == day
        assert [one.code for one in check_date(name, 7)] == ([] if usual else ["date_unlikely"])


def test_unusual_documents_are_loaded_and_noticed_with_their_recognition(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(5)
    dsn = settings.database_url.reveal()
    first, second, third, fourth, fifth = sorted(world.folders(dataset))
    lines = [{"Count": 2.0, "Dishes": [DISH]}, {"Count": 0.350, "Dishes": DISH}, {"Count": 1.5, "Dishes": [DISH, DISH]}]
    paths = {
        first: document(dataset, first, "correct_dishes", lines),
        second: document(dataset, second, "correct_dishes", lines[0]),
        third: document(dataset, third, "AM", {"ExternalId": "1", "Name": "n", "Price": "12,50 €"}),
        fourth: document(dataset, fourth, "AM", [{"ExternalId": "1", "Name": "n", "Price": "от 12"}, DISH]),
    }
    whole = dataset / paths[first]  # an amount that is two as a float
    whole.write_text(whole.read_text(encoding="utf-8").replace("2.0", "1.99999999999999999999"), encoding="utf-8")
    photo = next(world.folders(dataset)[fifth].rglob("*_Main.jpg"))
    renamed = photo.rename(photo.with_name(f"recognition_{fifth}_11.10.25_Main.jpg"))
    paths[fifth] = str(renamed.relative_to(dataset))
    done = run_pipeline("load", "--source", dataset, "--batch-id", "b1")
    assert done.returncode == 0, done.stderr
    assert "Rejected" not in done.stdout
    found = world.query(
        dsn, "SELECT recognition_id, path, code, step FROM ingest.notices WHERE shard > 0 ORDER BY 1, 3"
    )
    assert found == [
        (first, paths[first], "json_single_object", "upload"),
        (first, paths[first], "receipt_fraction", "upload"),
        (second, paths[second], "json_single_object", "upload"),
        (third, paths[third], "json_single_object", "upload"),
        (fourth, paths[fourth], "price_unknown", "copy"),
        (fifth, paths[fifth], "date_unknown", "upload"),
    ]
    items = world.query(
        dsn,
        "SELECT recognition_id, line_number, ordinal, metadata ->> 'name', metadata ->> 'amount'"
        " FROM public.initial_tray_items"
        f" WHERE recognition_id IN ({first}, {second}) ORDER BY 1, 2, 3",
    )
    assert items == [
        (first, 1, 1, "Борщ", None),
        (first, 1, 2, "Борщ", None),
        (first, 2, 1, "Борщ", "0.35"),
        (first, 3, 1, "Борщ", "1.5"),
        (second, 1, 1, "Борщ", None),
        (second, 1, 2, "Борщ", None),
    ]
    quantities = "SELECT array_agg(quantity ORDER BY line_number) FROM public.recipe_lines JOIN public.recipes p"
    assert world.query(dsn, f"{quantities} ON p.id = recipe_id WHERE p.recognition_id = {first}") == [([2, 1, 1],)]
    prices = "SELECT external_id, price::text, metadata FROM public.recognition_active_menu_items WHERE recognition_id"
    assert world.query(dsn, f"{prices} = {third}") == [("1", "12.50", {"Price": "12,50 €"})]
    assert world.query(dsn, f"{prices} = {fourth} ORDER BY metadata DESC") == [
        ("1", None, {"Price": "от 12"}),
        ("1", None, {}),
    ]
    assert world.query(dsn, f"SELECT captured_on FROM public.recognitions WHERE id = {fifth}") == [(None,)]
    assert world.inconsistencies(settings) == []
    assert world.dangling(settings) == []


def test_a_menu_that_recognitions_share_is_noticed_for_each_of_them(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(3)
    numbers, price = sorted(world.folders(dataset)), "по запросу " * 9
    for number in numbers:
        document(dataset, number, "AM", [{**DISH, "Price": "12"}, {**DISH, "Price": price}, {**DISH, "Price": "?"}])
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1", "--workers", "2").returncode == 0
    dsn = settings.database_url.reveal()
    found = world.query(dsn, "SELECT recognition_id, code, message FROM ingest.notices WHERE shard > 0 ORDER BY 1")
    message = f'entry 2 of the menu has the Price "{price[:59]}…", which is no amount'
    assert found == [(number, "price_unknown", message) for number in numbers]


def test_a_shard_that_is_uploaded_again_has_its_notices_once(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(2)
    dsn = settings.database_url.reveal()
    for number in world.folders(dataset):
        document(dataset, number, "AM", {**DISH, "Price": "?"})
    world.query(dsn, "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard < 0)")
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 3
    world.query(dsn, "ALTER TABLE raw.menus DROP CONSTRAINT never")
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    found = world.query(dsn, "SELECT code, step, count(*) FROM ingest.notices WHERE shard > 0 GROUP BY 1, 2 ORDER BY 1")
    assert found == [("json_single_object", "upload", 2), ("price_unknown", "copy", 2)]


def test_a_recognition_that_is_rejected_has_no_notice(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(2)
    first, second = sorted(world.folders(dataset))
    document(dataset, first, "AM", {**DISH, "Price": "?"})
    document(dataset, first, "correct_dishes", [{"Count": 0, "Dishes": [DISH]}])
    document(dataset, second, "AM", [DISH])
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    dsn = settings.database_url.reveal()
    assert world.query(dsn, "SELECT recognition_id, code FROM ingest.rejects") == [(first, "receipt_count")]
    assert world.query(dsn, "SELECT * FROM ingest.notices WHERE shard > 0") == []
    world.check(settings, (dataset, "b1", [second]))


def document(dataset: Path, number: int, kind: str, value: object) -> str:
    """Replace the documents of a kind in a recognition's folder by one with this value; return its path."""
    folder = world.folders(dataset)[number]
    for path in folder.glob(f"*_{kind}.json"):
        path.unlink()
    path = folder / f"{number}_recognition_2025-10-11_{kind}.json"
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return str(path.relative_to(dataset))
