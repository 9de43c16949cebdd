"""Downloads from the embedded Storage server: headers, ranges, conditions, lost files."""

from __future__ import annotations

import http.client
import os
import time
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path

import pytest

from tests import storage_server_support
from tests.storage_server_support import Client, create_bucket

client = storage_server_support.client
full = storage_server_support.full

BAD_RANGE = (416, "416", "invalid_range", "The requested range is not satisfiable", "InvalidRange")


def test_a_download_has_the_headers_of_the_api(client: Client, full: str) -> None:
    expected = {
        "ETag": '"781e5e245d69b566979b86e28d23f2c7"',
        "Content-Type": "text/plain",
        "Content-Length": "10",
        "Cache-Control": "no-cache",
        "Accept-Ranges": "bytes",
        "X-Robots-Tag": "none",
        "Content-Encoding": None,
        "Content-Disposition": None,
    }
    for path in (
        f"/object/{full}/a/b.txt",
        f"/object/authenticated/{full}/a/b.txt",
        f"/storage/v1/object/{full}/a/b.txt",
    ):
        for method, body in (("GET", b"0123456789"), ("HEAD", b"")):
            answer = client.send(method, path, headers={"Accept-Encoding": "gzip"})
            assert (answer.status, answer.body) == (200, body)
            assert {name: answer.headers[name] for name in expected} == expected
            modified = parsedate_to_datetime(answer.headers["Last-Modified"])
            assert abs(time.time() - modified.timestamp()) < 60


@pytest.mark.parametrize("path", ["object/{}/no", "object/no/no", "object/authenticated/{}/no", "object/public/{}/no"])
def test_head_of_what_is_missing_is_a_400_without_a_body(client: Client, full: str, path: str) -> None:
    answer = client.send("HEAD", f"/{path.format(full)}")
    assert (answer.status, answer.body) == (400, b"")


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("0-0", 0, 0), ("2-5", 2, 5), ("7-", 7, 9), ("-3", 7, 9), ("-30", 0, 9), ("3-99", 3, 9), ("0-", 0, 9)],
)
def test_a_range_is_a_part(client: Client, full: str, asked: str, first: int, last: int) -> None:
    answer = client.send("GET", f"/object/{full}/a/b.txt", headers={"Range": f"bytes={asked}"})
    assert (answer.status, answer.body) == (206, b"0123456789"[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/10"
    assert answer.headers["Content-Length"] == str(last - first + 1)


@pytest.mark.parametrize(
    "asked",
    ["bytes=10-", "bytes=5-2", "bytes=-", "bytes=-0", "bytes=0-1,3-4", "bytes=a-b", "x", f"bytes={'9' * 5000}-"],
)
def test_a_range_that_is_none_is_416(client: Client, full: str, asked: str) -> None:
    answer = client.send("GET", f"/object/{full}/a/b.txt", headers={"Range": asked})
    assert answer.error == BAD_RANGE
    assert answer.headers["ETag"] is None


def test_an_empty_object_has_no_ranges(client: Client, bucket: str) -> None:
    create_bucket(client, bucket)
    client.upload(bucket, "k", b"")
    assert client.send("GET", f"/object/{bucket}/k", headers={"Range": "bytes=0-"}).error == BAD_RANGE


def test_what_the_client_has_is_not_sent_again(client: Client, full: str) -> None:
    path = f"/object/{full}/a/b.txt"
    known = client.send("HEAD", path).headers
    tag, modified = known["ETag"], parsedate_to_datetime(known["Last-Modified"])
    earlier = format_datetime(modified.replace(year=modified.year - 1), usegmt=True)
    for headers, status in (
        ({"If-None-Match": tag}, 304),
        ({"If-None-Match": f'"other", W/{tag}'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"other"'}, 200),
        ({"If-None-Match": '"other"', "If-Modified-Since": known["Last-Modified"]}, 200),
        ({"If-Modified-Since": known["Last-Modified"]}, 304),
        ({"If-Modified-Since": earlier}, 200),
        ({"If-Modified-Since": "soon"}, 200),
        ({"If-Modified-Since": "Mon, 01 Jan 99999 00:00:00 GMT"}, 200),
    ):
        for method in ("GET", "HEAD"):
            answer = client.send(method, path, headers=headers)
            assert answer.status == status, headers
            assert answer.body == (b"0123456789" if (method, status) == ("GET", 200) else b"")
            assert answer.headers["ETag"] == tag


@pytest.mark.parametrize(
    ("query", "disposition"),
    [
        ("download", "attachment"),
        ("download=", "attachment"),
        ("download=a%20b%22%0d%0a%C3%A9.png", "attachment; filename*=UTF-8''a%20b%22"),
        ("other=1", None),
    ],
)
def test_a_download_can_have_a_name(client: Client, full: str, query: str, disposition: str | None) -> None:
    found = client.send("GET", f"/object/{full}/a/b.txt?{query}").headers["Content-Disposition"]
    assert found == disposition if disposition is None else found.startswith(disposition)


@pytest.mark.parametrize(
    ("stored_type", "served"),
    [("text/html", "text/plain"), ("TEXT/HTML; charset=utf-8", "text/plain; charset=utf-8"), ("text/css", "text/css")],
)
def test_html_is_served_as_text(client: Client, bucket: str, stored_type: str, served: str) -> None:
    create_bucket(client, bucket)
    client.upload(bucket, "k", b"<script>", content_type=stored_type)
    assert client.send("GET", f"/object/{bucket}/k").headers["Content-Type"] == served
    assert client.info(bucket, "k")["content_type"] == stored_type


def file_of(client: Client, bucket: str, key: str) -> Path:
    version = str(client.info(bucket, key)["version"])
    return client.server.root / "objects" / version[:2] / version


def test_an_object_whose_file_is_gone_is_an_internal_error_until_it_is_deleted(client: Client, full: str) -> None:
    file_of(client, full, "a/b.txt").unlink()
    path = f"/object/{full}/a/b.txt"
    answer = client.send("GET", path)
    assert answer.error == (500, "500", "Internal", "No such file or directory", "InternalError")
    assert answer.headers["ETag"] is None
    assert client.send("HEAD", path).status == 200
    assert client.info(full, "a/b.txt")["size"] == 10
    assert client.send("DELETE", path).status == 200
    assert client.keys(full) == []


def test_a_file_that_is_too_short_is_not_passed_off_as_whole(client: Client, full: str) -> None:
    os.truncate(file_of(client, full, "a/b.txt"), 4)
    with pytest.raises(http.client.IncompleteRead) as raised:
        client.send("GET", f"/object/{full}/a/b.txt")
    assert raised.value.partial == b"0123"
    client.connection.close()
    assert client.send("GET", "/status").status == 200
