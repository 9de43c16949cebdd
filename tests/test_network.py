"""Loads over a network that delays, cuts, loses and refuses: they end right, after a bounded number of tries."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from embedded_supabase.files import wait_until
from pipeline.batches.lock import BatchLock
from pipeline.cli import main
from pipeline.config import Settings
from tests import world
from tests.proxies import (
    ANSWER_LOST,
    BAD_GATEWAY,
    DATABASE_TIMEOUT,
    HALF_ANSWERED,
    HALF_OPEN,
    HARMLESS,
    INTERNAL,
    LATE,
    LOCK_TIMEOUT,
    LOST,
    NO_SERVICE,
    OVERLOAD,
    PORTAL,
    REQUEST_CUT,
    REQUEST_LATE,
    RESOURCE_LOCKED,
    SHUTTING_DOWN,
    SILENT,
    SLOW_DOWN,
    STARTING_UP,
    TRANSIENT,
    UNANSWERED,
    DatabaseProxy,
    Fault,
    Harm,
    Message,
    Request,
    StorageProxy,
    error,
    first,
    mixed,
)
from tests.services import MakeDataset, RunPipeline

#: They wait more than they compute.
pytestmark = pytest.mark.slow

#: More tries than there will ever be.
ALWAYS = 1_000_000
#: Tries of a request that fails again and again, and of one that is put off.
TRIES, PATIENT_TRIES = 4, 10
RERUNS = 8
SEEDS = (1, 2, 3)
#: Of all requests, and of all messages that may end something, that harm is done to.
SHARE = 0.15
#: Of a dataset of four recognitions.
SHARDS = (1, 2)
SECONDS = 10.0


@dataclass(frozen=True)
class Network:
    """Both proxies, which the commands of this test go through."""

    storage: StorageProxy
    database: DatabaseProxy

    def calm(self) -> None:
        """Do no more harm, and begin to count anew."""
        self.storage.plan = self.database.plan = None
        self.storage.forget()
        self.database.forget()


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a moment before another try, not up to a second."""
    monkeypatch.setattr("backoff.full_jitter", lambda value: 0.01)


@pytest.fixture
def network(workdir: Path, settings: Settings, short_waits: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    monkeypatch.setenv("PIPELINE_THREAD_COUNT", "3")
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "2")
    with StorageProxy(settings.url) as storage, DatabaseProxy(settings.database_url.reveal()) as database:
        monkeypatch.setenv("NEXT_PUBLIC_SUPABASE_URL", storage.url)
        monkeypatch.setenv("DATABASE_URL", database.url)
        yield Network(storage, database)


@pytest.fixture
def dataset(small_dataset: MakeDataset) -> Path:
    """Four recognitions, in two shards."""
    return small_dataset(4)


def load(dataset: Path, batch_id: str = "b1", *options: str) -> int:
    return main(["load", "--source", str(dataset), "--batch-id", batch_id, *options])


def load_qwen(dataset: Path, batch_id: str = "q1") -> int:
    return main(["load-qwen", "--file", str(boxes(dataset)), "--batch-id", batch_id])


def reset(batch_id: str = "b1") -> int:
    return main(["reset", "--batch-id", batch_id, "--confirm"])


def boxes(dataset: Path) -> Path:
    return dataset / "qwen_annotations.json"


def keys(dataset: Path, batch_id: str = "b1") -> list[str]:
    return [row[2] for row in world.expected(dataset, batch_id).images]


def upload_of(key: str) -> Callable[[Request], bool]:
    return lambda request: request.is_upload and request.path.endswith(key)


def total(network: Network, matches: Callable[[Request], bool]) -> int:
    return sum(network.storage.tries(matches).values())


def check(settings: Settings, dataset: Path, ids: list[int] | None = None, qwen: Path | None = None) -> None:
    """Assert that all is as batch `b1` makes it, and that the rows it was made of are there once."""
    world.check(settings, (dataset, "b1", ids), qwen=qwen)
    found = world.counts(settings.database_url.reveal())
    recognitions = len(world.folders(dataset) if ids is None else ids)
    assert found["raw.photos"] == 2 * recognitions
    assert found["raw.receipts"] == recognitions
    assert found["raw.detections"] == found["public.initial_annotations"]


