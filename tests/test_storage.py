"""storage.py: against the real Storage server, and for errors against a server that answers what a test tells it to."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme

from embedded_supabase.files import wait_until
from embedded_supabase.ports import free_port
from embedded_supabase.storage.auth import mint_key
from pipeline.config import Secret
from pipeline.errors import (
    AccessDenied,
    Interrupted,
    ObjectExists,
    ObjectNotFound,
    PipelineError,
    SettingsError,
    StorageError,
    StorageOverloaded,
    StorageUnavailable,
)
from pipeline.observe.metrics import Metrics
from pipeline.storage import Storage, StoredObject
from tests.scripted import (
    KEY,
    SECONDS,
    Answer,
    Request,
    Reset,
    ScriptedServer,
    Silence,
    leave_surroundings,
    settings_for,
    stored,
)
from tests.services import StorageServer, local_settings

PHOTO = b"\xff\xd8 not really a photo \xff\xd9"
#: Further tries of an overloaded server, beyond those of another transient error.
PATIENCE = 6


def error(status: int, code: str = "", said: str | int | None = None, message: str = "on purpose") -> Answer:
    """An answer in the shape of Storage's errors; `said` is the statusCode of its body."""
    body: dict[str, object] = {"statusCode": str(status) if said is None else said, "error": "x", "message": message}
    if code:
        body["code"] = code
    return Answer(status, body)


def page(*keys: str, cursor: str | None = None) -> Answer:
    objects = [{"name": key, "metadata": {"size": len(key), "eTag": f'"{md5(key.encode())}"'}} for key in keys]
    body: dict[str, object] = {"hasNext": cursor is not None, "folders": [], "objects": objects}
    if cursor is not None:
        body["nextCursor"] = cursor
    return Answer(body=body)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


