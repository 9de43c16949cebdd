"""Access to the embedded Storage server: keys of the API, roles, public buckets, signed URLs."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from embedded_supabase.storage.auth import mint_key
from tests import storage_server_support
from tests.storage_server_support import DUPLICATE, NO_BUCKET, NO_JWS, NO_KEY, NO_WRITER, Answer, Client, incoming

client = storage_server_support.client
full = storage_server_support.full

NO_HEADER = (400, "400", "Error", "headers must have required property 'authorization'", "InvalidRequest")


def token(claims: Any, secret: str, algorithm: str = "HS256") -> str:
    """Return a JSON Web Token made by hand, so that it can be wrong."""

    def encoded(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).decode().rstrip("=")

    signed = f"{encoded(json.dumps({'alg': algorithm, 'typ': 'JWT'}).encode())}.{encoded(json.dumps(claims).encode())}"
    digest = {"HS256": "sha256", "HS512": "sha512"}.get(algorithm)
    signature = hmac.new(secret.encode(), signed.encode(), digest).digest() if digest else b""
    return f"{signed}.{encoded(signature)}"


# Keys of the API, and roles


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(lambda secret: None, NO_HEADER, id="no-header"),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "service_role"}, secret + "!"),
            (400, "403", "Unauthorized", "signature verification failed", "AccessDenied"),
            id="other-secret",
        ),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "service_role", "exp": time.time() - 5}, secret),
            (400, "403", "Unauthorized", '"exp" claim timestamp check failed', "AccessDenied"),
            id="expired",
        ),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "service_role", "nbf": time.time() + 500}, secret),
            (400, "403", "Unauthorized", '"nbf" claim timestamp check failed', "AccessDenied"),
            id="not-yet",
        ),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "service_role"}, secret, "none"),
            (400, "403", "Unauthorized", '"alg" (Algorithm) Header Parameter value not allowed', "AccessDenied"),
            id="alg-none",
        ),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "service_role"}, secret, "HS512"),
            (400, "403", "Unauthorized", '"alg" (Algorithm) Header Parameter value not allowed', "AccessDenied"),
            id="alg-HS512",
        ),
        pytest.param(lambda secret: "Bearer sb_secret_abc", NO_JWS, id="no-jwt"),
        pytest.param(lambda secret: "Bearer", NO_JWS, id="empty-bearer"),
        pytest.param(lambda secret: " ", NO_JWS, id="empty"),
        pytest.param(lambda secret: "Basic dTpw", NO_JWS, id="basic"),
        pytest.param(lambda secret: "Bearer " + token(["service_role"], secret), NO_JWS, id="claims-are-a-list"),
        pytest.param(
            lambda secret: "Bearer " + token({"role": "postgres"}, secret),
            (500, "500", "DatabaseError", "database error, code: 22023", "DatabaseError"),
            id="unknown-role",
        ),
    ],
)
def test_a_key_that_proves_nothing_is_refused(
    client: Client, full: str, make: Callable[[str], str | None], expected: tuple[int, str, str, str, str]
) -> None:
    authorization = make(client.server.secret)
    for method, path, body in (
        ("POST", f"/object/list/{full}", {"prefix": ""}),
        ("POST", f"/object/{full}/new", b"content"),
        ("GET", f"/object/authenticated/{full}/a/b.txt", None),
        ("GET", "/bucket", None),
    ):
        assert client.send(method, path, body, authorization=authorization).error == expected
    reading = client.send("GET", f"/object/{full}/a/b.txt", authorization=authorization)
    assert reading.error == (expected if expected[0] == 500 else NO_BUCKET)
    assert client.send("GET", f"/object/info/{full}/a/b.txt", authorization=authorization).error == reading.error
    assert client.keys(full) == ["a/b.txt"]


@pytest.mark.parametrize("word", ["Bearer ", "bearer ", "BEARER  ", ""])
@pytest.mark.parametrize("claims", [{}, {"iat": 2**40}, {"exp": 2**40}, {"aud": "x", "iss": "y", "sub": 1}])
def test_a_good_key_is_taken_however_it_is_sent(client: Client, word: str, claims: dict[str, Any]) -> None:
    authorization = word + token({"role": "service_role", **claims}, client.server.secret)
    assert client.send("GET", "/bucket", authorization=authorization).status == 200


@pytest.mark.parametrize("claims", [{"role": "anon"}, {"role": "authenticated"}, {}], ids=["anon", "user", "no-role"])
def test_other_roles_see_nothing_and_change_nothing(client: Client, full: str, claims: dict[str, str]) -> None:
    authorization = "Bearer " + token(claims, client.server.secret)

    def send(method: str, path: str, body: bytes | dict[str, Any] | None = None) -> Answer:
        return client.send(method, path, body, authorization=authorization)

    assert send("GET", "/bucket").json == []
    assert send("GET", f"/bucket/{full}").error == NO_BUCKET
    assert send("PUT", f"/bucket/{full}", {"public": True}).error == NO_BUCKET
    assert send("DELETE", f"/bucket/{full}").error == NO_BUCKET
    assert send("POST", f"/bucket/{full}/empty").error == NO_BUCKET
    assert send("POST", "/bucket", {"name": f"{full}-2"}).error == NO_WRITER
    assert send("POST", f"/object/list/{full}", {"prefix": ""}).json == []
    assert send("POST", f"/object/list-v2/{full}", {}).json == {"hasNext": False, "folders": [], "objects": []}
    assert send("GET", f"/object/{full}/a/b.txt").error == NO_KEY
    assert send("GET", f"/object/authenticated/{full}/a/b.txt").error == NO_KEY
    assert send("GET", f"/object/info/{full}/a/b.txt").error == NO_KEY
    assert send("POST", f"/object/{full}/new", b"x").error == NO_WRITER
    assert send("POST", f"/object/{full}/a/b.txt", b"x").error == NO_WRITER
    assert send("PUT", f"/object/{full}/a/b.txt", b"x").error == NO_WRITER
    assert send("POST", f"/object/upload/sign/{full}/new").error == NO_WRITER
    assert send("POST", f"/object/sign/{full}/a/b.txt", {"expiresIn": 60}).error == NO_KEY
    move = {"bucketId": full, "sourceKey": "a/b.txt", "destinationKey": "c"}
    assert send("POST", "/object/move", move).status == 400
    assert send("POST", "/object/copy", move).status == 400
    assert send("DELETE", f"/object/{full}/a/b.txt").error == (
        (400, "403", "Unauthorized", "Access denied", "AccessDenied")
    )
    assert send("DELETE", f"/object/{full}", {"prefixes": ["a/b.txt"]}).json == []
    assert client.keys(full) == ["a/b.txt"]
    assert client.content(full, "a/b.txt") == b"0123456789"
    assert incoming(client.server) == []


def test_a_public_bucket_is_open_to_all_and_a_private_one_is_not(client: Client, full: str) -> None:
    for role in ("service_role", "anon"):
        authorization = f"Bearer {mint_key(client.server.secret, role)}"
        public = client.send("GET", f"/object/public/{full}/a/b.txt", authorization=authorization)
        assert public.error == NO_BUCKET
    client.send("PUT", f"/bucket/{full}", {"public": True})
    for path in ("/object/public/", "/object/", "/object/info/public/", "/object/info/"):
        for sent in (None, "Bearer no", "Bearer " + token({"role": "anon"}, client.server.secret)):
            assert client.send("GET", f"{path}{full}/a/b.txt", authorization=sent).status == 200
            assert client.send("GET", f"{path}{full}/no", authorization=sent).error == NO_KEY
    assert client.send("GET", f"/object/authenticated/{full}/a/b.txt", authorization=None).error == NO_HEADER


# Signed addresses


def test_a_signed_address_opens_one_object_until_it_expires(client: Client, full: str) -> None:
    client.upload(full, "other")
    signed = client.send("POST", f"/object/sign/{full}/a/b.txt", {"expiresIn": 60}).json["signedURL"]
    answer = client.send("GET", signed, authorization=None)
    assert (answer.status, answer.body) == (200, b"0123456789")
    assert client.send("HEAD", signed, authorization=None).status == 200
    assert client.send("GET", signed.replace("a/b.txt", "other"), authorization=None).error[4] == "InvalidSignature"
    assert client.send("GET", f"{signed}x", authorization=None).error[4] == "InvalidJWT"
    assert client.send("GET", signed.partition("?")[0], authorization=None).status == 400
    expired = token({"url": f"{full}/a/b.txt", "exp": time.time() - 5}, client.server.secret)
    assert client.send("GET", f"/object/sign/{full}/a/b.txt?token={expired}").error[4] == "InvalidJWT"
    service = client.server.key
    assert client.send("GET", f"/object/sign/{full}/a/b.txt?token={service}").error[4] == "InvalidSignature"
    assert client.send("POST", f"/object/sign/{full}/no", {"expiresIn": 60}).error == NO_KEY
    wrong: list[dict[str, Any]] = [{}, {"expiresIn": 0}, {"expiresIn": "x"}, {"expiresIn": None}]
    for body in wrong:
        assert client.send("POST", f"/object/sign/{full}/a/b.txt", body).error[4] == "InvalidRequest"


def test_addresses_are_signed_in_bulk(client: Client, full: str) -> None:
    body = {"expiresIn": 60, "paths": ["a/b.txt", "no", "\ud800"]}
    good, *bad = client.send("POST", f"/object/sign/{full}", body).json
    assert client.send("GET", good["signedURL"], authorization=None).body == b"0123456789"
    assert [(entry["signedURL"], bool(entry["error"])) for entry in bad] == [(None, True)] * 2
    for wrong in ({"expiresIn": 60}, {"expiresIn": 60, "paths": []}, {"paths": ["a"]}):
        assert client.send("POST", f"/object/sign/{full}", wrong).error[4] == "InvalidRequest"


def test_a_signed_upload_stores_one_key_and_needs_nothing_else(client: Client, full: str) -> None:
    answer = client.send("POST", f"/object/upload/sign/{full}/c%20d").json
    assert answer["url"].endswith(f"?token={answer['token']}")
    stored_answer = client.send("PUT", answer["url"], b"content", {"Content-Type": "image/png"}, authorization=None)
    assert stored_answer.json == {"Key": f"{full}/c d"}
    assert client.info(full, "c d")["content_type"] == "image/png"
    assert client.send("PUT", answer["url"], b"again", authorization=None).error == DUPLICATE
    elsewhere = answer["url"].replace("c%20d", "e")
    assert client.send("PUT", elsewhere, b"x", authorization=None).error[4] == "InvalidSignature"
    assert client.send("PUT", answer["url"].partition("?")[0], b"x").error[4] == "InvalidJWT"
    bad_type = client.send("PUT", answer["url"], b"x", {"Content-Type": "x"}, authorization=None)
    assert bad_type.error[1] == "415"
    assert client.send("POST", f"/object/upload/sign/{full}/a/b.txt").error == DUPLICATE
    assert client.content(full, "c d") == b"content"
    assert incoming(client.server) == []
