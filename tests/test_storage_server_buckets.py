"""Buckets of the embedded Storage server."""

from __future__ import annotations

import re
import uuid
from typing import Any
from urllib.parse import quote

import pytest

from embedded_supabase.files import wait_until
from tests import storage_server_support
from tests.storage_server_support import NO_BUCKET, NO_KEY, SECONDS, Client, create_bucket

client = storage_server_support.client
full = storage_server_support.full


def test_a_bucket_is_shown_with_its_settings(client: Client, bucket: str) -> None:
    settings = {"public": "true", "file_size_limit": "1.5MB", "allowed_mime_types": ["image/png", "text/*", "*"]}
    create_bucket(client, bucket, id=f"{bucket}-id", unknown=[1], **settings)
    assert client.send("GET", f"/bucket/{bucket}").error == NO_BUCKET
    found = client.send("GET", f"/bucket/{bucket}-id").json
    for name in ("created_at", "updated_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop(name))
    shown = {"id": f"{bucket}-id", "name": bucket, "owner": "", "public": True, "file_size_limit": 1_500_000}
    assert found == {**shown, "allowed_mime_types": ["image/png", "text/*", "*"]}
    entries = [entry for entry in client.send("GET", "/bucket").json if entry["name"] == bucket]
    assert [entry["type"] for entry in entries] == ["STANDARD"]


def test_a_number_for_a_name_is_its_text(client: Client) -> None:
    number = uuid.uuid4().int
    assert client.send("POST", "/bucket", {"name": number}).json == {"name": str(number)}
    assert client.send("GET", f"/bucket/{number}").json["name"] == str(number)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, None), (7, 7), ("7", 7), ("7B", 7), ("2KB", 2000), ("1.5mb", 1_500_000), ("0.02GB", 20_000_000)],
)
def test_a_size_limit_is_bytes_or_a_text_with_a_unit(
    client: Client, bucket: str, limit: str | int | None, expected: int | None
) -> None:
    create_bucket(client, bucket, file_size_limit=limit)
    assert client.send("GET", f"/bucket/{bucket}").json["file_size_limit"] == expected


@pytest.mark.parametrize(
    ("settings", "status", "code"),
    [
        ({"file_size_limit": "many"}, "400", "InvalidRequest"),
        ({"file_size_limit": -1}, "400", "InvalidRequest"),
        ({"file_size_limit": True}, "400", "InvalidRequest"),
        ({"file_size_limit": "51MiB"}, "400", "InvalidRequest"),
        ({"file_size_limit": (50 << 20) + 1}, "413", "EntityTooLarge"),
        ({"file_size_limit": "9GB"}, "413", "EntityTooLarge"),
        ({"file_size_limit": "9" * 6000}, "413", "EntityTooLarge"),
        ({"allowed_mime_types": "image/png"}, "400", "InvalidRequest"),
        ({"allowed_mime_types": ["image"]}, "415", "InvalidMimeType"),
        ({"allowed_mime_types": [1]}, "415", "InvalidMimeType"),
        ({"public": "yes"}, "400", "InvalidRequest"),
        ({"public": []}, "400", "InvalidRequest"),
    ],
)
def test_bad_settings_of_a_bucket_are_refused_and_nothing_changes(
    client: Client, bucket: str, settings: dict[str, Any], status: str, code: str
) -> None:
    answer = client.send("POST", "/bucket", {"name": bucket, **settings})
    assert (answer.error[0], answer.error[1], answer.error[4]) == (400, status, code)
    assert client.send("GET", f"/bucket/{bucket}").error == NO_BUCKET
    create_bucket(client, bucket)
    before = client.send("GET", f"/bucket/{bucket}").json
    for nothing in ({}, {"name": bucket}):
        assert client.send("PUT", f"/bucket/{bucket}", nothing).error[4] == "InvalidRequest"
    answer = client.send("PUT", f"/bucket/{bucket}", settings)
    assert (answer.error[0], answer.error[1], answer.error[4]) == (400, status, code)
    assert client.send("GET", f"/bucket/{bucket}").json == before


