"""Held batches: what holds one, what the others do meanwhile, and what releases or removes it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipeline.batches.held import find_claimed
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.errors import ClaimedError, DatabaseUnavailable
from pipeline.sample.writer import ANNOTATIONS
from pipeline.steps import transform
from tests import annotating, test_luigi, world
from tests.annotating import Run, ids_of, key_of, value_of, write
from tests.proxies import Fault, Request, StorageProxy, page
from tests.services import MakeDataset, RunLuigi, Start
from tests.test_luigi import TASK, finish, told

run = annotating.run
dsn = annotating.dsn
luigid = test_luigi.luigid

REASON = "No corner lies beyond 1: load with --coordinates 1."
PUBLISH = (sys.executable, "-m", "pipeline", "publish")


def truncate(dataset: Path, numbers: Iterable[int]) -> None:
    """Cut a photo of these recognitions, which the upload finds."""
    for number in numbers:
        photo = next(world.folders(dataset)[number].rglob("*_Main.jpg"))
        photo.write_bytes(photo.read_bytes()[:-2000])


def strip(dataset: Path, numbers: Iterable[int]) -> None:
    """Remove a photo of these recognitions, which discovery finds."""
    for number in numbers:
        next(world.folders(dataset)[number].rglob("*_Main.jpg")).unlink()


def states(dsn: str) -> dict[str, str]:
    return dict(world.query(dsn, "SELECT id, state FROM ingest.batches ORDER BY id"))


def doubt(database: Database, batch_id: str) -> None:
    statement = f"UPDATE ingest.batches SET held_reason = '{REASON}' WHERE id = '{batch_id}'"
    database.run(lambda connection: connection.run_script(statement))


def fail_uploads(dsn: str, *, on: bool) -> None:
    constraint = "ADD CONSTRAINT never CHECK (step <> 'upload')" if on else "DROP CONSTRAINT never"
    world.query(dsn, f"ALTER TABLE ingest.batch_state {constraint}")


# What holds a batch


@pytest.mark.parametrize("damage", [truncate, strip], ids=["upload", "discovery"])
def test_too_many_rejects_hold_a_batch_and_publish_releases_it(
    damage: object, run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(16)
    ids = ids_of(dataset)
    damage(dataset, ids[:10])  # type: ignore[operator]
    held = run("load", "--source", dataset, "--batch-id", "b1")
    assert held.code == 6
    assert held.out == ""
    assert "Batch b1 is held: 6 recognitions, 12 photos" in held.err
    reason = "10 of 16 recognitions are rejected, more than --max-rejects 20% allows."
    assert f"Error: Batch b1 is held, readers do not see it. {reason}" in held.err
    assert held.err.count(reason) == 1
    assert "`python -m pipeline publish --batch-id b1`" in held.err
    assert "`python -m pipeline reset --batch-id b1`" in held.err
    assert world.counts(dsn)["public.recognitions"] == 0
    assert world.counts(dsn)["ingest.claims"] == 6
    assert world.inconsistencies(settings) == []
    assert run("verify", "--quiet", "--repair").code == 0  # and removes none of its objects
    again = run("load", "--source", dataset, "--batch-id", "b1")
    assert (again.code, reason in again.err) == (6, True)
    done = run("publish", "--batch-id", "b1")
    assert done.code == 0
    assert "Batch b1 is done: 6 recognitions" in done.out
    assert done.err.endswith("Batch b1 is published.\n")
    assert "Resuming" not in done.err
    assert re.search(
        rf"^Held, until it was published at .* UTC: {re.escape(reason)} Most often ", done.out, re.MULTILINE
    )
    world.check(settings, (dataset, "b1", ids[10:]))
    once_more = run("publish", "--batch-id", "b1")
    assert once_more.code == 0
    assert "Batch b1 is done already" in once_more.out
    assert re.search(r"^Batch b1 was published already, at .* UTC\.$", once_more.err, re.MULTILINE)


@pytest.mark.parametrize("most", [12, 1000], ids=["most", "all"])
def test_the_reason_of_a_hold_names_a_gateway_that_refuses_photos(
    run: Run, own_dataset: MakeDataset, settings: Settings, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    dataset = own_dataset(16)
    strip(dataset, ids_of(dataset)[:2])
    refused = iter(range(most))

    def plan(request: Request) -> Fault | None:
        return page(413, "Request Entity Too Large") if request.is_upload and next(refused, None) is not None else None

    with StorageProxy(settings.url, plan) as proxy, monkeypatch.context() as patch:
        patch.setenv("NEXT_PUBLIC_SUPABASE_URL", proxy.url)
        held = run("load", "--source", dataset, "--batch-id", "b1")
    assert held.code == 6
    for said in (held.err, run("load", "--source", dataset, "--batch-id", "b1").err, run("status").out):
        assert re.search(r"rejected.* Most often photo_too_large: .*`client_max_body_size` of nginx", said)


@pytest.mark.parametrize(
    ("rejected", "limit", "code"),
    [(9, "0", 0), (10, "0", 6), (10, "10", 0), (11, "10", 6), (10, "50%", 0), (10, "49%", 6), (10, "100%", 0)],
)
def test_ten_rejects_and_more_than_the_limit_hold_a_batch(
    rejected: int, limit: str, code: int, run: Run, own_dataset: MakeDataset
) -> None:
    dataset = own_dataset(20)
    strip(dataset, ids_of(dataset)[:rejected])
    assert run("load", "--source", dataset, "--max-rejects", limit).code == code


@pytest.mark.parametrize("limit", ["-1", "ten", "101%", "%", "1.5%", "", "9" * 20])
def test_a_limit_that_is_none_is_wrong_usage(limit: str, run: Run, workdir: Path) -> None:
    done = run("load", f"--max-rejects={limit}")
    assert (done.code, "such as 20%.\n" in done.err) == (2, True)


def test_rejects_that_an_earlier_batch_recorded_do_not_hold(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(20)
    ids = ids_of(dataset)
    strip(dataset, ids[:10])
    kept = shutil.move(world.folders(dataset)[ids[-1]], dataset.parent / "later")
    assert run("load", "--source", dataset, "--batch-id", "b1", "--max-rejects", "100%").code == 0
    shutil.move(kept, dataset / "export_1" / f"recognition_{ids[-1]}")
    night = run("load", "--source", dataset, "--batch-id", "b2")
    assert night.code == 0
    assert "Known rejects: 10, recorded by earlier loads and unchanged." in night.out
    assert "photo_count" not in night.out
    idle = run("load", "--source", dataset, "--batch-id", "b3")
    assert (idle.code, "10 already loaded" in idle.out) == (0, True)
    next(world.folders(dataset)[ids[0]].rglob("*_Qualifying.jpg")).unlink()  # the reject is another one now
    assert run("load", "--source", dataset, "--batch-id", "b4").code == 6
    assert states(dsn) == {"b1": "done", "b2": "done", "b4": "held"}


def test_nothing_usable_holds_a_batch_once(run: Run, own_dataset: MakeDataset, dsn: str) -> None:
    dataset = own_dataset(2)
    strip(dataset, ids_of(dataset))
    held = run("load", "--source", dataset, "--batch-id", "b1")
    assert held.code == 6
    assert f"No recognition of {dataset.resolve()} can be used (2 rejected)." in held.err
    again = run("load", "--source", dataset, "--batch-id", "b2")
    assert (again.code, "Known rejects: 2," in again.out) == (0, True)
    assert states(dsn) == {"b1": "held"}
    published = run("publish", "--batch-id", "b1")
    assert (published.code, "Batch b1 is done: 0 recognitions" in published.out) == (0, True)


def test_nothing_usable_among_what_is_new_holds_a_batch_once(run: Run, own_dataset: MakeDataset, dsn: str) -> None:
    dataset = own_dataset(4)
    ids = ids_of(dataset)
    assert run("load", "--source", dataset, "--batch-id", "b1", "--limit", "3").code == 0
    strip(dataset, ids[3:])
    held = run("load", "--source", dataset, "--batch-id", "b2")
    assert held.code == 6
    assert f"No new recognition of {dataset.resolve()} can be used (1 rejected)." in held.err
    assert run("load", "--source", dataset, "--batch-id", "b3").code == 0
    assert states(dsn) == {"b1": "done", "b2": "held"}


def test_photos_of_annotations_are_counted_where_no_box_is_left(
    run: Run, own_dataset: MakeDataset, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(12)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    malformed = {"bbox_2d": [5, 5, 5, 5], "label": "plate"}
    empty = {"dishes": {"qwen_detections": [malformed, malformed]}}
    mixed = value_of("dish_0", "plate")
    mixed["plates"]["qwen_detections"].append(malformed)
    content = {}
    for position, number in enumerate(ids_of(dataset)):
        content[key_of(number)] = value_of("dish_0")
        content[key_of(number, "Qualifying")] = empty if position < 9 else mixed
    content["no/photo/of/ours.jpg"] = value_of("plate")
    file = write(tmp_path / "boxes.json", content)
    held = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert held.code == 6
    assert "10 of 25 photos are rejected, more than --max-rejects 20% allows." in held.err
    assert world.domain(dsn).annotations == []
    assert run("publish", "--batch-id", "q1").code == 0
    assert len(world.domain(dsn).annotations) == 12 + 2 * 3


def test_annotations_of_recognitions_that_are_not_loaded_are_held(run: Run, small_dataset: MakeDataset) -> None:
    held = run("load-qwen", "--file", small_dataset(3) / ANNOTATIONS, "--batch-id", "q1")
    assert held.code == 6
    assert "No photo of " in held.err
    assert "publish" not in held.err


@pytest.mark.parametrize("state", ["held", "unfinished"])
def test_annotations_of_recognitions_in_another_batch_name_it(
    state: str, run: Run, own_dataset: MakeDataset, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(16)
    ids = ids_of(dataset)
    if state == "held":
        strip(dataset, ids[:10])
        assert run("load", "--source", dataset, "--batch-id", "b1").code == 6
    else:
        fail_uploads(dsn, on=True)
        assert run("load", "--source", dataset, "--batch-id", "b1").code == 3
    file = write(tmp_path / "boxes.json", {key_of(ids[-1]): value_of("plate")})
    told = run("load-qwen", "--file", file, "--batch-id", "q1")
    word = "publish" if state == "held" else "finish"
    message = f"the recognition {ids[-1]} is in batch b1, which is {state}: {word} b1, then load the annotations again"
    assert (told.code, message in told.err) == (6, True)


@pytest.mark.parametrize("kind", ["load", "load-qwen"])
def test_a_reason_that_an_earlier_step_recorded_holds_a_batch(
    kind: str, run: Run, small_dataset: MakeDataset, settings: Settings, database: Database, dsn: str
) -> None:
    dataset = small_dataset(3)
    command: tuple[str | Path, ...] = ("load", "--source", dataset, "--batch-id", "b1")
    if kind == "load-qwen":
        assert run(*command).code == 0
        command = ("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1")
    batch_id = str(command[-1])
    world.query(dsn, "ALTER TABLE ingest.batch_state ADD CONSTRAINT never CHECK (step <> 'transform') NOT VALID")
    assert run(*command).code == 3
    world.query(dsn, "ALTER TABLE ingest.batch_state DROP CONSTRAINT never")
    doubt(database, batch_id)
    held = run(*command, "--max-rejects", "100%")
    assert held.code == 6
    assert REASON in held.err
    assert run("publish", "--batch-id", batch_id).code == 0
    qwen = dataset / ANNOTATIONS if kind == "load-qwen" else None
    world.check(settings, (dataset, "b1", None), qwen=qwen)


# Meanwhile


def test_the_next_night_loads_what_a_held_batch_does_not_claim(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(16)
    ids = ids_of(dataset)
    strip(dataset, ids[:10])
    later = shutil.move(world.folders(dataset)[ids[-1]], dataset.parent / "later")
    foreseen = "Rejects seen so far: photo_count 10. The batch would be held for them, until somebody publishes"
    assert foreseen in run("load", "--source", dataset, "--dry-run").out
    assert "would be held" not in run("load", "--source", dataset, "--dry-run", "--max-rejects", "70%").out
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 6
    claimed = run("load", "--source", dataset)
    assert claimed.code == 3
    assert "Error: All that is new belongs to unfinished b1: nothing was loaded." in claimed.err
    assert states(dsn) == {"b1": "held"}
    dry = run("load", "--source", dataset, "--dry-run")
    assert (dry.code, "5 held by unfinished b1," in dry.out) == (0, True)
    shutil.move(later, dataset / "export_1" / f"recognition_{ids[-1]}")
    night = run("load", "--source", dataset, "--batch-id", "b2")
    assert night.code == 0
    assert "Skipped: 5 held by unfinished b1." in night.out
    assert run("publish", "--batch-id", "b1").code == 0
    world.check(settings, (dataset, "b2", ids[-1:]), (dataset, "b1", ids[10:-1]))


def test_status_tells_why_a_batch_is_held_and_what_to_do(run: Run, own_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset, metrics = own_dataset(3), tmp_path / "load.prom"
    strip(dataset, ids_of(dataset))
    told = run("load", "--source", dataset, "--batch-id", "b1", "--json", "--metrics-file", metrics)
    assert told.code == 6
    summary = json.loads(told.out)
    assert (summary["state"], summary["released_at"], summary["rejected"]) == ("held", None, 3)
    assert 'state="held"} 1.0' in metrics.read_text(encoding="utf-8")
    for arguments in ((), ("--check",), ("--batch-id", "b1")):
        shown = run("status", *arguments).out
        assert summary["held_reason"] in shown
        assert "publish" not in shown  # there is nothing to publish
        assert "`python -m pipeline reset --batch-id b1`" in shown
    [unfinished] = json.loads(run("status", "--json").out)["unfinished"]
    assert (unfinished["state"], unfinished["held_reason"]) == ("held", summary["held_reason"])
    [heading, told_of_rest] = run("reset", "--batch-id", "b1", "--dry-run").out.splitlines()
    assert heading.startswith("Reset of batch b1, load, held, started ")
    assert told_of_rest == "  nothing is stored for it"


def test_a_held_batch_is_reset_as_if_never_loaded(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(16)
    truncate(dataset, ids_of(dataset)[:10])
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 6
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    world.nothing(settings)
    assert run("load", "--source", dataset, "--batch-id", "b1", "--max-rejects", "10").code == 0
    assert world.query(dsn, "SELECT held_reason, released_at FROM ingest.batches") == [(None, None)]


# Publishing


def test_publish_refuses_what_is_not_held(run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    dataset = small_dataset(2)
    fail_uploads(dsn, on=True)
    assert run("load", "--source", dataset, "--batch-id", "b1", "--limit", "2").code == 3
    refused = run("publish", "--batch-id", "b1")
    assert refused.code == 4
    assert "To go on: python -m pipeline load --batch-id b1 --limit 2" in refused.err
    fail_uploads(dsn, on=False)
    assert run("load", "--source", dataset, "--batch-id", "b1", "--limit", "2").code == 0
    done = run("publish", "--batch-id", "b1")
    assert (done.code, "Batch b1 is done already" in done.out) == (0, True)
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    refused = run("publish", "--batch-id", "b1")
    assert (refused.code, "Batch b1 is reset, so it cannot be published." in refused.err) == (4, True)
    assert run("publish", "--batch-id", "unknown").code == 2


def test_publish_needs_no_dataset_and_keeps_the_options_of_the_load(
    run: Run, own_dataset: MakeDataset, settings: Settings, tmp_path: Path
) -> None:
    dataset = own_dataset(16)
    ids = ids_of(dataset)
    strip(dataset, ids[:10])
    assert run("load", "--source", dataset, "--batch-id", "b1", "--limit", "4", "--force").code == 6
    moved = dataset.rename(tmp_path / "moved")
    assert run("publish", "--batch-id", "b1").code == 0
    world.check(settings, (moved, "b1", ids[10:14]))


def test_a_publish_that_failed_is_repeated_or_resumed_by_a_load(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(16)
    ids = ids_of(dataset)
    strip(dataset, ids[:10])
    for batch_id, again in (("b1", ("publish",)), ("b2", ("load", "--source", dataset))):
        assert run("load", "--source", dataset, "--batch-id", batch_id).code == 6
        world.query(dsn, "ALTER TABLE ingest.batch_state ADD CONSTRAINT never CHECK (step <> 'transform') NOT VALID")
        failed = run("publish", "--batch-id", batch_id)
        assert failed.code == 3
        assert f"To go on: python -m pipeline load --batch-id {batch_id}" in failed.err
        world.query(dsn, "ALTER TABLE ingest.batch_state DROP CONSTRAINT never")
        assert run(*again, "--batch-id", batch_id).code == 0
        world.check(settings, (dataset, batch_id, ids[10:]))
        assert run("reset", "--batch-id", batch_id, "--confirm").code == 0


def test_two_publishes_at_once_commit_once(
    run: Run, start: Start, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(16)
    ids = ids_of(dataset)
    strip(dataset, ids[:10])
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 6
    both = [start(*PUBLISH, "--batch-id", "b1") for _ in range(2)]
    codes = sorted(finish(process)[0] for process in both)
    assert codes in ([0, 0], [0, 4])  # the second one waited for the lock, or gave up
    world.check(settings, (dataset, "b1", ids[10:]))


# Under Luigi


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["local", "luigid"])
def test_the_bare_command_never_ends_with_0_for_a_held_batch(
    shared: bool,
    run_luigi: RunLuigi,
    own_dataset: MakeDataset,
    settings: Settings,
    workdir: Path,
    request: pytest.FixtureRequest,
) -> None:
    dataset = own_dataset(16)
    ids = ids_of(dataset)
    strip(dataset, ids[:10])
    if shared:
        address = f"[core]\nscheduler_url = {request.getfixturevalue('luigid')}\n"
        (workdir / "luigi.cfg").write_text(address, encoding="utf-8")
    command = (*TASK, "--source", dataset, "--batch-id", "b1")
    code, out, err = told(run_luigi(*command, "--max-rejects", "15%"))
    assert code == 30
    assert "Batch b1 is held: 6 recognitions" in out
    assert "Held: 10 of 16 recognitions are rejected, more than --max-rejects 15% allows." in out
    assert ("are rejected, more than" in err, err.count("publish it as it is")) == (False, 1)
    assert "`python -m pipeline publish --batch-id b1`" in err
    assert "`python -m pipeline reset --batch-id b1`" in err
    assert "Traceback" not in err
    code, _, err = told(run_luigi(*command))
    assert (code, "Batch b1 is held" in err) == (40, True)
    code, _, err = told(run_luigi(*TASK, "--source", dataset, "--batch-id", "b2", "--max-rejects", "many"))
    assert (code, "--max-rejects is 'many'" in err) == (40, True)
    code, out, _ = told(run_luigi("pipeline", "publish", "--batch-id", "b1"))
    assert (code, "Batch b1 is done: 6 recognitions" in out) == (0, True)
    world.check(settings, (dataset, "b1", ids[10:]))


def test_a_night_whose_new_trays_are_all_claimed_makes_no_batch(run: Run, own_dataset: MakeDataset, dsn: str) -> None:
    dataset = own_dataset(30)
    truncate(dataset, ids_of(dataset)[:12])
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 6
    for _ in range(2):
        night = run("load", "--source", dataset)
        assert night.code == 3
        assert "All that is new belongs to unfinished b1" in night.err
        assert states(dsn) == {"b1": "held"}
    assert world.query(dsn, "SELECT DISTINCT batch_id FROM ingest.claims") == [("b1",)]
    assert run("publish", "--batch-id", "b1").code == 0
    assert world.counts(dsn)["public.recognitions"] == 18


def test_what_others_have_claimed_is_told_where_the_answer_to_the_commit_is_lost(
    run: Run, own_dataset: MakeDataset, tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = own_dataset(3)
    first, _, third = ids_of(dataset)
    truncate(dataset, [first])
    late = world.folders(dataset)[third]
    shutil.move(late, tmp_path / "late")
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    shutil.move(tmp_path / "late", late)
    assert run("discover", "--source", dataset, "--batch-id", "b2").code == 0
    # It is read again, and rejected as before.
    os.utime(next(world.folders(dataset)[first].rglob("*_Main.jpg")))
    commit, seen = Connection.commit, list[str]()

    def finding(connection: Connection, weight: object) -> ClaimedError | None:
        found = find_claimed(connection, weight)
        seen.extend(["claimed"] if found else [])
        return found

    def committing(connection: Connection) -> None:
        commit(connection)
        if seen[-1:] == ["claimed"]:
            seen.append("lost")
            raise DatabaseUnavailable("The connection was lost.", "")

    monkeypatch.setattr(transform, "find_claimed", finding)
    monkeypatch.setattr(Connection, "commit", committing)
    monkeypatch.setenv("PIPELINE_RETRY_BACKOFF_FACTOR", "1.01")
    night = run("load", "--source", dataset, "--batch-id", "b3")
    assert (night.code, seen) == (3, ["claimed", "lost"]), night.err
    assert "All that is new belongs to unfinished b2" in night.err
    assert states(dsn) == {"b1": "done", "b2": "loading"}
