"""Print the result of a verification as lines or as one JSON object."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from pipeline.config import redact
from pipeline.observe.logger import printable
from pipeline.steps.verify import DAMAGED, DANGLING, EQUAL, MISSING, ORPHAN, SIGNS, Finding
from pipeline.storage import PAGE


class VerifyReport:
    """Print findings as they arrive, and spool the differences to a temporary file for the repair.

    Arguments:
        as_json: print one JSON object, incrementally.
        quiet: omit equal objects; JSON always omits them.
    """

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._json, self._quiet = as_json, quiet or as_json
        self.counts: dict[str, int] = dict.fromkeys(SIGNS, 0)
        self.repaired = self.remaining = 0
        self._is_open = False
        self._bucket = ""
        self._unfinished: list[str] = []
        self._elsewhere: dict[str, list[str]] = {}
        self._failed: list[str] = []

    def __enter__(self) -> VerifyReport:
        self._spool = tempfile.TemporaryFile("w+", encoding="utf-8")
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._spool.close()
        if self._json and self._is_open and error is not None:
            # Complete the JSON object; the exit code says that the comparison is incomplete.
            rest = {"totals": self.counts, "error": redact(str(error))}
            print("], " + json.dumps(rest, ensure_ascii=False)[1:])

    def begin(self, bucket: str, unfinished: Sequence[str], elsewhere: Mapping[str, Sequence[str]]) -> None:
        """Print what is compared."""
        self._bucket, self._unfinished, self._is_open = bucket, list(unfinished), True
        self._elsewhere = {name: list(batches) for name, batches in elsewhere.items()}
        if self._json:
            head = {"bucket": bucket, "unfinished": self._unfinished, "elsewhere": self._elsewhere}
            print(json.dumps(head)[:-1] + ', "differences": [', end="")

    def found(self, finding: Finding) -> None:
        """Print one finding."""
        self.counts[finding.kind] += 1
        if not (self._quiet and finding.kind == EQUAL):
            if self._json:
                separator = "" if not self.remaining else ", "
                entry = {"sign": SIGNS[finding.kind], "kind": finding.kind, "key": finding.key}
                print(separator + json.dumps({**entry, "message": finding.message}, ensure_ascii=False), end="")
            else:
                print(printable(finding.line()))
        if finding.kind != EQUAL:
            self.remaining += 1
            self._spool.write(json.dumps(asdict(finding)) + "\n")

    def differences(self) -> Iterator[Finding]:
        """Yield the differences found so far."""
        self._spool.seek(0)
        for line in self._spool:
            yield Finding(**json.loads(line))

    def total(self) -> None:
        """Print the number of findings of each kind."""
        if self._json:
            return
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        print(f"Verified bucket {self._bucket}: {counts}.")
        if self._unfinished:
            print(f"Skipped, because they are unfinished: {', '.join(self._unfinished)}.")
        for bucket, batches in self._elsewhere.items():
            print(f"Skipped, because they are in the bucket {bucket}: {', '.join(batches)}.")

    def plan(self) -> None:
        """Print what a repair will do."""
        if not self._json and self.remaining:
            again = self.counts[MISSING] + self.counts[DANGLING] + self.counts[DAMAGED]
            orphans = self.counts[ORPHAN]
            print(f"Repair: {again} objects are uploaded again from their source, {orphans} orphans are removed.")

    def repair(self, finding: Finding, reason: str) -> None:
        """Count a repaired difference, or print the reason why it was not repaired."""
        if not reason:
            self.repaired += 1
            self.remaining -= 1
        elif not self._json:
            print(printable(f"Not repaired: {finding.key}: {reason}"))
        elif len(self._failed) < PAGE:
            self._failed.append(f"{finding.key}: {reason}")

    def end(self, repair: bool) -> None:
        """Print the totals of the repair, or complete the JSON object."""
        if self._json:
            rest = {"totals": self.counts, "repaired": self.repaired, "remaining": self.remaining}
            self._is_open = False
            print("], " + json.dumps({**rest, "not_mended": self._failed}, ensure_ascii=False)[1:])
        elif repair:
            print(f"Repaired: {self.repaired}; remaining: {self.remaining}.")
