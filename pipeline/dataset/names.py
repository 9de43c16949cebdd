"""What the names of files and folders say: recognition, camera, document, date, and what is nearly one of them."""

from __future__ import annotations

import os
import re

from pipeline.dataset.records import Deviation

#: Any letter case of a name that is used; without re.ASCII, `i` also matches `ı` and `İ`, `s` matches `ſ`.
ANY_CASE = re.IGNORECASE | re.ASCII
#: The folder of a recognition.
FOLDER = re.compile(r"(?:recognition_)?([0-9]+)", ANY_CASE)
MENU = re.compile(r"(?:.*_)?AM\.json", ANY_CASE)
RECEIPT = re.compile(r"(?:.*_)?(?:correct_dishes|CD)\.json", ANY_CASE)

_PHOTO = re.compile(r"[^.].*\.(jpe?g|jpe|jfif)", ANY_CASE | re.DOTALL)
#: What systems add to the name of a copy: `x (1)`, `x - Copy`, `x copy 2`, `x 2`, `x - копия`, `Copy of x`.
_COPY = re.compile(
    r"(?:\([0-9]+\)|(?<=[a-z]) [0-9]+|[-_ ]\s*(?:copy|copie|c[oó]pia|kopie|копия)\b.*)\Z|\A(?:copy of|копия)\b",
    re.IGNORECASE,
)
#: What may be a date: eight digits, also with a time, or three numbers of which the first or last may be a year.
_DATE = re.compile(
    r"(?<![0-9])(?:(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[0-9]{4}|[0-9]{6})?"
    r"|(?:19|20)[0-9]{2}([-_. ])[0-9]{1,2}\1[0-9]{1,2}|[0-9]{1,2}([-_. ])[0-9]{1,2}\2(?:19|20)[0-9]{2}"
    r"|[0-9]{1,2}([-_. ])[0-9]{1,2}\3[0-9]{1,2}(?!\3[0-9]))(?![0-9])"
)
_NUMBER = re.compile(r"([0-9]+)[-_ ](?=recognition)|recognition[-_ ]?([0-9]+)", ANY_CASE)
_NEAR_FOLDER = re.compile(
    r".*recogn[^0-9]*([0-9]+).*|\W*([0-9]+)(?:\s*\([0-9]+\)|[-_. ]*(?:copy|копия|bak|old)\b.*)?\W*",
    re.IGNORECASE | re.DOTALL,
)
_ARCHIVE = re.compile(r".*\.(?:zip|rar|7z|tar|tgz|tbz2?|txz|tar\.\w+)", re.IGNORECASE | re.DOTALL)
_ANNOTATIONS = re.compile(r".*annotations.*\.json.*", ANY_CASE | re.DOTALL)


def last(path: str) -> str:
    """Return the last part of a path."""
    return path.rsplit("/", 1)[-1]


def is_photo(path: str) -> bool:
    """Return whether a file is a photo by its name; a hidden one is not."""
    return _PHOTO.fullmatch(last(path)) is not None


def is_copy(path: str) -> bool:
    """Return whether a file's name ends as systems name copies."""
    return _COPY.search(os.path.splitext(last(path))[0]) is not None


def camera_of(path: str) -> int | None:
    """Return the camera in a photo's name, 1 for Main and 2 for Qualifying; None if it names neither or both."""
    name = last(path).lower()
    is_main, is_qualifying = "main" in name, "qualifying" in name
    if is_main == is_qualifying:
        return None
    return 1 if is_main else 2


def numbers_of(name: str) -> list[str]:
    """Return the numbers of recognitions that a name contains, but for dates."""
    return [before or after for before, after in _NUMBER.findall(_DATE.sub("#", name))]


def other_recognition(path: str, number: int) -> str | None:
    """Return the number of the recognition that a file names, None if it names no other one than this."""
    named = numbers_of(last(path))
    return named[0] if named and str(number) not in {digits.lstrip("0") or "0" for digits in named} else None


def near_recognition(name: str) -> str | None:
    """Return the number of the recognition that a folder's name nearly names."""
    match = _NEAR_FOLDER.fullmatch(name)
    return (match[1] or match[2]) if match else None


def describe(name: str) -> Deviation:
    """Return why a file is passed over."""
    if _ANNOTATIONS.fullmatch(name):
        return Deviation("file_annotations", "annotations of a model are loaded by load-qwen")
    if _ARCHIVE.fullmatch(name):
        return Deviation("file_archive", "an archive is not opened: unpack it to load what is in it")
    return Deviation("file_unknown", "no recognition uses the file")
