"""Check what power failures leave of the embedded services.

    python -m tests.power [--states N] [--loads N] [--seed S] [--processes N]

Prints the number of states and `0 violations`, for the Storage server alone and for whole loads, and for each sync the
state that shows that it is needed. Exits with 1 if there is a violation, or a sync without one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.power.loads import loads
from tests.power.postgres import first_loss, record_start
from tests.power.script import Violation
from tests.power.states import PART, Count, check_part, disks, first_recordings
from tests.power.syncs import POSTGRES_SYNC, SYNCS, first_violation

#: States of Storage that are tried after each load.
STATES_OF_LOAD = 3


def check_states(states: int, seed: int, processes: int) -> int:
    """Check states in several processes, print the result, and return the number of violations."""
    begin = time.monotonic()
    sizes = [min(PART, states - first) for first in range(0, states, PART)]
    work = [(seed, number, size) for number, size in enumerate(sizes)]
    parts = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for part in pool.map(check_part, work):
            parts.append(part)
            if len(parts) % 10 == 0:
                print(f"{len(parts)} of {len(work)} parts", file=sys.stderr, flush=True)
            for message in part.found:
                print(f"violation in part {part.seed}: {message}", flush=True)
    found = sum(len(part.found) for part in parts)
    contents = set[int]().union(*(part.count.contents for part in parts))
    print(
        f"{sum(part.count.states for part in parts):,} states, {len(contents):,} different ones, "
        f"{sum(part.count.twice for part in parts):,} after two power failures; "
        f"{len(parts)} scripts, {sum(part.entries for part in parts):,} changes and syncs; "
        f"{time.monotonic() - begin:.0f} s in {processes} processes"
    )
    print(f"{found} violations", flush=True)
    return found


def check_syncs(seed: int) -> int:
    """Leave out each sync, print the violation that it causes, and return the number of syncs without one."""
    unnoticed = 0
    print("\nWithout one sync:")
    with disks() as folder:
        recordings = first_recordings(folder, str(seed))
        for name in sorted(set(SYNCS).union(*(one.sites() for one in recordings))):
            count = Count()
            found = first_violation(recordings, name, folder, seed, count)
            unnoticed += found is None
            print(f"  {name}\n      state {count.states}: {found.message if found else 'no violation'}", flush=True)
        recorder = record_start(folder)
        assert first_loss(recorder, seed) is None
        loss = first_loss(recorder, seed, POSTGRES_SYNC)
        unnoticed += loss is None
        print(f"  {POSTGRES_SYNC}\n      {loss or 'no violation'}")
    print(f"{len(SYNCS) + 1 - unnoticed} of {len(SYNCS) + 1} missing syncs are noticed", flush=True)
    return unnoticed


def check_loads(count: int, seed: int) -> int:
    """Let the power fail in so many loads, print the result, and return the number of violations."""
    begin, found, chance = time.monotonic(), 0, random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="power-", dir="/tmp") as folder:  # a path short enough for sockets
        os.chmod(folder, 0o711)  # the user of PostgreSQL passes through
        with loads(Path(folder)) as runs:
            entries = runs.entries()
            for _ in range(count):
                end = chance.choice(entries)
                try:
                    runs.interrupted(end, STATES_OF_LOAD, chance)
                except Violation as exc:
                    found += 1
                    print(f"violation after entry {end} of a load: {exc}", flush=True)
    print(
        f"\n{count} loads, ended by power failures among {len(entries)} changes and syncs of Storage, then finished "
        f"and verified on {STATES_OF_LOAD} states each; {time.monotonic() - begin:.0f} s\n{found} violations"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(prog="python -m tests.power", description="Check what power failures leave.")
    parser.add_argument("--states", type=int, default=10_000, metavar="N", help="states to check (10000)")
    parser.add_argument("--loads", type=int, default=10, metavar="N", help="loads that a power failure ends (10)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="repeats a run (0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one a CPU")
    options = parser.parse_args(arguments)
    found = check_states(options.states, options.seed, options.processes) if options.states else 0
    found += check_syncs(options.seed)
    found += check_loads(options.loads, options.seed) if options.loads else 0
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
