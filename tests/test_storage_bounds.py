"""client.py, transport.py and errors.py: who answered, and how long and how large a response may be."""

from __future__ import annotations

import io
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import datetime, timezone
from email.utils import formatdate

import pytest
import urllib3

from pipeline.errors import PipelineError, SettingsError, StorageError, StorageOverloaded, StorageUnavailable
from pipeline.storage import Storage, StoredObject
from pipeline.storage.errors import error_of
from tests import test_storage
from tests.scripted import SECONDS, Answer, ScriptedServer, settings_for
from tests.test_storage import PHOTO, error, failure, md5, page

no_proxies = test_storage.no_proxies
real = test_storage.real
server = test_storage.server
storage = test_storage.storage
waits = test_storage.waits


# Who answered


def page_of(status: int, title: str = "", **headers: str) -> Answer:
    content = f"<html><title>\n {title} </title></html>".encode() if title else b""
    return Answer(status, content, {"Content-Type": "text/html", **headers})


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        (page_of(403, "Attention Required!", Server="cloudflare"), ["cloudflare", '"Attention Required!"', "403"]),
        (page_of(401, "401 Authorization Required", Server="nginx"), ["Authorization Required", "401"]),
        (page_of(413, "413 Request Entity Too Large"), ["413", "client_max_body_size"]),
        (page_of(400, "Bad Request"), ["not Storage", "400"]),
        (page_of(403), ["not Storage", "403"]),
        (page_of(302, Location="http://login.invalid"), ["redirects", "captive portal"]),
    ],
)
def test_a_page_is_told_with_its_sender_and_not_as_storages_word(
    server: ScriptedServer, storage: Storage, answer: Answer, parts: list[str]
) -> None:
    server.will(answer)
    found = failure(storage)
    assert type(found) is StorageError
    assert "refuses the key" not in found.message
    for part in parts:
        assert part in f"{found.message} {found.hint}"
    assert len(server.requests) == 1


@pytest.mark.parametrize("answer", [page_of(540, "Paused"), error(540)], ids=["page", "JSON"])
def test_a_paused_project_is_not_asked_again(server: ScriptedServer, storage: Storage, answer: Answer) -> None:
    server.will(answer)
    found = failure(storage)
    assert isinstance(found, StorageUnavailable)
    assert "dashboard" in found.hint
    assert len(server.requests) == 1


def test_a_type_that_the_bucket_does_not_allow_is_a_setting(server: ScriptedServer, storage: Storage) -> None:
    server.will(error(400, "InvalidMimeType", "415"))
    found = failure(storage)
    assert isinstance(found, SettingsError)
    assert "image/jpeg" in found.hint


@pytest.mark.parametrize("types", [["image/png"], ["application/*"], ["*"]])
def test_a_bucket_without_photos_is_a_setting(server: ScriptedServer, storage: Storage, types: list[str]) -> None:
    server.will(Answer(body={"id": "photos", "created_at": "2025-01-01T00:00:00.000Z", "allowed_mime_types": types}))
    assert isinstance(failure(storage, Storage.ensure_bucket), SettingsError)
    for allowed in (None, [], ["image/*"], ["image/png", "image/jpeg"]):
        server.will(
            Answer(body={"id": "photos", "created_at": "2025-01-01T00:00:00.000Z", "allowed_mime_types": allowed})
        )
        assert storage.ensure_bucket()["allowed_mime_types"] == allowed


@pytest.mark.parametrize(
    "answer",
    [
        error(400, "Bad\x1b[31m\nError: ", message="a\x1b[2Jb\nError: forged"),
        error(400, "x" * 100_000, message="y" * 900_000),
        error(403, message="\u202etxt.exe\r\n" * 1000),
        error(503, "z\x07" * 1000, message="\x9b2J"),
        Answer(200, {"Key": "\x1b[2J\n" * 1000}),
        page_of(404, "\x1b]0;title\x07", Server="\x1b[31mnginx" * 50),
        page_of(302, Location="http://login.invalid/\x1b[2J" + "x" * 5000),
    ],
)
def test_what_a_server_says_is_shown_in_one_short_line(
    server: ScriptedServer, storage: Storage, answer: Answer
) -> None:
    server.will(answer)
    found = failure(storage)
    assert found.message.isprintable()
    assert found.code.isprintable()
    assert len(found.message) < 700


