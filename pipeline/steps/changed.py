"""Look at recognitions that are not new, and find those whose files are no longer what was loaded.

Size and time of each file decide first. Where they differ, or where files were added, content decides, by SHA-256. What
a look found equal is remembered, so that the next one need not read it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

from pipeline.database import Connection, line_of
from pipeline.dataset.documents import check_menu, check_receipt
from pipeline.dataset.passed import count_below, uncounted
from pipeline.dataset.recognition import inspect_copies
from pipeline.dataset.records import NOT_TAKEN, UNCHANGED, Inspected, Notice, Recognition, Reject
from pipeline.errors import BadInput
from pipeline.steps.in_use import read_document
from pipeline.steps.parallel import spread
from pipeline.steps.read import hash_file
from pipeline.steps.staging import Seen, copy_found, copy_staged

_PAGE = 2000


def look_at_left(seen: Seen, last: int, executor: Executor, check: Callable[[Any], Inspected] | None) -> None:
    """Look at what is loaded, held by another batch, or beyond the limit, and add its files by class.

    What changed is added to pg_temp.staged, unless it is rejected already. What cannot be used of it is a reject;
    `check` finds that out for --strict.
    """
    connection, source, files, after, remembered = seen.connection, seen.source, seen.files, -1, 0
    connection.enqueue("create_remembered")
    while page := connection.execute("list_left", after=after, last=last, count=_PAGE):
        before, after = after, page[-1].recognition_id
        untouched = list(spread(partial(_count_untouched, str(source)), page, executor))
        alone = [bool(count) and len(row.paths) == 1 for row, count in zip(page, untouched, strict=True)]
        files[UNCHANGED] += sum(compress(untouched, alone))
        rest = [row for row, done in zip(page, alone, strict=True) if not done]
        looks = list(spread(partial(_look, source), rest, executor))
        pairs = zip(page, untouched, strict=True)
        suspects = [row for row, count in pairs if row.loaded and row.identity is not None and not count]
        changed, equal = _compare(connection, source, suspects, executor) if suspects else ({}, 0)
        remembered += equal
        if check is not None and seen.is_taken:
            usable = [row for row in suspects if row.recognition_id in changed and row.holder is None]
            changed |= {row.recognition_id: one for row, one in zip(usable, executor.map(check, usable), strict=True)}
        notices: list[Notice] = []
        rejects: list[Reject] = []
        for row, (files_below, noticed) in zip(rest, looks, strict=True):
            one = changed.get(row.recognition_id)
            if one is None:
                files.update(files_below)
                notices += noticed
            elif row.holder is not None:
                files[NOT_TAKEN] += files_below.total()
                seen.held += seen.is_taken
                del changed[row.recognition_id]
            elif isinstance(one.result, Reject):
                rejects.append(one.result)
                files.update(one.files if seen.is_taken else {NOT_TAKEN: files_below.total()})
            else:
                files.update(one.files)
            if one is not None and row.holder is None and seen.is_taken:
                notices += one.notices
        if staged := [one.result for one in changed.values() if isinstance(one.result, Recognition)]:
            copy_staged(connection, staged, {row.recognition_id: row.former for row in suspects})
            seen.drop_known(before)
        copy_found(connection, notices)
        copy_found(connection, rejects, is_taken=seen.is_taken)
        seen.advance(row.captured_on for row in page)
    if remembered:
        connection.execute("remember_seen")  # at the end, since it locks rows of other batches


def _count_untouched(source: str, row: Any) -> int:
    """Return the number of files of a recognition if its newest folder has what is loaded, and nothing else; else 0.

    Most recognitions are untouched every night, so the time of a look is spent here.
    """
    if not (row.loaded and row.identity):
        return 0
    folder, recorded = row.paths[0], row.identity.split("//")
    names, photos, inner = set(), "", set()
    try:
        for one in recorded:
            size, time, path = one.split(" ", 2)
            facts = os.stat(f"{source}/{path}")
            if facts.st_mtime_ns != int(time) or facts.st_size != int(size) or not path.startswith(folder):
                return 0
            name, _, in_photos = path[len(folder) + 1 :].partition("/")
            names.add(name)
            if in_photos:
                if photos not in ("", name):
                    return 0
                photos = name
                inner.add(in_photos)
        is_same = names.issuperset(os.listdir(f"{source}/{folder}"))
        if is_same and photos:
            is_same = inner.issuperset(os.listdir(f"{source}/{folder}/{photos}"))
    except (OSError, ValueError):
        return 0
    return len(recorded) if is_same else 0


def _look(source: Path, row: Any) -> tuple[Counter[str], list[Notice]]:
    """Return the files below a recognition's folders by class, and what is noticed there; open no file."""
    start = row.identity.split("//")[0].split(" ", 2)[-1] if row.identity else ""
    own = next((path for path in row.paths if start.startswith(f"{path}/")), row.paths[0])
    files, notices = Counter[str](), []
    for path in row.paths:
        below = count_below(source, path, UNCHANGED if row.loaded and path == own else NOT_TAKEN)
        files.update(below.files)
        notices += uncounted(row.recognition_id, path, below)
    return files, notices