# Storage: a fault that passes


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*TRANSIENT, *OVERLOAD], ids=str)
def test_what_fails_once_is_tried_once_more(network: Network, dataset: Path, settings: Settings, fault: Fault) -> None:
    network.storage.plan = first(1, fault)
    assert load(dataset) == 0
    uploads = network.storage.tries()
    assert len(uploads) == 8
    assert set(uploads.values()) == {2}
    assert main(["verify", "--deep"]) == 0
    assert set(network.storage.tries(lambda request: "/authenticated/" in request.path).values()) == {2}
    check(settings, dataset)
    network.storage.forget()
    assert reset() == 0
    assert set(network.storage.tries(lambda request: request.method == "DELETE").values()) == {2}
    assert set(network.storage.met()) == {fault}
    world.check(settings)


@pytest.mark.parametrize("fault", HARMLESS, ids=str)
def test_a_slow_network_and_connections_that_do_not_last_cost_no_further_try(
    network: Network, dataset: Path, settings: Settings, fault: Fault
) -> None:
    network.storage.plan = first(ALWAYS, fault)
    assert load(dataset) == 0
    assert main(["verify", "--deep"]) == 0
    check(settings, dataset)
    assert reset() == 0
    for matches in (
        lambda request: request.is_upload,
        lambda request: "/authenticated/" in request.path,
        lambda request: request.method == "DELETE",
    ):
        assert set(network.storage.tries(matches).values()) == {1}
    world.check(settings)


def test_a_page_that_is_not_of_storage_is_no_success(network: Network, dataset: Path, settings: Settings) -> None:
    network.storage.plan = first(1, PORTAL)
    assert load(dataset) == 0
    assert set(network.storage.tries().values()) == {2}
    check(settings, dataset)
    network.storage.forget()
    assert reset() == 0
    world.check(settings)


def test_who_is_never_answered_asks_again(
    network: Network, dataset: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_THREAD_COUNT", "8")
    monkeypatch.setenv("PIPELINE_RETRY_MAX_ATTEMPTS", "20")
    monkeypatch.setattr("pipeline.storage.transport.READ_TIMEOUT", 0.3)
    network.storage.plan = first(1, SILENT)
    assert load(dataset) == 0
    assert min(network.storage.tries().values()) >= 2
    check(settings, dataset)


def test_a_request_that_arrives_late_does_no_harm(network: Network, dataset: Path, settings: Settings) -> None:
    network.storage.plan = first(1, REQUEST_LATE, lambda request: request.is_upload)
    assert load(dataset) == 0
    assert set(network.storage.tries().values()) == {2}
    assert wait_until(lambda: network.storage.under_way == 0, SECONDS)
    check(settings, dataset)


# Storage: a fault that stays


@pytest.mark.parametrize(
    ("fault", "tries"),
    [
        *((fault, TRIES) for fault in (REQUEST_CUT, ANSWER_LOST, RESOURCE_LOCKED, BAD_GATEWAY)),
        *((fault, PATIENT_TRIES) for fault in (DATABASE_TIMEOUT, LOCK_TIMEOUT, NO_SERVICE)),
    ],
    ids=str,
)
def test_what_fails_for_ever_is_tried_so_often_and_the_same_command_goes_on_later(
    network: Network,
    dataset: Path,
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    fault: Fault,
    tries: int,
) -> None:
    victim = keys(dataset)[5]
    network.storage.plan = first(ALWAYS, fault, upload_of(victim))
    assert load(dataset) == 3
    assert list(network.storage.tries(upload_of(victim)).values()) == [tries]
    assert max(network.storage.tries().values()) == tries
    told = capsys.readouterr().err
    assert "python -m pipeline load --batch-id b1" in told
    assert "Traceback" not in told
    assert world.domain(settings.database_url.reveal()).recognitions == []
    network.calm()
    assert load(dataset) == 0
    assert set(network.storage.tries().values()) <= {1}
    check(settings, dataset)


def test_errors_and_overload_in_turn_are_tried_no_more_often_than_overload(
    network: Network, dataset: Path, settings: Settings
) -> None:
    victim = keys(dataset)[5]

    def plan(request: Request) -> Fault | None:
        if not upload_of(victim)(request):
            return None
        return SLOW_DOWN if request.nth % TRIES == 0 else INTERNAL

    network.storage.plan = plan
    assert load(dataset) == 3
    assert TRIES <= total(network, upload_of(victim)) <= PATIENT_TRIES
    network.calm()
    assert load(dataset) == 0
    check(settings, dataset)


@pytest.mark.parametrize(("fault", "tries"), [(INTERNAL, TRIES), (SLOW_DOWN, PATIENT_TRIES)], ids=str)
def test_a_storage_that_takes_nothing_is_not_asked_for_every_shard(
    network: Network,
    small_dataset: MakeDataset,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    tries: int,
) -> None:
    monkeypatch.setenv("PIPELINE_THREAD_COUNT", "1")
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "1")
    dataset = small_dataset(8)
    network.storage.plan = first(ALWAYS, fault, lambda request: request.is_upload)
    assert load(dataset) == 3
    asked = sorted(network.storage.tries().values(), reverse=True)
    assert asked[:3] == [tries] * 3
    assert len(asked) <= 4, "the one that was begun ahead"
    assert asked[-1] <= tries
    network.calm()
    assert load(dataset) == 0
    check(settings, dataset)


