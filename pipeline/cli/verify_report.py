"""What a verification says, as it goes: lines for people, or one JSON object, with the differences kept in a file."""

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
    """Print findings as they come, as lines or as one JSON object, and keep the differences in a file of their own.

    Arguments:
        as_json: one object on stdout, written piece by piece.
        quiet: leave out what is equal; JSON always does.
    """

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._json, self._quiet = as_json, quiet or as_json
        self.counts: dict[str, int] = dict.fromkeys(SIGNS, 0)
        self.strangers = 0
        self.repaired = self.remaining = 0
        self._begun = False
        self._bucket = ""
        self._unfinished: list[str] = []
        self._elsewhere: dict[str, list[str]] = {}
        self._unmended: list[str] = []

    def __enter__(self) -> VerifyReport:
        self._spool = tempfile.TemporaryFile("w+", encoding="utf-8")
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._spool.close()
        if self._json and self._begun and error is not None:
            # Whoever parses the output gets a whole object; the exit code says that it is not the whole truth.
            rest = {"totals": self.counts, "error": redact(str(error))}
            print("], " + json.dumps(rest, ensure_ascii=False)[1:])

    def begin(self, bucket: str, unfinished: Sequence[str], elsewhere: Mapping[str, Sequence[str]]) -> None:
        """Say what is compared."""
        self._bucket, self._unfinished, self._begun = bucket, list(unfinished), True
        self._elsewhere = {name: list(batches) for name, batches in elsewhere.items()}
        if self._json:
            head = {"bucket": bucket, "unfinished": self._unfinished, "elsewhere": self._elsewhere}
            print(json.dumps(head)[:-1] + ', "differences": [', end="")

    def found(self, finding: Finding) -> None:
        """Tell of one finding."""
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
            self.strangers += finding.kind == ORPHAN and finding.batch_id is None
            self._spool.write(json.dumps(asdict(finding)) + "\n")

    def differences(self) -> Iterator[Finding]:
        """Yield what is not equal again."""
        self._spool.seek(0)
        for line in self._spool:
            yield Finding(**json.loads(line))

    def total(self) -> None:
        """Say how many there are of each kind."""
        if self._json:
            return
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        print(f"Verified bucket {self._bucket}: {counts}.")
        if self._unfinished:
            print(f"Not looked at, for they are unfinished: {', '.join(self._unfinished)}.")
        for bucket, batches in self._elsewhere.items():
            print(f"Not looked at, for they are in the bucket {bucket}: {', '.join(batches)}.")

    def plan(self) -> None:
        """Say what a repair will do."""
        if not self._json and self.remaining:
            again = self.counts[MISSING] + self.counts[DANGLING] + self.counts[DAMAGED]
            print(
                f"Repair: {again} objects are sent again from their source, {self.counts[ORPHAN]} orphans are removed."
            )

    def mended(self, finding: Finding, why_not: str) -> None:
        """Tell what became of one difference."""
        if not why_not:
            self.repaired += 1
            self.remaining -= 1
        if self._json:
            self._unmended += [f"{finding.key}: {why_not}"] if why_not and len(self._unmended) < PAGE else []
        elif why_not:
            print(printable(f"Not mended: {finding.key}: {why_not}"))

    def end(self, repair: bool) -> None:
        """Say the last word."""
        if self._json:
            rest = {"totals": self.counts, "repaired": self.repaired, "remaining": self.remaining}
            self._begun = False
            print("], " + json.dumps({**rest, "not_mended": self._unmended}, ensure_ascii=False)[1:])
        elif repair:
            print(f"Repaired: {self.repaired}; remaining: {self.remaining}.")