@pytest.mark.parametrize(
    "name", ["x" * 101, "", " a", "a ", "a/b", "ä", "a\n", "a%b", 'a"b', "x--table-s3", None, "a#"]
)
def test_bad_bucket_names_are_refused(client: Client, name: str | None) -> None:
    expected = (400, "400", "Invalid Input", "Bucket name invalid", "InvalidBucketName")
    assert client.send("POST", "/bucket", {"name": name}).error == expected


def test_every_legal_character_makes_a_bucket_name(client: Client) -> None:
    name = f"{uuid.uuid4().hex} _!.*'()&$@=;:+,?-"
    create_bucket(client, name)
    assert client.send("GET", f"/bucket/{quote(name, safe='')}").json["id"] == name
    assert client.upload(quote(name, safe=""), "k").json["Key"] == f"{name}/k"
    create_bucket(client, (name + "x" * 100)[:100])


def test_requests_for_a_bucket_that_is_missing_or_taken(client: Client, full: str) -> None:
    taken = (400, "409", "Duplicate", "The resource already exists", "BucketAlreadyExists")
    assert client.send("POST", "/bucket", {"name": full}).error == taken
    assert client.send("POST", "/bucket", {"name": full, "id": f"{full}-2"}).error == taken
    assert client.send("POST", "/bucket", {"name": f"{full}-2", "id": full}).error == taken
    for method, path, body in (
        ("GET", "/bucket/no", None),
        ("PUT", "/bucket/no", {"public": True}),
        ("DELETE", "/bucket/no", {}),
        ("POST", "/bucket/no/empty", {}),
        ("GET", "/object/no/k", None),
        ("GET", "/object/public/no/k", None),
        ("GET", "/object/info/no/k", None),
        ("POST", "/object/no/k", b"x"),
        ("PUT", "/object/no/k", b"x"),
        ("POST", "/object/upload/sign/no/k", None),
    ):
        assert client.send(method, path, body).error == NO_BUCKET, (method, path)
    assert client.send("DELETE", "/object/no/k").error == NO_KEY
    assert client.send("DELETE", "/object/no", {"prefixes": ["k"]}).json == []
    assert client.send("POST", "/object/list/no", {"prefix": ""}).json == []
    assert client.send("POST", "/object/list-v2/no", {}).json == {"hasNext": False, "folders": [], "objects": []}


def test_a_bucket_is_deleted_when_it_is_empty(client: Client, full: str) -> None:
    answer = client.send("DELETE", f"/bucket/{full}")
    assert answer.error[:3] + answer.error[4:] == (400, "409", "ResourceNotEmpty", "ResourceNotEmpty")
    queued = {"message": "Empty bucket has been queued. Completion may take up to an hour."}
    assert client.send("POST", f"/bucket/{full}/empty").json == queued
    assert wait_until(lambda: client.keys(full) == [], SECONDS)
    assert client.send("DELETE", f"/bucket/{full}", {}).json == {"message": "Successfully deleted"}
    assert client.send("GET", f"/bucket/{full}").error == NO_BUCKET


def test_buckets_are_listed_by_name_in_pages(client: Client, bucket: str) -> None:
    for name in ("b", "a", "c"):
        create_bucket(client, f"{bucket}-{name}")

    def names(query: str) -> list[str]:
        found = client.send("GET", f"/bucket?search={bucket}&{query}").json
        return [entry["name"][-1] for entry in found]

    assert names("") == ["a", "b", "c"]
    assert names("limit=2") == ["a", "b"]
    assert names("limit=2&offset=2") == ["c"]
    assert names("sortColumn=name&sortOrder=desc") == ["c", "b", "a"]
    assert names("sortColumn=id&sortOrder=desc") == ["c", "b", "a"]
    assert sorted(names("sortColumn=created_at")) == ["a", "b", "c"]
    assert names("sortColumn=") == ["a", "b", "c"]
    assert client.send("GET", "/bucket?limit=0").status == 400
    assert client.send("GET", "/bucket?sortColumn=owner").status == 400