@pytest.mark.parametrize(
    ("method", "path", "times"),
    [("GET", "/bucket/", 1), ("POST", "/bucket", 1), ("POST", "/object/list-v2/", 2)],
)
def test_a_load_that_storage_does_not_answer_is_unfinished(
    network: Network, dataset: Path, settings: Settings, method: str, path: str, times: int
) -> None:
    def matches(request: Request) -> bool:
        return request.method == method and f"/storage/v1{path}" in request.path and not request.is_upload

    network.storage.plan = first(ALWAYS, INTERNAL, matches)
    assert load(dataset) == 3
    assert total(network, matches) == times * TRIES
    assert total(network, lambda request: request.is_upload) == 0
    network.calm()
    assert load(dataset) == 0
    check(settings, dataset)


@pytest.mark.parametrize("path", ["/object/list-v2/", "/object/bucket"])
def test_a_reset_that_storage_does_not_answer_is_unfinished(
    network: Network, dataset: Path, settings: Settings, path: str
) -> None:
    assert load(dataset) == 0
    network.calm()
    asked: list[Request] = []

    def plan(request: Request) -> Fault | None:
        # The plan asks for the bucket and lists what would go; the deed is done after that.
        asked.append(request)
        return ANSWER_LOST if f"/storage/v1{path}" in request.what and len(asked) > 2 else None

    network.storage.plan = plan
    assert reset() == 3
    assert network.storage.met() == {ANSWER_LOST: TRIES}
    assert world.domain(settings.database_url.reveal()).recognitions == []
    network.calm()
    assert reset() == 0
    world.check(settings)
    assert load(dataset) == 0
    check(settings, dataset)


# Storage: no means no