def _compare(
    connection: Connection, source: Path, suspects: Sequence[Any], executor: Executor
) -> tuple[dict[int, Inspected], int]:
    """Inspect the folders of recognitions; return those that are not what was loaded, and how many are to remember."""
    numbers = [row.recognition_id for row in suspects]
    recorded = {row.recognition_id: row for row in connection.execute("list_recorded", recognition_ids=numbers)}
    pairs = [(row, recorded[row.recognition_id]) for row in suspects if row.recognition_id in recorded]
    changed: dict[int, Inspected] = {}
    same: dict[int, Inspected] = {}
    for (row, _), (found, is_changed) in zip(pairs, spread(partial(_inspect, source), pairs, executor), strict=True):
        (changed if is_changed else same)[row.recognition_id] = found
    adopted = [number for number in same if recorded[number].adopted and isinstance(same[number].result, Recognition)]
    for number in _find_other_documents(connection, source, [same[one].result for one in adopted]) if adopted else ():
        changed[number] = same.pop(number)
    usable = [one.result for one in same.values() if isinstance(one.result, Recognition)]
    rows = [(recorded[one.recognition_id].batch_id, one.recognition_id, one.identity) for one in usable]
    return changed, connection.copy_in("pg_temp.remembered", ("batch_id", "recognition_id", "identity"), rows)


def _inspect(source: Path, pair: tuple[Any, Any]) -> tuple[Inspected, bool]:
    """Return what is in the folders of a recognition, and whether photos, documents or date are not those on record.

    An unreadable folder counts as unchanged.
    """
    row, recorded = pair
    found = inspect_copies(source, row.recognition_id, row.paths)
    if isinstance(found.result, Reject) or found.result.identity == row.identity:
        return found, isinstance(found.result, Reject) and found.result.code != "folder_unreadable"
    differs = _differs_from_adopted if recorded.adopted else _differs
    try:
        return found, differs(source, found.result, recorded)
    except OSError:  # the upload finds out whether it is a reject
        return found, True


def _differs(source: Path, found: Recognition, recorded: Any) -> bool:
    if found.captured_on != recorded.captured_on:
        return True
    documents = ((found.menu, recorded.menu_sha256), (found.receipt, recorded.receipt_sha256))
    if any((file is None) != (digest is None) for file, digest in documents):
        return True
    if any(file.size != size for file, size in zip(found.photos, recorded.photo_sizes, strict=True)):
        return True
    digests = zip(found.photos, recorded.sha256s, strict=True)
    return any(file is not None and hash_file(source, file) != digest for file, digest in (*documents, *digests))


def _differs_from_adopted(source: Path, found: Recognition, recorded: Any) -> bool:
    """Return whether photos are not those that another tool loaded, as far as that can be known.

    That tool may have encoded all photos anew. Before the first look, a photo changed if it differs from its object and
    the other one equals its own. Later, it changed if its size differs from the size at an earlier look.
    """
    if recorded.seen is not None:
        sizes = [int(one.split(" ", 1)[0]) for one in recorded.seen.split("//")[:2]]
        return [file.size for file in found.photos] != sizes
    same = [
        file.size == size and md5 is not None and hash_file(source, file, "md5") == md5
        for file, size, md5 in zip(found.photos, recorded.photo_sizes, recorded.md5s, strict=True)
    ]
    return any(same) and not all(same)


def _find_other_documents(connection: Connection, source: Path, adopted: Sequence[Any]) -> list[int]:
    """Return the adopted recognitions whose receipt or menu is not what the domain has of them."""
    broken: list[int] = []
    connection.execute("create_documents")
    columns = ("recognition_id", "receipt", "menu")
    connection.copy_lines("pg_temp.documents", columns, _documents(source, adopted, broken))
    return [*broken, *(row.recognition_id for row in connection.execute("list_other_documents"))]


def _documents(source: Path, adopted: Sequence[Any], broken: list[int]) -> Iterator[bytes]:
    for one in adopted:
        try:
            receipt = read_document(source, one.receipt, check_receipt)
            yield line_of((one.recognition_id, receipt, read_document(source, one.menu, check_menu)))
        except BadInput:  # the upload rejects it
            broken.append(one.recognition_id)
