"""What a file is that should be a photo or JSON, by its first bytes."""

from __future__ import annotations

import json
import re

JSON_OBJECT, JSON_ARRAY = "a JSON object", "a JSON array"

_HEAD = 4096
_KINDS = (
    (rb"\xff\xd8\xff", "a JPEG image"),
    (rb"\x89PNG", "a PNG image"),
    (rb"GIF8", "a GIF image"),
    (rb"BM.{12}", "a BMP image"),
    (rb"II\*\0|MM\0\*", "a TIFF image or a camera's raw file"),
    (rb"RIFF....WEBP", "a WebP image"),
    (rb"....ftyp(?:avi[fs]|mif1(?:.{4}){1,8}?avif)", "an AVIF image"),
    (rb"....ftyp(?:hei|hev|mif1|msf1)", "a HEIC image"),
    (rb"....ftyp", "a video"),
    (rb"\xff\x0a|....JXL ", "a JPEG XL image"),
    (rb"....jP  |\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (rb"%PDF", "a PDF document"),
    (rb"version https://git-lfs", "a Git LFS pointer, whose content was not fetched"),
    (rb"/annex/objects/", "a git-annex pointer, whose content was not fetched"),
    (rb"\x1f\x8b", "gzip data"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\0\x05\x16\x07|bplist00", "macOS metadata"),
    (rb"data:image/|/9j/", "a JPEG in base64"),
    (rb"(?:\xef\xbb\xbf){2}", "text with two byte order marks"),
    (rb"(?:\xef\xbb\xbf)?\s*\Z", "nothing but white space"),
    (rb"(?:\xef\xbb\xbf)?\s*<(?i:!doctype html|html|head|body)", "an HTML page"),
    (rb"(?:\xef\xbb\xbf)?\s*<", "an XML or SVG document"),
    (rb"(?:\xef\xbb\xbf)?\s*\{", JSON_OBJECT),
    (rb"(?:\xef\xbb\xbf)?\s*\[", JSON_ARRAY),
    (rb"(?:\xef\xbb\xbf)?\s*[^`].*```", "text around a block of Markdown, which has to be removed"),
    (rb"[^\n{}\[\]]*[,;\t][^\n{}\[\]]*\n", "a table of text (CSV)"),
)


def kind_of(content: bytes) -> str:
    """Return what a file is: a noun phrase, or an adjective for one without content; empty if that is unknown."""
    head = content[:_HEAD]
    if not head.strip(b"\0"):
        return "filled with zero bytes" if head else "empty"
    encoding = json.detect_encoding(head)  # by a byte order mark, or by the zero bytes of the first characters
    if not encoding.startswith("utf-8") and not {"\0", "\ufffd"} & set(head.decode(encoding, errors="replace")[:-1]):
        return f"{encoding[:6].upper()} text, not UTF-8"
    return next((name for pattern, name in _KINDS if re.match(pattern, head, re.DOTALL)), "")