def test_a_key_that_is_refused_in_the_middle_is_told_at_once(
    network: Network, dataset: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = keys(dataset)[5]
    denied = error(403, "Unauthorized", "AccessDenied", "new row violates row-level security policy")
    network.storage.plan = first(ALWAYS, denied, upload_of(victim))
    assert load(dataset) == 2
    assert set(network.storage.tries().values()) == {1}
    assert network.storage.met() == {denied: 1}
    assert "SUPABASE_SERVICE_ROLE_KEY" in capsys.readouterr().err
    network.calm()
    assert load(dataset) == 0
    check(settings, dataset)


def test_a_photo_that_the_bucket_finds_too_large_is_a_reject(
    network: Network, dataset: Path, settings: Settings
) -> None:
    ids = sorted(world.folders(dataset))
    victim = f"/{ids[2]}/camera2.jpg"
    large = error(413, "Payload too large", "EntityTooLarge", "The object exceeded the maximum allowed size")
    network.storage.plan = first(ALWAYS, large, upload_of(victim))
    assert load(dataset) == 0
    assert set(network.storage.tries().values()) == {1}
    rejects = world.query(settings.database_url.reveal(), "SELECT recognition_id, code FROM ingest.rejects")
    assert rejects == [(ids[2], "photo_too_large")]
    check(settings, dataset, [number for number in ids if number != ids[2]])


def test_a_key_that_storage_does_not_take_leaves_what_was_sent(
    network: Network, dataset: Path, settings: Settings
) -> None:
    victim = keys(dataset)[5]
    invalid = error(400, "InvalidKey", "InvalidKey", f"Invalid key: {victim}")
    network.storage.plan = first(ALWAYS, invalid, upload_of(victim))
    assert load(dataset) == 3
    assert set(network.storage.tries().values()) == {1}
    assert network.storage.met() == {invalid: 1}
    sent = set(world.objects(settings))
    assert set(keys(dataset)[:4]) <= sent < set(keys(dataset))
    network.calm()
    assert load(dataset) == 0
    check(settings, dataset)


# Storage: overload


def test_a_storage_that_takes_three_at_once_is_given_fewer(
    network: Network, small_dataset: MakeDataset, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_THREAD_COUNT", "8")
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "100")
    monkeypatch.setenv("PIPELINE_RETRY_MAX_ATTEMPTS", "100")
    dataset = small_dataset(36)
    lock = threading.Lock()
    crowded = threading.Event()
    taken = refused = 0

    def plan(request: Request) -> Fault | None:
        nonlocal taken, refused
        if not request.is_upload:
            return None
        with lock:
            if request.under_way > 3:
                refused += 1
                crowded.set()
                return SLOW_DOWN
            taken += 1
            number = taken
        if number <= 3:
            crowded.wait(SECONDS)
        return Fault("at work", delay=0.04)

    network.storage.plan = plan
    assert load(dataset) == 0
    assert crowded.is_set()
    # Eight threads that ask again after ten milliseconds would be refused far more often.
    assert refused <= 36
    check(settings, dataset)


# PostgreSQL: commits and COPY


class OncePerCommit:
    """A plan that does harm to the first commit of every transaction in which something of a pattern is written."""

    def __init__(self, harm: Harm, pattern: str) -> None:
        self._harm = harm
        self._pattern = re.compile(pattern)
        self.struck: list[str] = []

    def __call__(self, message: Message) -> Harm | None:
        found = self._pattern.search(message.transaction) if message.is_commit else None
        if found is None or found[1] in self.struck:
            return None
        self.struck.append(found[1])
        return self._harm


def every_other(harm: Harm, matches: Callable[[Message], bool]) -> Callable[[Message], Harm | None]:
    numbers = itertools.count()
    return lambda message: harm if matches(message) and next(numbers) % 2 == 0 else None


#: The values of a marker: step and shard.
MARKER = r"VALUES \('(?:b1|q1)', ('\w+', \d+)"
HARMS = (LOST, UNANSWERED, HALF_ANSWERED, LATE, HALF_OPEN, SHUTTING_DOWN)


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS, ids=str)
def test_commands_of_which_every_commit_goes_wrong_once_are_done_once(
    network: Network, dataset: Path, settings: Settings, harm: Harm
) -> None:
    network.database.plan = plan = OncePerCommit(harm, MARKER)
    assert load(dataset) == 0
    assert plan.struck == [
        "'discover', 0",
        *(f"'{step}', {shard}" for shard in SHARDS for step in ("upload", "copy")),
        "'transform', 0",
        "'load', 0",
    ]
    assert set(network.storage.tries().values()) == {1}
    check(settings, dataset)

    network.database.plan = plan = OncePerCommit(harm, MARKER)
    assert load_qwen(dataset) == 0
    assert plan.struck == ["'copy', 1", "'transform', 0", "'load', 0"]
    check(settings, dataset, qwen=boxes(dataset))

    network.database.plan = plan = OncePerCommit(harm, r"SET state = ('\w+')")
    assert reset() == 0
    assert plan.struck == ["'resetting'", "'reset'"]
    world.check(settings)