HTML = Answer(502, b"<html><h1>Bad Gateway</h1></html>", {"Content-Type": "text/html"})


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_surroundings(monkeypatch)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Take the place of waiting between tries: note the longest that each wait could have been."""
    noted: list[float] = []
    monkeypatch.setattr("backoff.full_jitter", lambda value: value)
    monkeypatch.setattr("pipeline.storage.client.time", SimpleNamespace(sleep=noted.append, monotonic=time.monotonic))
    return noted


@pytest.fixture
def storage(server: ScriptedServer) -> Iterator[Storage]:
    with closing(Storage(settings_for(server.url, retry_max_attempts=2))) as storage:
        yield storage


def failure(storage: Storage, work: Callable[[Storage], object] | None = None) -> PipelineError:
    """Return the error of an upload, or of other work, after a look at its form; the key must not be in it."""
    with pytest.raises(PipelineError) as caught:
        (work or (lambda storage: storage.upload("a/b.jpg", PHOTO)))(storage)
    for text in (caught.value.message, caught.value.hint):
        assert KEY not in text
        assert "\n" not in text
    return caught.value


# Against the real server


@pytest.fixture
def real(storage_server: StorageServer, bucket: str) -> Iterator[Storage]:
    """A bucket on the real server."""
    settings = local_settings("postgresql://nowhere/none", storage_server, bucket, Path())
    with closing(Storage(settings)) as storage:
        assert storage.ensure_bucket()
        yield storage


def test_a_bucket_is_made_once_and_private(storage_server: StorageServer, bucket: str) -> None:
    settings = local_settings("postgresql://nowhere/none", storage_server, bucket, Path())
    with closing(Storage(settings)) as storage:
        assert storage.find_bucket() is None
        found = storage.ensure_bucket()
        assert storage.ensure_bucket() == storage.find_bucket() == found
    assert (found["id"], found["public"]) == (bucket, False)


def test_several_at_once_make_the_bucket_together(storage_server: StorageServer, bucket: str) -> None:
    settings = local_settings("postgresql://nowhere/none", storage_server, bucket, Path())
    together = threading.Barrier(6)
    with closing(Storage(settings)) as storage, ThreadPoolExecutor(6) as pool:

        def make(_: int) -> dict[str, Any]:
            together.wait(SECONDS)
            return storage.ensure_bucket()

        made = list(pool.map(make, range(6)))
        assert made == [storage.find_bucket()] * 6


@pytest.mark.parametrize(
    "key",
    [
        "b/recognitions/1/camera1.jpg",
        "a b/c+d.jpg",
        "what?.jpg",
        "a&b=c;d,e:f@g!'(h)*$.jpg",
        "a//b",
        ".hidden/x",
        "a-b_.",
    ],
)
def test_an_object_comes_back_under_its_very_key_with_its_size_and_digest(real: Storage, key: str) -> None:
    real.upload(key, PHOTO)
    assert list(real.list_objects(key)) == [StoredObject(key, len(PHOTO), md5(PHOTO))]
    assert real.remove([key]) == []
    assert list(real.list_objects("")) == []


def test_uploading_again_replaces_the_content(real: Storage) -> None:
    real.upload("a.jpg", PHOTO)
    real.upload("a.jpg", b"other")
    real.upload("empty.jpg", b"")
    assert list(real.list_objects("")) == [
        StoredObject("a.jpg", 5, md5(b"other")),
        StoredObject("empty.jpg", 0, md5(b"")),
    ]


@pytest.mark.parametrize(
    "key",
    [
        "фото.jpg",
        "a[1].jpg",
        "a#b.jpg",
        "a%b.jpg",
    ],
)
def test_a_key_that_storage_does_not_take_is_a_permanent_error(real: Storage, waits: list[float], key: str) -> None:
    found = failure(real, lambda storage: storage.upload(key, PHOTO))
    assert isinstance(found, StorageError)
    assert found.code == "InvalidKey"
    assert waits == []


def test_a_list_of_many_pages_is_complete_and_in_byte_order(real: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.PAGE", 3)
    keys = ["a/1", "a/10", "a/2", "a/B", "a/b", "a/b.jpg", "a/b.jpg-2", "a/b.jpg.json", "a/b/c", "a/z", "b/1"]
    for key in keys:
        real.upload(key, PHOTO)
    assert [one.key for one in real.list_objects("")] == sorted(keys)
    inside = sorted(key for key in keys if key.startswith("a/"))
    assert [one.key for one in real.list_objects("a/")] == inside
    assert [one.key for one in real.list_objects("a/b")] == [key for key in inside if key.startswith("a/b")]
    for bound in (*keys, "a/", "a/aa", "a/zz"):
        assert [one.key for one in real.list_objects("a/", after=bound)] == [key for key in inside if key > bound]
        assert [one.key for one in real.list_objects("a/", last=bound)] == [key for key in inside if key <= bound]
    assert [one.key for one in real.list_objects("a/", after="a/10", last="a/b")] == ["a/2", "a/B", "a/b"]


def test_removing_returns_the_keys_that_were_not_there(real: Storage) -> None:
    for key in ("a", "b", "c"):
        real.upload(key, PHOTO)
    assert real.remove(["a", "b", "never", "a"]) == ["never"]
    assert real.remove(["a", "b"]) == ["a", "b"]
    assert real.remove([]) == []
    assert [one.key for one in real.list_objects("")] == ["c"]


def test_a_bucket_that_does_not_exist_is_told(storage_server: StorageServer, bucket: str) -> None:
    settings = local_settings("postgresql://nowhere/none", storage_server, bucket, Path())
    with closing(Storage(settings)) as storage:
        assert isinstance(failure(storage), ObjectNotFound)


@pytest.mark.parametrize("kind", ["anon", "of another project", "no JWT", "expired"])
def test_a_key_without_the_rights_is_denied_at_once(
    storage_server: StorageServer, bucket: str, waits: list[float], kind: str
) -> None:
    keys = {
        "anon": mint_key(storage_server.secret, "anon"),
        "of another project": mint_key("another secret of thirty-two bytes or more"),
        "no JWT": KEY,
        "expired": storage_server.key[:-4] + "AAAA",
    }
    settings = local_settings("postgresql://nowhere/none", replace(storage_server, key=keys[kind]), bucket, Path())
    with closing(Storage(settings)) as storage:
        with pytest.raises(AccessDenied) as caught:
            storage.ensure_bucket()
        assert keys[kind] not in f"{caught.value.message} {caught.value.hint}"
        assert "SUPABASE_SERVICE_ROLE_KEY" in caught.value.hint
    assert waits == []


# What is sent


def test_an_upload_carries_the_key_both_ways_and_replaces_what_is_there(
    server: ScriptedServer, storage: Storage
) -> None:
    server.will(stored)
    storage.upload("b 1/what?.jpg", PHOTO)
    (request,) = server.requests
    assert (request.method, request.path) == ("POST", "/storage/v1/object/photos/b%201/what%3F.jpg")
    assert request.body == PHOTO
    expected = {
        "apikey": KEY,
        "authorization": f"Bearer {KEY}",
        "content-type": "image/jpeg",
        "x-upsert": "true",
        "content-length": str(len(PHOTO)),
        "cache-control": "max-age=3600",
    }
    assert {name: request.headers[name] for name in expected} == expected
    assert "Mozilla" not in request.headers["user-agent"]


def test_uploads_are_counted_when_they_succeeded(server: ScriptedServer) -> None:
    metrics = Metrics()
    server.will(error(500, "InternalError"), stored, stored, error(400, "EntityTooLarge", "413"))
    with closing(Storage(settings_for(server.url), metrics)) as storage:
        storage.upload("a", PHOTO)
        storage.upload("b", b"12345")
        failure(storage)
    found = metrics.as_dict()
    assert found["counters"] == {
        "bytes_uploaded": len(PHOTO) + 5,
        "objects_uploaded": 2,
        "retries_InternalError": 1,
    }
    assert found["operations"]["storage_upload"]["ops"] == 2


def test_four_threads_send_over_four_connections_that_stay(server: ScriptedServer, storage: Storage) -> None:
    server.will(stored)
    together = threading.Barrier(4)

    def work(thread: int) -> None:
        for number in range(3):
            together.wait(SECONDS)
            storage.upload(f"{thread}/{number}", PHOTO)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(server.requests) == 12
    assert len({request.port for request in server.requests}) <= 4


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_makes_a_connection_of_its_own(server: ScriptedServer, storage: Storage) -> None:
    server.will(stored)
    storage.upload("parent/1", PHOTO)
    child = multiprocessing.get_context("fork").Process(target=storage.upload, args=("child/1", PHOTO))
    child.start()
    child.join(SECONDS)
    assert child.exitcode == 0
    child.close()
    storage.upload("parent/2", PHOTO)
    ports = {request.path.removeprefix("/storage/v1/object/photos/"): request.port for request in server.requests}
    assert ports["parent/1"] == ports["parent/2"] != ports["child/1"]


def test_a_netrc_does_not_take_the_place_of_our_key(
    server: ScriptedServer, storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    server.will(stored)
    storage.upload("a", PHOTO)
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


def test_a_proxy_of_the_environment_is_used_and_gets_its_own_password_not_the_place_of_our_key(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url.replace("://", "://user:pa55word@"))
    server.will(lambda request: Answer(body={"Key": "photos/a"}))
    with closing(Storage(settings_for("http://abc.supabase.invalid"))) as storage:
        storage.upload("a", PHOTO)
    (request,) = server.requests
    assert request.path == "http://abc.supabase.invalid/storage/v1/object/photos/a"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["proxy-authorization"] == f"Basic {base64.b64encode(b'user:pa55word').decode()}"


def test_no_proxy_is_heeded(server: ScriptedServer, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.will(stored)
    storage.upload("a", PHOTO)
    assert len(server.requests) == 1


def test_the_password_of_a_proxy_is_not_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:pa55word@127.0.0.1:{free_port()}")
    with closing(Storage(settings_for("http://abc.supabase.invalid"))) as storage:
        found = failure(storage)
    assert isinstance(found, StorageUnavailable)
    assert "pa55word" not in f"{found.message} {found.hint}"


# What an answer means, and how often it is tried again


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (error(400, "KeyAlreadyExists", "409"), ObjectExists, "KeyAlreadyExists"),
        (error(400, "ResourceAlreadyExists", "409"), ObjectExists, "ResourceAlreadyExists"),
        (error(400, "NoSuchBucket", "404"), ObjectNotFound, "NoSuchBucket"),
        (error(400, "NoSuchKey", "404"), ObjectNotFound, "NoSuchKey"),
        (error(400, "EntityTooLarge", "413"), StorageError, "EntityTooLarge"),
        (error(400, "InvalidKey"), StorageError, "InvalidKey"),
        (error(400, "DatabaseSchemaMismatch", "503"), StorageError, "DatabaseSchemaMismatch"),
        (error(400, "InvalidRequest"), StorageError, "InvalidRequest"),
        (error(400, "ResourceNotEmpty", "409"), StorageError, "ResourceNotEmpty"),
        (error(413), StorageError, "413"),
        (Answer(416, b""), StorageError, "416"),
        (Answer(400, b"<html>"), StorageError, "400"),
        (Answer(400, ["a", "list"]), StorageError, "400"),
        (Answer(400, "a text"), StorageError, "400"),
        (Answer(400, None), StorageError, "400"),
        (error(400, said="not a number"), StorageError, "400"),
    ],
)
def test_a_refusal_is_permanent_and_told_by_its_code(
    server: ScriptedServer, storage: Storage, answer: Answer, kind: type[StorageError], code: str
) -> None:
    server.will(answer)
    found = failure(storage)
    assert type(found) is kind
    assert isinstance(found, StorageError)
    assert found.code == code
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        error(400, "AccessDenied", "403"),
        error(400, "InvalidJWT"),
        error(400, "ExpiredToken"),
        error(400, "", "403"),
        error(401),
        error(403),
        Answer(401, {"message": "Invalid API key"}),
    ],
)
def test_a_refused_key_is_told_at_once(server: ScriptedServer, storage: Storage, answer: Answer) -> None:
    server.will(answer)
    found = failure(storage)
    assert isinstance(found, AccessDenied)
    assert "SUPABASE_SERVICE_ROLE_KEY" in found.hint
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (error(500, "InternalError"), "InternalError"),
        (error(500, "DatabaseError"), "DatabaseError"),
        (error(400, "ResourceLocked", "423"), "ResourceLocked"),
        (error(400, "TransactionError", "409"), "TransactionError"),
        (error(400, "S3Error", "500"), "S3Error"),
        (error(500), "500"),
        (HTML, "502"),
        (replace(HTML, status=504), "504"),
        (replace(HTML, status=520), "520"),
        (Answer(500, b""), "500"),
        (Answer(408, b""), "408"),
        (Answer(400, {"error": "Bad Request", "message": "Client Error", "statusCode": 400}), "400"),
    ],
)
def test_a_server_error_is_tried_again_as_often_as_the_tuning_says(
    server: ScriptedServer, storage: Storage, waits: list[float], answer: Answer, code: str
) -> None:
    server.will(answer)
    before = storage.limiter.limit
    found = failure(storage)
    assert type(found) is StorageUnavailable
    assert found.code == code
    assert len(server.requests) == 3
    assert waits == [1, 1]
    assert storage.limiter.limit == before


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (error(429, "SlowDown"), "SlowDown"),
        (error(544, "DatabaseTimeout"), "DatabaseTimeout"),
        (error(400, "LockTimeout", "503"), "LockTimeout"),
        (error(400, "DatabaseReadOnly", "503"), "DatabaseReadOnly"),
        (error(400, "S3Error", "429"), "S3Error"),
        (error(429), "429"),
        (replace(HTML, status=503), "503"),
        (Answer(544, b""), "544"),
    ],
)
def test_an_overloaded_server_is_tried_for_longer_with_fewer_requests_at_once(
    server: ScriptedServer, storage: Storage, answer: Answer, code: str
) -> None:
    server.will(answer)
    found = failure(storage)
    assert type(found) is StorageOverloaded
    assert found.code == code
    assert len(server.requests) == 3 + PATIENCE
    assert 1 <= storage.limiter.limit <= storage.threads // 2


def test_the_gate_climbs_again_on_success(server: ScriptedServer, storage: Storage) -> None:
    def stored_slowly(request: Request) -> Answer:
        server.over.wait(0.02)  # where an answer takes its time, more in flight are faster
        return stored(request)

    server.will(error(429, "SlowDown"), stored_slowly)
    storage.upload("a", PHOTO)
    low = storage.limiter.limit
    assert low <= storage.threads // 2

    def climbs() -> bool:
        list(pool.map(lambda number: storage.upload(str(number), PHOTO), range(4 * storage.threads)))
        return storage.limiter.limit > low

    with ThreadPoolExecutor(storage.threads) as pool:
        assert wait_until(climbs, SECONDS)
    assert storage.limiter.limit <= storage.threads


def test_waits_grow_with_the_factor_up_to_their_bound(server: ScriptedServer, waits: list[float]) -> None:
    server.will(error(500, "InternalError"))
    with closing(Storage(settings_for(server.url, retry_max_attempts=7, retry_backoff_factor=2.0))) as storage:
        failure(storage)
    assert waits == [1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(
    ("value", "longest"),
    [("7", 7), ("0", 1), ("", 1), ("soon", 1), ("60", 60), ("Fri, 31 Dec 1999 23:59:59 GMT", 1)],
)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_retry_after_is_followed_to_the_second(
    server: ScriptedServer, storage: Storage, waits: list[float], status: int, value: str, longest: int
) -> None:
    server.will(Answer(status, {}, {"Retry-After": value}), stored)
    storage.upload("a", PHOTO)
    assert waits == [longest]


def test_no_further_tries_when_the_tuning_says_so(server: ScriptedServer) -> None:
    server.will(error(500, "InternalError"))
    with closing(Storage(settings_for(server.url, retry_max_attempts=0))) as storage:
        failure(storage)
    assert len(server.requests) == 1


def test_a_mixture_of_troubles_ends_well_when_each_is_within_its_bounds(
    server: ScriptedServer, storage: Storage
) -> None:
    server.will(error(500), error(429, "SlowDown"), Reset(), HTML, error(544), replace(HTML, status=503), stored)
    storage.upload("a", PHOTO)
    assert len(server.requests) == 7
    assert {request.body for request in server.requests} == {PHOTO}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_for_our_key_would_go_with_it(
    server: ScriptedServer, storage: Storage, status: int
) -> None:
    server.will(Answer(status, b"", {"Location": f"{server.url}/elsewhere"}))
    found = failure(storage)
    assert isinstance(found, StorageError)
    assert "NEXT_PUBLIC_SUPABASE_URL" in found.hint
    assert [request.path for request in server.requests] == ["/storage/v1/object/photos/a/b.jpg"]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(404, {"message": "Route POST:/x not found", "error": "Not Found", "statusCode": 404}),
        Answer(404, {"message": "Route POST:/x not found", "statusCode": "404", "code": "InvalidRequest"}),
        Answer(404, {"message": "no Route matched with those values"}),
        Answer(404, b"<html>Not Found</html>", {"Content-Type": "text/html"}),
    ],
)
def test_an_address_without_a_storage_api_is_a_wrong_setting(
    server: ScriptedServer, storage: Storage, answer: Answer
) -> None:
    server.will(answer)
    found = failure(storage)
    assert isinstance(found, SettingsError)
    assert "NEXT_PUBLIC_SUPABASE_URL" in found.hint


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("begin", ["https://127.0.0.1", "https://abc.example/storage/v1", "https://user:secret@host"])
def test_an_api_that_has_moved_is_a_wrong_setting(
    server: ScriptedServer, storage: Storage, status: int, begin: str
) -> None:
    server.will(Answer(status, b"", {"Location": f"{begin}/object/photos/a/b.jpg"}))
    found = failure(storage)
    assert isinstance(found, SettingsError)
    assert begin.rpartition("@")[2] in found.message
    assert "secret" not in found.message


@pytest.mark.parametrize("body", [b"<html>the dashboard</html>", b"", b"\xff\xfe", b"{"])
def test_a_success_that_is_not_json_is_none(server: ScriptedServer, storage: Storage, body: bytes) -> None:
    server.will(Answer(200, body, {"Content-Type": "text/html"}))
    found = failure(storage)
    assert isinstance(found, StorageUnavailable)
    assert "NEXT_PUBLIC_SUPABASE_URL" in found.hint
    assert len(server.requests) == 3


@pytest.mark.parametrize("body", [{"Key": "photos/a"}, {"Key": "other/a/b.jpg"}, {}, [], None, "photos/a/b.jpg"])
def test_an_object_stored_under_another_key_is_an_error(server: ScriptedServer, storage: Storage, body: object) -> None:
    server.will(Answer(200, body))
    found = failure(storage)
    assert isinstance(found, StorageError)
    assert "another key" in found.message
    assert len(server.requests) == 1


def test_an_error_that_repeats_our_key_is_told_without_it(server: ScriptedServer, storage: Storage) -> None:
    jwt = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoiYW5vbiJ9.c2lnbmF0dXJl"
    server.will(error(400, "InvalidRequest", message=f"odd header Bearer {KEY} or {jwt}"))
    assert jwt not in failure(storage).message
    server.will(error(403, message=f"refused {KEY}"))
    assert "refused ***" in failure(storage).message


# The connection


def test_a_server_that_does_not_run_is_unavailable(waits: list[float]) -> None:
    with closing(Storage(settings_for(f"http://127.0.0.1:{free_port()}", retry_max_attempts=2))) as storage:
        found = failure(storage)
    assert isinstance(found, StorageUnavailable)
    assert "ConnectionRefusedError" in found.message
    assert len(waits) == 2


def test_embedded_services_that_do_not_run_are_to_be_started() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with closing(Storage(settings_for(url, "embedded", retry_max_attempts=0))) as storage:
        assert "python -m pipeline up" in failure(storage).hint


@pytest.mark.parametrize(
    "answer",
    [
        Reset(),
        Answer(200, {"Key": "photos/a/b.jpg"}, cut=5),
        Answer(200, b"not gzip", {"Content-Encoding": "gzip"}),
    ],
    ids=["reset", "cut", "garbled"],
)
def test_a_connection_that_breaks_is_tried_again_with_the_whole_content(
    server: ScriptedServer, storage: Storage, answer: Answer
) -> None:
    server.will(answer, answer, stored)
    storage.upload("a/b.jpg", PHOTO)
    assert [request.body for request in server.requests] == [PHOTO] * 3
    server.will(answer)
    assert isinstance(failure(storage), StorageUnavailable)
    assert len(server.requests) == 3


def test_a_kept_connection_that_the_server_has_closed_meanwhile_does_no_harm(
    server: ScriptedServer, storage: Storage
) -> None:
    def farewell(request: Request) -> Answer:
        return replace(stored(request), headers={"Connection": "close"})

    server.will(farewell)
    for number in range(3):
        storage.upload(str(number), PHOTO)
    assert len({request.port for request in server.requests}) == 3


def test_a_server_that_says_nothing_is_given_up(
    server: ScriptedServer, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.transport.READ_TIMEOUT", 0.05)
    server.will(Silence())
    found = failure(storage)
    assert isinstance(found, StorageUnavailable)
    assert "imeout" in found.message
    assert len(server.requests) == 3


def test_a_server_without_tls_at_an_https_address_is_told_at_once(server: ScriptedServer, waits: list[float]) -> None:
    server.will(stored)
    with closing(Storage(settings_for(server.url.replace("http://", "https://")))) as storage:
        found = failure(storage)
    assert isinstance(found, StorageError)
    assert "TLS" in found.message
    assert "certificate" not in found.message
    assert "NEXT_PUBLIC_SUPABASE_URL" in found.hint
    assert waits == []


def test_a_certificate_that_is_not_accepted_is_told_at_once(waits: list[float]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with ScriptedServer(context) as server, closing(Storage(settings_for(server.url))) as storage:
        found = failure(storage)
    assert isinstance(found, StorageError)
    assert "The TLS certificate of" in found.message
    assert "REQUESTS_CA_BUNDLE" in found.hint
    assert waits == []


@pytest.mark.parametrize("last_words", [b"", bytes((21, 3, 3, 0, 2, 2, 80))], ids=["none", "alert internal_error"])
def test_a_handshake_that_the_other_side_gives_up_may_go_well_the_next_time(last_words: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        tries: list[bytes] = []

        def give_up() -> None:
            for _ in range(2):
                connection, _address = listening.accept()
                with connection:
                    tries.append(connection.recv(1))
                    connection.sendall(last_words)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):
                        pass

        thread = threading.Thread(target=give_up)
        thread.start()
        port = listening.getsockname()[1]
        with closing(Storage(settings_for(f"https://127.0.0.1:{port}", retry_max_attempts=1))) as storage:
            found = failure(storage)
        thread.join(SECONDS)
    assert isinstance(found, StorageUnavailable)
    assert len(tries) == 2


def test_a_file_of_certificates_that_is_not_there_is_a_wrong_setting(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with closing(Storage(settings_for(server.url.replace("http://", "https://")))) as storage:
        found = failure(storage)
    assert isinstance(found, SettingsError)
    assert "none.pem" in found.message
    assert "REQUESTS_CA_BUNDLE" in found.hint


@pytest.mark.parametrize("work", [Storage.ensure_bucket, Storage.find_bucket, Storage.check_host])
def test_an_unknown_host_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch, work: Callable[[Storage], object]) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with closing(Storage(settings_for("http://abc.supabase.invalid"))) as storage:
        found = failure(storage, work)
    assert isinstance(found, AccessDenied)
    assert "abc.supabase.invalid" in found.message
    assert "NEXT_PUBLIC_SUPABASE_URL" in found.hint


def test_a_host_that_only_the_proxy_can_look_up_is_not_looked_up_here(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    server.will(Answer(body={"id": "photos", "created_at": "2025-01-01T00:00:00.000Z"}))
    with closing(Storage(settings_for("http://a..supabase.invalid"))) as storage:
        assert storage.ensure_bucket()["id"] == "photos"


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".co"])
def test_a_host_name_that_cannot_be_one_is_a_wrong_setting(host: str) -> None:
    with closing(Storage(settings_for(f"http://{host}"))) as storage:
        assert isinstance(failure(storage, Storage.ensure_bucket), AccessDenied)


def test_a_name_service_that_cannot_be_reached_is_a_bad_moment(
    server: ScriptedServer, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    server.will(stored)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    assert isinstance(failure(storage, Storage.ensure_bucket), StorageUnavailable)


# Lists


def test_pages_follow_one_another_by_the_cursor(server: ScriptedServer, storage: Storage) -> None:
    server.will(page("p/1", "p/2", cursor="one"), page("p/3", cursor="two"), page())
    assert [one.key for one in storage.list_objects("p/")] == ["p/1", "p/2", "p/3"]
    bodies = [json.loads(request.body) for request in server.requests]
    assert [body.get("cursor") for body in bodies] == [None, "one", "two"]
    assert all((body["prefix"], body["limit"], body["with_delimiter"]) == ("p/", 1000, False) for body in bodies)
    assert server.requests[0].path == "/storage/v1/object/list-v2/photos"


def test_a_list_begins_after_a_key_and_ends_without_asking_for_more_than_it_needs(
    server: ScriptedServer, storage: Storage
) -> None:
    server.will(page("p/2", "p/3", "p/5", cursor="more"))
    assert [one.key for one in storage.list_objects("p/", after="p/2", last="p/4")] == ["p/3"]
    (request,) = server.requests
    assert base64.b64decode(json.loads(request.body)["cursor"]) == b"l:p/2"


def test_a_server_that_does_not_take_our_cursor_is_read_from_the_start(
    server: ScriptedServer, storage: Storage
) -> None:
    server.will(
        error(400, "InvalidParameter"),
        page("p/1", "p/2", cursor="of its own"),
        page("p/3", "p/4"),
    )
    assert [one.key for one in storage.list_objects("p/", after="p/2")] == ["p/3", "p/4"]
    cursors = [json.loads(request.body).get("cursor") for request in server.requests]
    assert cursors[1:] == [None, "of its own"]


def test_a_server_that_does_not_take_its_own_cursor_is_an_error(server: ScriptedServer, storage: Storage) -> None:
    server.will(page("p/1", cursor="of its own"), error(400, "InvalidParameter"))
    found = failure(storage, lambda storage: list(storage.list_objects("p/")))
    assert isinstance(found, StorageError)
    assert len(server.requests) == 2


def test_a_server_that_takes_no_cursor_at_all_is_not_asked_for_ever(server: ScriptedServer, storage: Storage) -> None:
    def moody(request: Request) -> Answer:
        if len(server.requests) > 20:
            return error(400, "InvalidRequest", message="enough")
        return error(400, "InvalidParameter") if "cursor" in json.loads(request.body) else page("p/3", cursor="x")

    server.will(moody)
    assert isinstance(failure(storage, lambda storage: list(storage.list_objects("p/", after="p/2"))), StorageError)
    assert len(server.requests) <= 3


@pytest.mark.parametrize(
    "body", [[], {}, None, {"objects": [{}]}, {"objects": [], "hasNext": True}, {"objects": []}, {"hasNext": False}]
)
def test_a_list_of_another_shape_is_an_error_of_ours(server: ScriptedServer, storage: Storage, body: object) -> None:
    server.will(Answer(200, body))
    assert isinstance(failure(storage, lambda storage: list(storage.list_objects(""))), PipelineError)


@pytest.mark.parametrize(
    ("metadata", "size", "digest"),
    [
        ({"size": 5, "eTag": f'"{md5(PHOTO).upper()}"'}, 5, md5(PHOTO)),
        ({"size": 5, "eTag": '"d41d8cd98f00b204e9800998ecf8427e-3"'}, 5, None),
        ({"size": 5, "eTag": 'W/"abc"'}, 5, None),
        ({"size": 5}, 5, None),
        ({}, -1, None),
        (None, -1, None),
    ],
)
def test_a_digest_is_taken_only_where_the_etag_is_one(
    server: ScriptedServer, storage: Storage, metadata: object, size: int, digest: str | None
) -> None:
    server.will(Answer(200, {"hasNext": False, "objects": [{"name": "a", "metadata": metadata}]}))
    assert list(storage.list_objects("")) == [StoredObject("a", size, digest)]


def test_a_bucket_that_another_makes_at_the_same_moment_is_no_error(server: ScriptedServer, storage: Storage) -> None:
    bucket = Answer(body={"id": "photos", "created_at": "2025-01-01T00:00:00.000Z"})
    server.will(error(400, "NoSuchBucket", "404"), error(400, "BucketAlreadyExists", "409"), bucket)
    assert storage.ensure_bucket()["id"] == "photos"
    assert json.loads(server.requests[1].body) == {"id": "photos", "name": "photos", "public": False}


# Many at once, and stopping


class Held:
    """A reply that keeps requests waiting until the test lets them go."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.released = threading.Event()

    def __call__(self, request: Request) -> Answer:
        self.arrived.release()
        self.released.wait(SECONDS)
        return stored(request)


