"""Check mutated photos, documents and annotations files: nothing but BadInput and PipelineError may come out.

    python -m tests.fuzz --count 20000
    python -m tests.fuzz --seed 7 --only 1234 --write FILE     one file of an earlier run

Files are checked in child processes, so that a crash of the JPEG decoder is a finding as well. A child ends with the
file that takes more than 10 seconds of processor time or 250 MB of memory, and another one goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

from pipeline.dataset.annotations import read_entries
from pipeline.dataset.detections import detections_of, photo_of
from pipeline.dataset.documents import check_menu, check_receipt
from pipeline.dataset.photo import check_photo
from pipeline.dataset.records import Deviation
from pipeline.errors import BadInput, PipelineError
from tests.mutations import ANNOTATIONS, MENU, PHOTO, RECEIPT, mutant

SECONDS = 10
MEGABYTES = 250
_SHARE = 500
#: Of ru_maxrss, in bytes.
_UNIT = 1 if sys.platform == "darwin" else 1024


def check_annotations(content: bytes) -> None:
    """Read an annotations file as discovery does."""
    forms: set[Deviation] = set()
    for entry in read_entries(BytesIO(content), forms):
        try:
            photo_of(entry.key)
            if entry.problem is None:
                detections_of(entry.value, forms)
        except BadInput:
            pass


CHECKS = {PHOTO: check_photo, MENU: check_menu, RECEIPT: check_receipt, ANNOTATIONS: check_annotations}


@dataclass(frozen=True)
class Outcome:
    """What came out of a file: a code, seconds of processor time, and megabytes that its process has used so far."""

    name: str
    kind: str
    code: str
    seconds: float
    megabytes: float
    failure: str


@dataclass
class Report:
    """What came out of all files."""

    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: list[Outcome] = field(default_factory=list)
    largest: list[Outcome] = field(default_factory=list)
    failures: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.codes[outcome.kind, outcome.code] += 1
        self.slowest = sorted([*self.slowest, outcome], key=lambda one: -one.seconds)[:3]
        self.largest = sorted([*self.largest, outcome], key=lambda one: -one.megabytes)[:1]
        if outcome.failure:
            self.failures.append(outcome)

    def __str__(self) -> str:
        lines = []
        for kind in CHECKS:
            codes = {code: count for (other, code), count in sorted(self.codes.items()) if other == kind}
            found = ", ".join(f"{count} {code}" for code, count in codes.items())
            lines.append(f"{sum(codes.values())} files of kind {kind}: {found}")
        slowest = ", ".join(f"{one.seconds:.2f} s for {one.name} ({one.kind})" for one in self.slowest)
        largest = ", ".join(f"{one.megabytes:.0f} MB up to {one.name}" for one in self.largest)
        lines.append(f"most processor time: {slowest}; most memory: {largest}")
        lines += [f"FAILED {one.name} ({one.kind}): {one.failure}" for one in self.failures]
        return "\n".join([*lines, f"{self.codes.total()} files, {len(self.failures)} failed"])


def fuzz(seed: int, count: int, first: int = 0, program: Sequence[str] = ("-m", "tests.fuzz")) -> Report:
    """Check files `first` to `count` of a seed in child processes, one after the other, each a Python of `program`.

    It ends early when twenty have failed.
    """
    report = Report()
    while first < count and len(report.failures) < 20:
        share = ("--seed", str(seed), "--share", str(first), str(min(count, first + _SHARE)))
        first = _in_child(report, seed, first, [sys.executable, *program, *share])
    return report


def _in_child(report: Report, seed: int, first: int, command: Sequence[str]) -> int:
    """Check some files in one child process; return the number of the next file."""
    number, is_checked = first - 1, True
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as child:
            assert child.stdout is not None
            for line in child.stdout:
                said = json.loads(line)
                is_checked = isinstance(said, dict)
                if is_checked:
                    report.add(Outcome(**said))
                else:
                    number = said
        if child.returncode:
            errors.seek(0)
            why = f"ends its process with {child.returncode}: {errors.read()[-2000:].decode(errors='replace')}"
            if is_checked:  # not while a file was checked: there is something wrong with the fuzz itself
                raise RuntimeError(f"a child {why}")
            report.add(Outcome(f"{seed}:{number}", mutant(seed, number)[0], "crashed", 0.0, 0.0, why))
    return number + 1


def _check_share(seed: int, first: int, last: int) -> None:
    """Check some files and print, for each, its number and then what came out; end with the first that fails."""
    for number in range(first, last):
        kind, content = mutant(seed, number)
        print(number, flush=True)
        outcome = check(f"{seed}:{number}", kind, content)
        print(json.dumps(asdict(outcome)), flush=True)
        if outcome.failure:
            return


def check(name: str, kind: str, content: bytes) -> Outcome:
    """Check a file and say what came out."""
    begin = time.process_time()
    # The signal SIGXCPU ends the process, whatever it computes.
    resource.setrlimit(resource.RLIMIT_CPU, (int(begin) + SECONDS + 2, resource.RLIM_INFINITY))
    code, failure = "accepted", ""
    try:
        CHECKS[kind](content)
    except BadInput as exc:
        code = exc.code
    except PipelineError:
        code = "refused"
    except Exception:  # noqa: BLE001 - these are what is looked for
        code, failure = "failed", traceback.format_exc(limit=-4)
    seconds = time.process_time() - begin
    megabytes = _megabytes()
    if seconds > SECONDS:
        failure = f"takes {seconds:.1f} s of processor time"
    elif megabytes > MEGABYTES:
        failure = f"takes {megabytes:.0f} MB of memory"
    return Outcome(name, kind, code, seconds, megabytes, failure)


def _megabytes() -> float:
    """Return the most memory that this process has used.

    On Linux the resource usage of a new process begins with the memory of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT / 1e6


def main() -> int:
    """Run the command; return 1 if a file failed."""
    assert __doc__
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="number of files")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="chosen at random by default")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="check a single file")
    parser.add_argument("--write", type=Path, metavar="FILE", help="with --only: write the file, do not check it")
    parser.add_argument("--share", type=int, nargs=2, metavar=("FIRST", "LAST"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share:
        _check_share(options.seed, *options.share)
        return 0
    if options.write:
        options.write.write_bytes(mutant(options.seed, options.only)[1])
        return 0
    print(f"seed {options.seed}", flush=True)
    if options.only is None:
        report = fuzz(options.seed, options.count)
    else:
        report = fuzz(options.seed, options.only + 1, options.only)
    print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