def test_every_transaction_may_be_done_twice(network: Network, dataset: Path, settings: Settings) -> None:
    network.database.plan = every_other(UNANSWERED, lambda message: message.is_commit)
    assert load(dataset) == 0
    assert load_qwen(dataset) == 0
    assert main(["verify", "--deep"]) == 0
    check(settings, dataset, qwen=boxes(dataset))
    assert reset() == 0
    assert len(network.database.met()) > 30
    world.check(settings)


@pytest.mark.parametrize(("kind", "harm"), [("d", LOST), ("c", LOST), ("c", UNANSWERED), ("c", SHUTTING_DOWN)], ids=str)
def test_a_connection_that_ends_within_a_copy_leaves_none_of_its_rows(
    network: Network, dataset: Path, settings: Settings, kind: str, harm: Harm
) -> None:
    network.database.plan = first(1, harm, lambda message: message.kind == kind)
    assert load(dataset) == 0
    assert load_qwen(dataset) == 0
    tables = {message.text.split()[1] for message, _ in network.database.met()}
    assert tables >= {
        "pg_temp.found",
        "pg_temp.staged",
        "pg_temp.facts",
        "raw.menus",
        "raw.receipts",
        "pg_temp.entries",
        "pg_temp.detections",
    }
    check(settings, dataset, qwen=boxes(dataset))


# PostgreSQL: connections


@pytest.mark.parametrize("carried", [0, 5_000, 30_000, 90_000])
def test_a_load_goes_on_over_another_connection(
    network: Network, dataset: Path, settings: Settings, carried: int
) -> None:
    network.database.plan = lambda message: LOST if message.connection == 1 and message.carried >= carried else None
    assert load(dataset) == 0
    assert len(network.database.met()) == 1
    check(settings, dataset)


def test_a_database_far_away_takes_longer_and_nothing_else(network: Network, dataset: Path, settings: Settings) -> None:
    network.database.delay = 0.001
    assert load(dataset) == 0
    check(settings, dataset)


