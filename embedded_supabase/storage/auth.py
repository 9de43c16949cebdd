"""Authentication: keys and signed URLs are JSON Web Tokens, signed with HS256 (RFC 7519, RFC 7515)."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import jwt

from embedded_supabase.storage.errors import ApiError, denied

SERVICE = "service_role"
ROLES = (SERVICE, "authenticated", "anon")


def mint_key(secret: str, role: str = SERVICE) -> str:
    """Return the key of a role; it is the same for every call and does not expire."""
    return jwt.encode({"iss": "pipeline", "role": role}, secret, algorithm="HS256")


def sign(secret: str, claims: dict[str, Any], seconds: int) -> str:
    """Return a token that contains the claims and expires after some seconds."""
    now = int(time.time())
    return jwt.encode({**claims, "iat": now, "exp": now + seconds}, secret, algorithm="HS256")


def role_of(authorization: str, secret: str) -> str:
    """Return the role in the header `Authorization`; the word Bearer is optional.

    Raises:
        ApiError: the token is invalid or has expired.
    """
    word, _, rest = authorization.strip().partition(" ")
    token = rest.strip() if word.lower() == "bearer" else authorization.strip()
    role = _claims(token, secret).get("role") or "anon"
    if role not in ROLES:
        # The official server runs SET ROLE, which fails for an unknown role.
        raise ApiError(500, "DatabaseError", "database error, code: 22023", "DatabaseError", http=500)
    return str(role)


def claims_of(token: str, secret: str) -> dict[str, Any]:
    """Return the claims of the token in a signed URL.

    Raises:
        ApiError: the token is invalid or has expired.
    """
    try:
        return _claims(token, secret)
    except ApiError as exc:
        raise ApiError(400, "InvalidJWT", str(exc), "InvalidJWT") from exc


def _claims(token: str, secret: str) -> dict[str, Any]:
    claims = _signed_claims(token, secret)
    if "exp" in claims or "nbf" in claims:
        return _decode(token, secret, verify_time=True)
    return claims


@lru_cache(maxsize=256)
def _signed_claims(token: str, secret: str) -> dict[str, Any]:
    """Return the claims without checking times; cached, because every request carries one of a few keys."""
    return _decode(token, secret, verify_time=False)


def _decode(token: str, secret: str, *, verify_time: bool) -> dict[str, Any]:
    unchecked = ("verify_aud", "verify_iat", "verify_sub", "verify_jti")
    options: Any = {**dict.fromkeys(unchecked, False), "verify_exp": verify_time, "verify_nbf": verify_time}
    try:
        return dict(jwt.decode(token, secret, algorithms=["HS256"], options=options))
    except jwt.ExpiredSignatureError as exc:
        raise denied('"exp" claim timestamp check failed') from exc
    except jwt.ImmatureSignatureError as exc:
        raise denied('"nbf" claim timestamp check failed') from exc
    except jwt.InvalidAlgorithmError as exc:
        raise denied('"alg" (Algorithm) Header Parameter value not allowed') from exc
    except jwt.InvalidSignatureError as exc:
        raise denied("signature verification failed") from exc
    except jwt.InvalidTokenError as exc:
        raise denied("Invalid Compact JWS") from exc