@pytest.mark.parametrize("text", ["a\x1b[2J.jpg", "a\x07\r", "\x9b", "\u202e", "\udcff"])
def test_an_error_has_no_control_characters_of_a_file_name(text: str) -> None:
    found = PipelineError(f"{text} is broken.\n  It is.", f"Remove {text}.")
    for part in (found.message, found.hint, str(found)):
        assert part.replace("\n", "").isprintable()
    assert found.message.endswith(" is broken.\n  It is.")


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-29T12:50:25.308Z",
        "2026-11-29T12:50:25.308000+00:00",
        "2026-11-29 12:50:25.308+00",
        "2026-11-29T14:50:25.308+02:00",
        "2026-11-29T12:50:25.308",
    ],
)
def test_the_time_of_a_bucket_is_the_same_in_any_form(server: ScriptedServer, storage: Storage, text: str) -> None:
    server.will(Answer(body={"id": "photos", "created_at": text}))
    found = storage.find_bucket()
    assert found is not None
    assert found["created_at"] == datetime(2026, 11, 29, 12, 50, 25, 308_000, timezone.utc)


@pytest.mark.parametrize(
    "text", [None, 7, "", "now", "2026-13-01", "2026-01-01T00:00:00\x00", "\ud800", "9" * 5000, []]
)
def test_a_bucket_without_the_time_of_its_creation_is_no_proof(
    server: ScriptedServer, storage: Storage, text: object
) -> None:
    for body in ({"id": "photos", "created_at": text}, {"id": "photos"}):
        server.will(Answer(body=body))
        assert "unknown format" in failure(storage, Storage.find_bucket).message
        with pytest.raises(StorageError, match="unknown format"):
            storage.ask_for_bucket()


# Bounds


class Drip:
    """A server that answers each request a byte at a time."""

    def __init__(self, answer: bytes, seconds: float) -> None:
        self._answer, self._seconds = answer, seconds
        self._over = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.served = 0
        self._threads = [threading.Thread(target=self._serve)]

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                self.served += 1
                self._threads.append(threading.Thread(target=self._drip, args=(client,)))
                self._threads[-1].start()

    def _drip(self, client: socket.socket) -> None:
        with client, suppress(OSError):  # the client has enough
            client.recv(1 << 16)
            for byte in self._answer:
                client.sendall(bytes([byte]))
                if self._over.wait(self._seconds):
                    return

    def __enter__(self) -> Drip:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(SECONDS)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 200,
        b"HTTP/1.1 500 Bad\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000,
    ],
    ids=["headers", "body", "chunks", "error"],
)
def test_a_response_that_drips_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    monkeypatch.setattr("pipeline.storage.transport.READ_TIMEOUT", 0.4)
    with Drip(answer, 0.02) as server, closing(Storage(settings_for(server.url, retry_max_attempts=1))) as storage:
        began = time.monotonic()
        found = failure(storage)
        assert time.monotonic() - began < 10
    assert isinstance(found, StorageUnavailable)
    assert "does not respond in time" in found.message
    assert server.served == 2