def test_a_database_that_restarts_in_the_middle_is_waited_for(
    network: Network, dataset: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_RETRY_MAX_ATTEMPTS", "100")
    monkeypatch.setattr("backoff.full_jitter", lambda value: 0.1)
    monkeypatch.setattr("pipeline.batches.lock._CHECK_SECONDS", 0.05)
    stopped = threading.Event()
    again: list[float] = []

    def stop(request: Request) -> None:
        if request.is_upload and not stopped.is_set():
            stopped.set()
            network.database.cut_all()

    def plan(message: Message) -> Harm | None:
        if not message.is_connect or not stopped.is_set():
            return None
        if not again:
            again.append(time.monotonic() + 1.0)
        return STARTING_UP if time.monotonic() < again[0] else None

    network.storage.plan, network.database.plan = stop, plan
    assert load(dataset) == 0
    assert len(network.database.met()) >= 2
    assert network.database.count(lambda message: message.is_connect and message.application == "pipeline lock b1") >= 2
    check(settings, dataset)


@pytest.mark.parametrize("harm", [LOST, HALF_OPEN, SHUTTING_DOWN], ids=str)
def test_a_run_that_loses_the_connection_with_its_lock_takes_the_lock_again(
    network: Network, dataset: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, harm: Harm
) -> None:
    monkeypatch.setattr("pipeline.batches.lock._CHECK_SECONDS", 0.05)
    lock = "pipeline lock b1"
    network.database.plan = first(1, harm, lambda message: message.application == lock and " AS now" in message.text)
    assert load(dataset) == 0
    assert len(network.database.met()) == 1
    assert network.database.count(lambda message: message.application == lock and message.is_connect) == 2
    check(settings, dataset)


@pytest.mark.parametrize("harm", [LOST, STARTING_UP], ids=str)
def test_a_database_that_is_not_there_is_asked_so_often(
    network: Network,
    dataset: Path,
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    harm: Harm,
) -> None:
    network.database.plan = first(ALWAYS, harm, lambda message: message.is_connect)
    assert load(dataset) == 3
    assert network.database.count(lambda message: message.is_connect) == TRIES
    told = capsys.readouterr().err
    assert "Error: PostgreSQL cannot be reached: " in told or "Error: PostgreSQL takes no connection now: " in told
    assert "Traceback" not in told
    network.calm()
    assert load(dataset) == 0
    check(settings, dataset)


def test_a_database_that_goes_away_in_the_middle_leaves_an_unfinished_batch(
    network: Network,
    dataset: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pipeline.graph.run.BatchLock", partial(BatchLock, patience=0.5))
    gone = threading.Event()

    def stop(request: Request) -> None:
        if request.is_upload and not gone.is_set():
            gone.set()
            network.database.cut_all()

    network.storage.plan = stop
    network.database.plan = lambda message: LOST if message.is_connect and gone.is_set() else None
    assert load(dataset) == 3
    # For the step that broke, and the little that is asked after it.
    assert network.database.count(lambda message: message.is_connect) <= 5 * TRIES
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert world.domain(settings.database_url.reveal()).recognitions == []
    network.calm()
    assert load(dataset) == 0
    check(settings, dataset)


# All of it at once


def until_done(command: Callable[[], int]) -> int:
    """Run a command again for as long as it says that it is unfinished, and return how often it was run."""
    for runs in range(1, RERUNS + 1):
        code = command()
        if code == 0:
            return runs
        assert code == 3
    pytest.fail(f"It is unfinished after {RERUNS} runs.")


def all_at_once(network: Network, seed: int, share: float = SHARE) -> None:
    network.storage.plan = mixed(seed, share, [*TRANSIENT, *OVERLOAD, *HARMLESS])
    network.database.plan = mixed(
        seed,
        share,
        [*HARMS, STARTING_UP],
        lambda message: message.is_commit or message.is_connect or message.kind == "c",
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_all_ends_right(network: Network, dataset: Path, settings: Settings, seed: int) -> None:
    qwen = boxes(dataset)
    all_at_once(network, seed)
    runs = until_done(lambda: load(dataset))
    check(settings, dataset)
    until_done(lambda: load_qwen(dataset))
    check(settings, dataset, qwen=qwen)
    runs += until_done(lambda: load(dataset, "b2", "--force"))
    assert max(network.storage.tries().values()) <= PATIENT_TRIES * runs
    wanted = [world.expected(dataset, batch_id, qwen=qwen) for batch_id in ("b1", "b2")]
    assert world.domain(settings.database_url.reveal()).images == wanted[1].images
    assert world.objects(settings) == {row[2]: row[6] for one in wanted for row in one.images}
    assert world.inconsistencies(settings) == []
    until_done(lambda: main(["verify", "--deep"]))
    until_done(lambda: reset("b2"))
    check(settings, dataset, qwen=qwen)
    until_done(reset)
    world.check(settings)
    assert len(network.storage.met()) >= 3
    assert len(network.database.met()) >= 3


def test_two_workers_in_processes_of_their_own_end_right_as_well(
    network: Network, dataset: Path, settings: Settings, run_pipeline: RunPipeline
) -> None:
    def command() -> int:
        done = run_pipeline("load", "--source", dataset, "--batch-id", "b1", "--workers", "2")
        print(done.stderr)
        return done.returncode

    all_at_once(network, SEEDS[0], SHARE / 2)  # the waits are real ones
    until_done(command)
    check(settings, dataset)
