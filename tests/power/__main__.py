"""Check what power failures leave of the embedded services.

    python -m tests.power [--states N] [--seed S] [--loads N] [--processes N]

Prints the number of states and `0 violations`, and for each sync the state that shows that it is needed. Exits with 1
if there is a violation, or a sync without one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from tests.power.states import PART, Count, check_part, disks, first_recordings
from tests.power.syncs import SYNCS, first_violation


def check_states(states: int, seed: int, processes: int) -> int:
    """Check states in several processes, print the result, and return the number of violations."""
    begin = time.monotonic()
    sizes = [min(PART, states - first) for first in range(0, states, PART)]
    work = [(seed, number, size) for number, size in enumerate(sizes)]
    parts = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for part in pool.map(check_part, work):
            parts.append(part)
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
    print(f"{len(SYNCS) - unnoticed} of {len(SYNCS)} missing syncs are noticed")
    return unnoticed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(prog="python -m tests.power", description="Check what power failures leave.")
    parser.add_argument("--states", type=int, default=10_000, metavar="N", help="states to check (10000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="repeats a run (0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one a CPU")
    options = parser.parse_args(arguments)
    found = check_states(options.states, options.seed, options.processes)
    return 1 if check_syncs(options.seed) or found else 0


if __name__ == "__main__":
    sys.exit(main())
