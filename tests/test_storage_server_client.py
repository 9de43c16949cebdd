"""The embedded Storage server with Supabase's official Python client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from storage3 import SyncStorageClient
from storage3.exceptions import StorageApiError
from storage3.types import CreateSignedUploadUrlOptions

from tests.services import StorageServer
from tests.storage_server_support import SECONDS


@pytest.fixture
def official(storage_server: StorageServer) -> Iterator[SyncStorageClient]:
    headers = {"apiKey": storage_server.key, "Authorization": f"Bearer {storage_server.key}"}
    with httpx.Client(trust_env=False, timeout=SECONDS) as session:
        yield SyncStorageClient(f"{storage_server.url}/storage/v1/", headers, http_client=session)


def test_the_official_client_manages_buckets(official: SyncStorageClient, bucket: str) -> None:
    assert official.create_bucket(bucket, options={"file_size_limit": 2000}) == {"name": bucket}
    with pytest.raises(StorageApiError) as raised:
        official.create_bucket(bucket)
    assert (raised.value.code, raised.value.status) == ("Duplicate", "409")
    found = official.get_bucket(bucket)
    assert (found.id, found.name, found.public, found.file_size_limit) == (bucket, bucket, False, 2000)
    assert bucket in [other.id for other in official.list_buckets()]
    assert official.update_bucket(bucket, {"public": True, "allowed_mime_types": ["image/*"]}) == {
        "message": "Successfully updated"
    }
    found = official.get_bucket(bucket)
    assert (found.public, found.allowed_mime_types, found.file_size_limit) == (True, ["image/*"], 2000)
    official.from_(bucket).upload("a.png", b"x", {"content-type": "image/png"})
    with pytest.raises(StorageApiError) as raised:
        official.delete_bucket(bucket)
    assert (raised.value.code, raised.value.status) == ("ResourceNotEmpty", "409")
    official.empty_bucket(bucket)
    assert official.delete_bucket(bucket) == {"message": "Successfully deleted"}
    with pytest.raises(StorageApiError) as raised:
        official.get_bucket(bucket)
    assert (raised.value.code, raised.value.status) == ("Bucket not found", "404")


def test_the_official_client_uploads_replaces_and_reads(
    official: SyncStorageClient, bucket: str, tmp_path: Path
) -> None:
    official.create_bucket(bucket)
    objects = official.from_(bucket)
    answer = objects.upload("folder/a b.txt", b"one", {"metadata": {"camera": 1}})
    assert (answer.path, answer.full_path) == ("folder/a b.txt", f"{bucket}/folder/a b.txt")
    info = objects.info("folder/a b.txt")
    assert info["content_type"] == "text/plain;charset=UTF-8"
    assert info["cache_control"] == "max-age=3600"
    assert info["metadata"] == {"camera": 1}
    with pytest.raises(StorageApiError) as raised:
        objects.upload("folder/a b.txt", b"two")
    assert (raised.value.code, raised.value.status) == ("Duplicate", "409")
    assert objects.download("folder/a b.txt") == b"one"
    objects.upload("folder/a b.txt", b"two", {"upsert": "true"})
    assert objects.download("folder/a b.txt") == b"two"
    path = tmp_path / "photo"
    path.write_bytes(os.urandom(700_000))
    objects.update("folder/a b.txt", path, {"content-type": "image/jpeg", "cache-control": "60"})
    with open(path, "rb") as handle:
        objects.upload("new", handle)
    assert objects.download("folder/a b.txt") == objects.download("new") == path.read_bytes()
    assert objects.exists("new")
    assert not objects.exists("old")
    with pytest.raises(StorageApiError) as raised:
        objects.download("old")
    assert (raised.value.code, raised.value.status) == ("not_found", "404")


def test_the_official_client_lists(official: SyncStorageClient, bucket: str) -> None:
    official.create_bucket(bucket)
    objects = official.from_(bucket)
    for key in ("b/1", "b/2", "b/c/3", "a", "C"):
        objects.upload(key, key.encode())
    assert [(entry["name"], entry["id"] is None) for entry in objects.list()] == [
        ("a", False),
        ("b", True),
        ("C", False),
    ]
    assert [entry["name"] for entry in objects.list("b")] == ["1", "2", "c"]
    assert [entry["name"] for entry in objects.list("b", {"limit": 1, "offset": 1})] == ["2"]
    assert [entry["name"] for entry in objects.list("b", {"search": "C"})] == ["c"]
    descending = objects.list("", {"sortBy": {"column": "name", "order": "desc"}})
    assert [entry["name"] for entry in descending] == ["C", "b", "a"]
    first = objects.list_v2({"limit": 3})
    assert [found.name for found in first.objects] == ["C", "a", "b/1"]
    assert first.hasNext
    second = objects.list_v2({"limit": 3, "cursor": first.nextCursor or ""})
    assert ([found.name for found in second.objects], second.hasNext) == (["b/2", "b/c/3"], False)
    level = objects.list_v2({"prefix": "b/", "with_delimiter": True})
    assert [(found.key, found.name) for found in level.folders] == [("c", "b/c/")]
    assert [(found.key, found.name) for found in level.objects] == [("1", "b/1"), ("2", "b/2")]


def test_the_official_client_moves_copies_and_removes(official: SyncStorageClient, bucket: str) -> None:
    official.create_bucket(bucket)
    objects = official.from_(bucket)
    objects.upload("a", b"content")
    assert objects.move("a", "b") == {"message": "Successfully moved"}
    copied = objects.copy("b", "c")
    assert copied["Key"] == f"{bucket}/c"
    assert objects.download("c") == objects.download("b") == b"content"
    removed = objects.remove(["b", "missing", "c", "c"])
    assert [entry["name"] for entry in removed] == ["b", "c"]
    assert objects.list() == []


def test_the_official_client_signs_addresses(official: SyncStorageClient, bucket: str) -> None:
    official.create_bucket(bucket)
    objects = official.from_(bucket)
    objects.upload("folder/a b", b"content")
    signed = objects.create_signed_url("folder/a b", 60, {"download": "name.txt"})
    with httpx.Client(trust_env=False, timeout=SECONDS) as nobody:
        answer = nobody.get(signed["signedURL"] or "")
        assert (answer.status_code, answer.content) == (200, b"content")
        assert answer.headers["Content-Disposition"] == "attachment; filename*=UTF-8''name.txt"
        good, bad = objects.create_signed_urls(["folder/a b", "missing"], 60)
        assert nobody.get(good["signedURL"] or "").content == b"content"
        assert bad["signedURL"] is None
        assert bad["error"] == "Either the object does not exist or you do not have access to it"
        public = objects.get_public_url("folder/a b")
        assert nobody.get(public).json()["code"] == "NoSuchBucket"
        official.update_bucket(bucket, {"public": True})
        assert nobody.get(public).content == b"content"


def test_the_official_client_uploads_to_a_signed_address(official: SyncStorageClient, bucket: str) -> None:
    official.create_bucket(bucket)
    objects = official.from_(bucket)
    signed = objects.create_signed_upload_url("a")
    answer = objects.upload_to_signed_url("a", signed["token"], b"one")
    assert answer.full_path == f"{bucket}/a"
    with pytest.raises(StorageApiError) as raised:
        objects.upload_to_signed_url("a", signed["token"], b"two")
    assert (raised.value.code, raised.value.status) == ("Duplicate", "409")
    with pytest.raises(StorageApiError) as raised:
        objects.upload_to_signed_url("b", signed["token"], b"two")
    assert raised.value.code == "InvalidSignature"
    again = objects.create_signed_upload_url("a", CreateSignedUploadUrlOptions(upsert="true"))
    for content in (b"two", b"three"):
        objects.upload_to_signed_url("a", again["token"], content)
        assert objects.download("a") == content
