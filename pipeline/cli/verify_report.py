"""Print the result of a verification as lines or as one JSON object."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pipeline.config import redact
from pipeline.errors import printable
from pipeline.observe.logger import show
from pipeline.steps.verify import DAMAGED, DANGLING, EQUAL, MISSING, ORPHAN, SIGNS, Finding, Verification
from pipeline.storage import PAGE
from pipeline.units import counted


class VerifyReport:
    """Print findings as they arrive, and spool the differences to a temporary file for the repair.

    With `--json`, which omits equal objects, one object is printed incrementally, and completed after an error as well.
    """

    def __init__(self, options: argparse.Namespace, verification: Verification) -> None:
        self._json, self._quiet, self._repair = options.json, options.quiet or options.json, options.repair
        self._bucket = verification.bucket
        self._unfinished, self._elsewhere = verification.unfinished, verification.elsewhere
        self.counts: dict[str, int] = dict.fromkeys(SIGNS, 0)
        self.repaired = self.remaining = 0
        self._read: dict[str, int] = {}
        self._failed: list[str] = []
        self._spool = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> VerifyReport:
        if self._json:
            head = {"bucket": self._bucket, "unfinished": self._unfinished, "elsewhere": self._elsewhere}
            show(json.dumps(head)[:-1] + ', "differences": [', end="")
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._spool.close()
        if self._json:
            end: dict[str, object] = {"repaired": self.repaired, "remaining": self.remaining}
            end = {"error": redact(str(error))} if error is not None else {**end, "not_mended": self._failed}
            end.update(self._read)
            show("], " + json.dumps({"totals": self.counts, **end}, ensure_ascii=False)[1:])
        elif self._repair and error is None:
            show(f"Repaired: {self.repaired}; remaining: {self.remaining}.")

    def found(self, finding: Finding, *, again: bool = False) -> None:
        """Print one finding, or `again` what is known now of an object that was found equal."""
        self.counts[finding.kind] += 1
        self.counts[EQUAL] -= again
        if self._json and finding.kind != EQUAL:
            entry = {"sign": SIGNS[finding.kind], "kind": finding.kind, "key": finding.key, "message": finding.message}
            show((", " if self.remaining else "") + json.dumps(entry, ensure_ascii=False), end="")
        elif not (self._quiet and finding.kind == EQUAL):
            show(printable(finding.line()))
        if finding.kind != EQUAL:
            self.remaining += 1
            self._spool.write(json.dumps(asdict(finding)) + "\n")

    def was_read(self, count: int, proofs: Any) -> None:
        """Keep how many objects were read in the time there was, and the row of count_proofs after that."""
        self._read = {"read": count, "left": max(0, proofs.objects - count), "never_read": proofs.never_read}

    def differences(self) -> Iterator[Finding]:
        """Yield the differences found so far."""
        self._spool.seek(0)
        yield from (Finding(**json.loads(line)) for line in self._spool)

    def total(self) -> None:
        """Print the number of findings of each kind, and what a repair will do."""
        if self._json:
            return
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        show(f"Verified bucket {self._bucket}: {counts}.")
        if self._read:
            read, left, never = self._read.values()
            rest = f"{left} left; {never} were never read"
            show(f"Read {counted(read, 'object')}, the longest unread first; {rest}.")
        if self._unfinished:
            show(f"Skipped, because they are unfinished: {', '.join(self._unfinished)}.")
        for bucket, batches in self._elsewhere.items():
            show(f"Skipped, because they are in the bucket {bucket}: {', '.join(batches)}.")
        if self._repair and self.remaining:
            again = counted(self.counts[MISSING] + self.counts[DANGLING] + self.counts[DAMAGED], "object")
            show(f"Repair: {again} to upload again, {counted(self.counts[ORPHAN], 'orphan')} to remove.")

    def repair(self, finding: Finding, reason: str) -> None:
        """Count a repaired difference, or print the reason why it was not repaired."""
        if not reason:
            self.repaired += 1
            self.remaining -= 1
        elif not self._json:
            show(printable(f"Not repaired: {finding.key}: {reason}"))
        elif len(self._failed) < PAGE:
            self._failed.append(f"{finding.key}: {reason}")
