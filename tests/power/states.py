"""States that a power failure may leave of a Storage server, each checked against what its clients know."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.power.log import Entry, Made, Recorder, Synced
from tests.power.model import Model, Tree
from tests.power.script import (
    Client,
    Progress,
    Violation,
    check,
    failures_are_violations,
    progress_at,
    record,
    script,
)

#: States of one pass through a log; a pass applies each entry once.
_PASS = 50
#: States of one part, which has a script of its own.
PART = 125
#: One of so many states has a second power failure, while the server starts again or answers what was left.
_TWICE = 10
#: A missing sync is looked for in the entries after it, so many on average.
_AFTER = 8
#: The start of a server creates 256 folders, which are all alike.
_FOLDER_WEIGHT = 0.1


@dataclass(frozen=True)
class Found:
    """A violation, and the state that shows it."""

    after: str
    message: str

    def describe(self) -> str:
        return f"power failure after {self.after}: {self.message}"


@dataclass(frozen=True)
class Recording:
    """What one start and everything after it did to a disk."""

    client: Client
    log: Sequence[Entry]
    before: Path
    inodes: dict[str, int]
    first: Progress

    def sites(self) -> list[str]:
        """Return the lines of code that synced something."""
        return sorted({entry.site for entry in self.log if isinstance(entry, Synced)})

    def model(self, without: str = "") -> Model:
        """Return the disk before the first entry."""
        return Model(self.before, self.inodes, without)


def recording(client: Client, folder: Path, before: Path, first: Progress, seed: str) -> Recording:
    """Run the script of a client on a disk; `before` is a copy of the disk, which the recording keeps using."""
    recorder: Recorder = record(client, folder, first, seed)
    return Recording(client, recorder.log, before, recorder.first, first)


@contextmanager
def disks() -> Iterator[Path]:
    """Create a folder for disks, in memory where there is such a file system, and remove it after the block."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(
        prefix="power-", dir=memory if os.access(memory, os.W_OK | os.X_OK) else None, ignore_cleanup_errors=True
    ) as folder:
        os.chmod(folder, 0o711)  # the user of PostgreSQL passes through
        yield Path(folder).resolve()


def first_recordings(folder: Path, seed: str) -> list[Recording]:
    """Record a server that is alone, and one of a home."""
    made = []
    for is_home in (False, True):
        before, disk = folder / f"before-{is_home}", folder / f"disk-{is_home}"
        for path in (before, disk):
            (path / "srv").mkdir(parents=True)
        made.append(recording(Client(script(seed), is_home), disk, before, Progress(), seed))
    return made


@dataclass
class Count:
    """What was checked: states, those with different contents, and those that come from two power failures."""

    states: int = 0
    contents: set[int] = field(default_factory=set)
    twice: int = 0


def violations(
    one: Recording, folder: Path, states: int, chance: random.Random, count: Count, without: str = ""
) -> Iterator[Found]:
    """Check states of a recording, and yield the violations.

    Arguments:
        without: leave out the syncs of this site; the power fails after one of them.
    """
    for begin in range(0, states, _PASS):
        model, position = one.model(without), 0
        for end in sorted(_moments(one, min(_PASS, states - begin), chance, without)):
            for entry in one.log[position:end]:
                model.apply(entry)
            position = end
            after = f"entry {end} of {len(one.log)}"
            try:
                after += _check_state(one, model, end, folder, chance, count)
            except Violation as exc:
                yield Found(after, str(exc))


def _moments(one: Recording, states: int, chance: random.Random, without: str) -> Sequence[int]:
    """Return numbers of entries after which the power fails."""
    length = len(one.log)
    if without:
        syncs = [number for number, entry in enumerate(one.log) if isinstance(entry, Synced)]
        missing = [place for place, number in enumerate(syncs) if getattr(one.log[number], "site", "") == without]
        moments = []
        for _ in range(states):
            place = chance.choice(missing)
            if chance.randrange(4):  # when most is at stake: before one of the next syncs
                moments.append([*syncs, length][min(len(syncs), place + chance.randint(1, 3))])
            else:
                moments.append(min(length, syncs[place] + 1 + int(chance.expovariate(1 / _AFTER))))
        return moments
    weights = [1.0]
    for entry in one.log:
        weights.append(_FOLDER_WEIGHT if isinstance(entry, Made) and entry.is_folder else 1.0)
    return chance.choices(range(length + 1), weights, k=states)


def _check_state(one: Recording, model: Model, end: int, folder: Path, chance: random.Random, count: Count) -> str:
    """Check one state, and return a description of the second power failure, if there was one."""
    progress = progress_at(one.log, end, one.first)
    disk, before, again = folder / "state", folder / "before", folder / "again"
    tree = model.after_power_failure(chance)
    count.states += 1
    try:
        _write(tree, disk, chance)
        if chance.randrange(_TWICE):
            count.contents.add(tree.digest())
            check(one.client, disk, progress)
            return ""
        count.twice += 1
        before.mkdir()
        tree.write(before)
        with failures_are_violations():
            second = recording(one.client, disk, before, progress, str(chance.random()))
        later, [end] = second.model(model.without), _moments(second, 1, chance, "")
        for entry in second.log[:end]:
            later.apply(entry)
        tree = later.after_power_failure(chance)
        count.contents.add(tree.digest())
        _write(tree, again, chance)
        check(one.client, again, progress_at(second.log, end, progress))
        return f", and again after entry {end} of {len(second.log)}"
    finally:
        for used in (disk, before, again):
            remove(str(used))


def _write(tree: Tree, disk: Path, chance: random.Random) -> None:
    """Write a state, with anything in the files whose content does not matter."""
    disk.mkdir()
    tree.write(disk)
    if "srv/new/home/storage" in tree.folders:
        for name in ("index.sqlite-shm", "server.json"):
            if chance.randrange(2):
                content = chance.randbytes(chance.choice((0, 3, 100, 32768)))
                (disk / "srv" / "new" / "home" / "storage" / name).write_bytes(content)


def remove(folder: str) -> None:
    """Remove a folder with everything in it, if it exists; faster than shutil.rmtree."""
    if not os.path.isdir(folder):
        return
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            remove(entry.path)
        else:
            os.unlink(entry.path)
    os.rmdir(folder)


@dataclass(frozen=True)
class Part:
    """The result of a part: its seed, the length of both logs, and what was checked and found."""

    seed: str
    entries: int
    count: Count
    found: list[str]


def check_part(arguments: tuple[int, int, int]) -> Part:
    """Check some states of a server alone and of one in a home."""
    seed, number, states = arguments
    name = f"{seed}.{number}"
    count, found = Count(), list[str]()
    with disks() as folder:
        recordings = first_recordings(folder, name)
        for place, one in enumerate(recordings):
            share = states // 2 + (place and states % 2)
            chance = random.Random(f"{name}.{place}")
            found += [each.describe() for each in violations(one, folder, share, chance, count)]
    return Part(name, sum(len(one.log) for one in recordings), count, found)
