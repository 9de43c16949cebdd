"""What a key says of itself: the claims of a JSON Web Token (RFC 7519), and the role; its signature is not verified."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

SERVICE = "service_role"


def claims_of(key: str) -> dict[str, Any] | None:
    """Return the unverified claims of a JSON Web Token, None if it is not one."""
    parts = key.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return None
    return claims if isinstance(claims, dict) else None


def restricted_role(key: str) -> str | None:
    """Return the role of a key that row-level security hides objects from; None if the key does not tell of one."""
    if key.startswith("sb_publishable_"):
        return "anon"
    claims = claims_of(key)
    if claims is None:
        return None
    role = str(claims.get("role") or "anon")
    return role if role in ("anon", "authenticated") else None
