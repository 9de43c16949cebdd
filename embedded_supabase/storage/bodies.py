"""Request bodies: JSON, a raw object, or a multipart form that contains an object."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from embedded_supabase.storage.errors import (
    ApiError,
    schema,
    too_large,
)
from embedded_supabase.storage.files import Incoming
from embedded_supabase.storage.records import Attributes
from embedded_supabase.storage.requests import (
    check_content_type,
    form_metadata,
)

#: Limit of a JSON body and of a form field, in bytes.
_JSON_LIMIT = 1 << 20


class JsonBody:
    """A JSON body, held in memory, up to the limit of the API."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._is_too_large = False

    def write(self, chunk: bytes) -> None:
        """Append a chunk."""
        self._is_too_large = self._is_too_large or len(self._content) + len(chunk) > _JSON_LIMIT
        if not self._is_too_large:
            self._content += chunk

    def read(self, content_type: str) -> Any:
        """Return the value, None for an empty body.

        Raises:
            ApiError: the body is too large or not JSON.
        """
        if self._is_too_large:
            raise ApiError(413, "Payload too large", "Request body is too large", "EntityTooLarge", http=413)
        if not self._content and not content_type.startswith("application/json"):
            return None
        try:
            return json.loads(bytes(self._content))
        except (ValueError, RecursionError) as exc:
            raise ApiError(400, "FastifyError", "Body is not valid JSON", "InvalidRequest") from exc

    def abandon(self) -> None:
        """Do nothing; the body is in memory."""


class RawBody:
    """A body that is the object."""

    def __init__(self, incoming: Incoming, limit: int, attributes: Attributes) -> None:
        self.incoming = incoming
        self.attributes = attributes
        self._limit = limit

    def write(self, chunk: bytes) -> None:
        """Append a chunk.

        Raises:
            ApiError: the object is too large.
            OSError: the chunk cannot be written.
        """
        if self.incoming.size + len(chunk) > self._limit:
            raise too_large()
        self.incoming.write(chunk)

    def finish(self) -> Attributes:
        """Return the attributes from the headers."""
        return self.attributes

    def abandon(self) -> None:
        """Remove the received file."""
        self.incoming.abandon()


class FormBody:
    """A multipart form (RFC 7578): the first part with a file name is the object, earlier parts are its attributes."""

    def __init__(self, incoming: Incoming, limit: int, boundary: bytes, check_type: Callable[[str], None]) -> None:
        self.incoming = incoming
        self._limit = limit
        self._check_type = check_type
        self._fields: dict[str, bytearray] = {}
        self._field: bytearray | None = None
        self._header = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._is_file = False
        self._attributes: Attributes | None = None
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._headers.clear,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def write(self, chunk: bytes) -> None:
        """Append a chunk.

        Raises:
            ApiError: the form is malformed, or the file is too large or of a type that the bucket does not allow.
            OSError: the chunk cannot be written.
        """
        try:
            self._parser.write(chunk)
        except FormParserError as exc:
            raise schema(f"Multipart: {exc}") from exc

    def finish(self) -> Attributes:
        """Return the attributes from the form.

        Raises:
            ApiError: the form has no file or is incomplete.
        """
        if not self._ended:
            raise schema("Request stream closed before upload could begin")
        if self._attributes is None:
            raise schema("No content provided")
        return self._attributes

    def abandon(self) -> None:
        """Remove the received file."""
        self.incoming.abandon()

    def _on_header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._headers[name.lower()] = value
        for part in self._header:
            part.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._field = None
        self._is_file = b"filename" in options and self._attributes is None
        if self._is_file:
            self._attributes = self._read_attributes(self._headers.get(b"content-type", b"").decode("latin-1"))
        elif b"filename" not in options:
            name = options.get(b"name", b"").decode("utf-8", "replace")
            self._field = self._fields.setdefault(name, bytearray())

    def _read_attributes(self, part_type: str) -> Attributes:
        fields = {name: bytes(value).decode("utf-8", "replace") for name, value in self._fields.items()}
        mime_type = check_content_type(fields.get("contentType") or part_type or "application/octet-stream")
        self._check_type(mime_type)
        age = fields.get("cacheControl")
        metadata = fields.get("metadata") or fields.get("userMetadata")
        return Attributes(
            mime_type, f"max-age={age}" if age else "no-cache", form_metadata(metadata) if metadata else {}
        )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            if self.incoming.size + end - start > self._limit:
                raise too_large()
            self.incoming.write(data[start:end])
        elif self._field is not None and len(self._field) < _JSON_LIMIT:
            self._field += data[start:end]

    def _on_part_end(self) -> None:
        self._is_file = False

    def _on_end(self) -> None:
        self._ended = True