def test_an_operation_ends_where_its_next_attempt_would_be_too_late(
    server: ScriptedServer, storage: Storage, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.will(Answer(503, {}, {"Retry-After": "601"}))
    assert isinstance(failure(storage), StorageOverloaded)
    assert (len(server.requests), waits) == (1, [])
    monkeypatch.setattr("pipeline.storage.client.OPERATION_TIMEOUT", 0.0)
    server.will(error(500, "InternalError"))
    failure(storage)
    assert len(server.requests) == 1


def test_retry_after_may_be_a_date() -> None:
    headers = {"Retry-After": formatdate(time.time() + 7, usegmt=True)}
    found = error_of(urllib3.HTTPResponse(io.BytesIO(b"{}"), headers, 429, preload_content=False), "GET /bucket/b")
    assert isinstance(found, StorageOverloaded)
    assert 5 < found.retry_after <= 7


@pytest.mark.parametrize(
    "value",
    ["Sun, 29 Nov 99999999999 12:00:00 GMT", "1" * 5000, "1e999", "-5", "soon", "\u00b2", "1.5", ""],
)
def test_a_retry_after_that_is_no_time_is_left_out(value: str) -> None:
    headers = {"Retry-After": value}
    found = error_of(urllib3.HTTPResponse(io.BytesIO(b"{}"), headers, 429, preload_content=False), "GET /bucket/b")
    assert isinstance(found, StorageOverloaded)
    assert found.retry_after == 0


@pytest.mark.parametrize("status", ["\u00b2", "9" * 5000, "-1", "4e2", "99", None, [400], {}])
def test_a_status_in_a_body_that_is_none_is_left_out(server: ScriptedServer, storage: Storage, status: object) -> None:
    server.will(Answer(409, {"statusCode": status, "code": "", "message": "m"}))
    assert failure(storage).code == "409"


@pytest.mark.parametrize("entry", ["{}", *(pytest.param(one, marks=pytest.mark.slow) for one in ("[]", '""', "1e9"))])
def test_a_page_of_a_list_takes_little_memory_whatever_it_holds(
    server: ScriptedServer, storage: Storage, entry: str
) -> None:
    count = (1 << 22) // (len(entry) + 1) - 20
    content = b'{"hasNext":false,"objects":[' + b",".join([entry.encode()] * count) + b"]}"
    server.will(Answer(200, content))
    tracemalloc.start()
    try:
        found = failure(storage, lambda storage: list(storage.list_objects("")))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "unknown format" in found.message
    assert peak - 2 * len(content) < 150_000_000  # the server of the test is in this process


@pytest.mark.parametrize(
    "work",
    [
        lambda storage: storage.upload("a", PHOTO),
        lambda storage: storage.find_bucket(),
        lambda storage: storage.remove(["a"]),
        lambda storage: list(storage.list_objects("")),
        lambda storage: storage.read("a", 1000),
    ],
    ids=["upload", "bucket", "delete", "list", "object"],
)
@pytest.mark.parametrize("status", [200, 400])
def test_a_response_has_a_bound_for_its_size(
    server: ScriptedServer, storage: Storage, work: Callable[[Storage], object], status: int
) -> None:
    server.will(Answer(status, b'"' + b"x" * (9 << 20) + b'"'))
    found = failure(storage, work)
    assert isinstance(found, StorageError)
    assert "sends more than" in found.message


def test_an_object_is_not_read_beyond_the_size_on_record(server: ScriptedServer, storage: Storage) -> None:
    server.will(Answer(200, b"x" * (9 << 20)))
    size, _ = storage.digest("a", 100)
    assert 100 < size < 1 << 20


def test_a_list_whose_keys_do_not_ascend_ends(server: ScriptedServer, storage: Storage) -> None:
    for pages in ([page("p/1", cursor="x")], [page("p/2", cursor="x"), page("p/1")], [page("q/1")]):
        server.will(*pages)
        found = failure(storage, lambda storage: list(storage.list_objects("p/")))
        assert "out of order" in found.message
        assert len(server.requests) <= 2
    server.will(page(cursor="x"))
    assert "does not end" in failure(storage, lambda storage: list(storage.list_objects("p/"))).message


@pytest.mark.parametrize("body", [[], {}, None, "photos", 7, {"id": "other"}, {"ok": True}])
def test_a_bucket_of_another_form_is_no_proof(server: ScriptedServer, storage: Storage, body: object) -> None:
    server.will(Answer(200, body))
    assert "unknown format" in failure(storage, Storage.find_bucket).message


@pytest.mark.parametrize("body", [None, 7, "gone", [{}], [7]])
def test_a_delete_answered_in_another_form_is_an_error(server: ScriptedServer, storage: Storage, body: object) -> None:
    server.will(Answer(200, body))
    assert "unknown format" in failure(storage, lambda storage: storage.remove(["a"])).message


def test_an_object_is_found_by_its_key(real: Storage) -> None:
    real.upload("a b/c.jpg", PHOTO)
    assert real.find("a b/c.jpg") == StoredObject("a b/c.jpg", len(PHOTO), md5(PHOTO))
    assert real.find("a b/d.jpg") is None