@contextmanager
def held_uploads(storage: Storage, count: int) -> Iterator[list[object]]:
    """Upload from so many threads; after the block, the outcome of each is in the list."""
    outcomes: list[object] = []

    def upload(number: int) -> None:
        try:
            storage.upload(str(number), PHOTO)
        except PipelineError as exc:
            outcomes.append(type(exc))
        else:
            outcomes.append("stored")

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    yield outcomes
    for thread in threads:
        thread.join(SECONDS)
    assert len(outcomes) == count


def test_no_more_requests_are_in_flight_than_threads(server: ScriptedServer) -> None:
    held = Held()
    server.will(held)
    with closing(Storage(settings_for(server.url, thread_count=2))) as storage:
        with held_uploads(storage, 6) as outcomes:
            assert held.arrived.acquire(timeout=SECONDS)
            assert held.arrived.acquire(timeout=SECONDS)
            assert not held.arrived.acquire(timeout=0.05)
            held.released.set()
        assert outcomes == ["stored"] * 6


def test_after_stop_no_request_begins(server: ScriptedServer, storage: Storage) -> None:
    server.will(stored)
    storage.stop()
    assert isinstance(failure(storage), Interrupted)
    assert server.requests == []


def test_a_part_counts_and_stops_by_itself(server: ScriptedServer) -> None:
    server.will(stored)
    whole, first, second = Metrics(), Metrics(), Metrics()
    with closing(Storage(settings_for(server.url), whole)) as storage:
        one, other = storage.part(first), storage.part(second)
        assert one.limiter is other.limiter is storage.limiter
        one.upload("a", PHOTO)
        one.stop()
        assert isinstance(failure(one), Interrupted)
        other.upload("a", PHOTO)
        storage.upload("a", PHOTO)
    counted = [metrics.as_dict()["counters"].get("objects_uploaded", 0) for metrics in (whole, first, second)]
    assert counted == [1, 1, 1]
    assert len({request.port for request in server.requests}) == 1, "they share the thread's connection"


def test_stop_lets_what_is_in_flight_end(server: ScriptedServer, storage: Storage) -> None:
    held = Held()
    server.will(held)
    with held_uploads(storage, 1) as outcomes:
        assert held.arrived.acquire(timeout=SECONDS)
        storage.stop()
        held.released.set()
    assert outcomes == ["stored"]


def test_stop_ends_the_tries_of_a_request(
    server: ScriptedServer, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.will(error(429, "SlowDown"))
    stopping = SimpleNamespace(sleep=lambda _: storage.stop(), monotonic=time.monotonic)
    monkeypatch.setattr("pipeline.storage.client.time", stopping)
    assert isinstance(failure(storage), Interrupted)
    assert len(server.requests) == 1


def test_stop_holds_back_those_that_wait_for_their_turn(server: ScriptedServer) -> None:
    held = Held()
    server.will(held)
    with closing(Storage(settings_for(server.url, thread_count=1))) as storage:
        with held_uploads(storage, 3) as outcomes:
            assert held.arrived.acquire(timeout=SECONDS)
            while len(storage.limiter._condition._waiters) < 2:  # type: ignore[attr-defined]
                os.sched_yield()
            storage.stop()
            held.released.set()
        assert sorted(map(str, outcomes)) == sorted(map(str, ["stored", Interrupted, Interrupted]))
    assert len(server.requests) == 1


def test_closing_ends_the_connections_of_all_threads(server: ScriptedServer) -> None:
    server.will(stored)
    with closing(Storage(settings_for(server.url))) as storage:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda number: storage.upload(str(number), PHOTO), range(9)))
        assert any(connection.fileno() != -1 for connection in server.connections)
    assert wait_until(lambda: all(connection.fileno() == -1 for connection in server.connections), SECONDS)


def test_the_key_is_in_no_text_of_the_client(storage: Storage) -> None:
    assert KEY not in f"{storage!r} {vars(storage)!r} {Secret(KEY)!r}"
