"""Reset: a batch is removed as if it had never been loaded."""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from pipeline import storage
from pipeline.config import Settings
from pipeline.sample.writer import ANNOTATIONS
from pipeline.storage import Storage
from tests import reset_support, test_luigi, world
from tests.reset_support import NOTES, Command, LoadBatch, batch_states, everything, state
from tests.services import (
    MakeDataset,
    RunLuigi,
    RunPipeline,
    after_target,
    environment_file,
    subprocess_environment,
)
from tests.test_luigi import told

command = reset_support.command
dsn = reset_support.dsn
load = reset_support.load

BARE = ("luigi", "--module", "pipeline", "ResetBatch", "--local-scheduler")
luigid = test_luigi.luigid


# As if never loaded


@pytest.mark.parametrize("order", [("q2", "b2"), pytest.param(("b2", "q2"), marks=pytest.mark.slow)])
def test_reset_is_as_if_the_batch_had_never_been_loaded(
    order: Sequence[str], load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    first, second = small_dataset(6), small_dataset(4, broken=True, seed=9)
    world.nothing(settings)
    load(first, "b1")
    load(first, "q1", qwen=True)
    before = state(settings)
    load(second, "b2")
    load(second, "q2", qwen=True)
    assert world.query(dsn, "SELECT DISTINCT batch_id FROM ingest.rejects ORDER BY 1") == [("b2",), ("q2",)]
    loaded = state(settings)
    for batch_id in order:
        done = command("reset", "--batch-id", batch_id, "--confirm")
        assert (done.code, done.err) == (0, "")
        assert done.out.endswith(f"\nBatch {batch_id} is reset.\n")
        assert world.inconsistencies(settings) == []
    assert state(settings) == before
    world.check(settings, (first, "b1", None), qwen=first / ANNOTATIONS)

    load(second, "b2")
    load(second, "q2", qwen=True)
    again = state(settings)
    for name in ("domain", "objects", "batches", "menus", "raw.receipts", "raw.menus", "raw.detections"):
        assert again[name] == loaded[name], name
    for batch_id in ("b1", "b2", "q1", "q2"):
        assert command("reset", "--batch-id", batch_id, "--confirm").code == 0
    world.nothing(settings)
    assert batch_states(dsn) == dict.fromkeys(("b1", "b2", "q1", "q2"), "reset")


def test_annotations_come_back_when_their_photos_are_loaded_again(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(6)
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert world.domain(dsn) == world.Domain([], [], [], [], [], [])
    assert world.inconsistencies(settings) == []
    load(dataset, "b3")
    world.check(settings, (dataset, "b3", None), qwen=dataset / ANNOTATIONS)


# Which batch


@pytest.mark.parametrize("batch_id", ["never", "../b1", "b1/recognitions", "", "é"])
def test_an_id_that_is_none_is_wrong_usage(
    batch_id: str, load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings
) -> None:
    load(small_dataset(1), "b1")
    before = everything(settings)
    done = command("reset", "--batch-id", batch_id, "--confirm")
    assert (done.code, done.out) == (2, "")
    assert repr(batch_id) in done.err or f"There is no batch {batch_id}." in done.err
    assert everything(settings) == before


def test_the_id_has_to_be_given(command: Command) -> None:
    done = command("reset", "--confirm")
    assert done.code == 2
    assert "--batch-id" in done.err


def test_a_second_reset_is_nothing_to_do(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings
) -> None:
    load(small_dataset(1), "b1")
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    before = everything(settings)
    for options in (["--confirm"], [], ["--dry-run"]):
        again = command("reset", "--batch-id", "b1", *options)
        assert (again.code, again.err) == (0, "")
        assert again.out == "Batch b1 was reset before; nothing of it is left.\n"
    assert everything(settings) == before


def test_pending_migrations_are_told_first(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    load(small_dataset(1), "b1")
    world.forget_migrations(dsn, "20260102000200")
    before = everything(settings)
    done = command("reset", "--batch-id", "b1", "--confirm")
    assert (done.code, done.out) == (2, "")
    assert "20260102000200_pipeline_versions" in done.err
    assert everything(settings) == before


def test_a_batch_goes_out_of_the_bucket_that_it_was_loaded_into(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    settings: Settings,
    workdir: Path,
) -> None:
    load(small_dataset(3), "b1")
    other = replace(settings, bucket=f"{settings.bucket}-other")
    (workdir / ".env.local").write_text(environment_file(other), encoding="utf-8")
    with closing(Storage(other)) as door:
        door.ensure_bucket()  # no load makes a second one
        load(small_dataset(4, seed=9), "b2")
        door.upload("b1/recognitions/1/camera1.jpg", b"of somebody else")
    stay = world.objects(other)
    done = command("reset", "--batch-id", "b1", "--confirm")
    assert done.code == 0
    assert f"\n  bucket {settings.bucket}: 6 objects are deleted, " in done.out
    assert world.objects(settings) == {}
    assert world.objects(other) == stay


# Confirming it


#: Make stdin the terminal of this session, as a shell does, so that a Ctrl-C that is typed there is a signal.
AT_A_TERMINAL = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
"""


def typed(workdir: Path, letters: bytes) -> tuple[int, str]:
    """Run a reset of b1 at a terminal, type letters when it asks; return the exit code and what was to be read."""
    ours, theirs = os.openpty()
    shown = b""
    with subprocess.Popen(
        [sys.executable, "-c", AT_A_TERMINAL, "reset", "--batch-id", "b1"],
        cwd=workdir,
        env=subprocess_environment({"TERM": "dumb"}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        try:
            asked = False
            while select.select([ours], [], [], 60)[0]:
                try:
                    chunk = os.read(ours, 4096)
                except OSError:  # nobody has the terminal open any more
                    break
                if not chunk:
                    break
                shown += chunk
                if not asked and b"to delete all this from " in shown and shown.endswith(b": "):
                    asked = True
                    os.write(ours, letters)
        finally:
            os.close(ours)  # hangs up: whoever still reads there ends
        return process.wait(60), shown.decode().replace("\r\n", "\n")


@pytest.mark.slow
def test_at_a_terminal_the_id_has_to_be_typed(
    load: LoadBatch, small_dataset: MakeDataset, settings: Settings, workdir: Path
) -> None:
    load(small_dataset(3), "b1")
    before = everything(settings)
    for letters in (b"b2\n", b"\x04"):
        code, shown = typed(workdir, letters)
        assert code == 4, shown
        assert "  public.recognitions: 3 rows are deleted\n" in shown
        assert "Type the batch's id, b1, to delete all this from local, http://" in shown
        assert "Error: Batch b1 was not reset" in shown
        assert everything(settings) == before
    code, shown = typed(workdir, b"\x03")
    assert code == 130, shown
    assert "Interrupted." in shown
    assert "Traceback" not in shown
    assert everything(settings) == before
    code, shown = typed(workdir, b" b1 \n")
    assert (code, "Batch b1 is reset." in shown) == (0, True), shown
    world.nothing(settings)


def test_without_a_terminal_it_is_refused_unless_it_is_confirmed(
    load: LoadBatch, command: Command, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    load(small_dataset(3), "b1")
    before = everything(settings)
    refused = command("reset", "--batch-id", "b1")
    assert refused.code == 4
    assert "  public.recognitions: 3 rows are deleted\n" in refused.out
    assert "no terminal" in refused.err
    assert "--confirm" in refused.err
    piped = run_pipeline("reset", "--batch-id", "b1")
    assert (piped.returncode, piped.stdout, after_target(piped.stderr)) == (4, refused.out, refused.err)
    assert everything(settings) == before


# Objects


def test_objects_go_in_calls_of_at_most_a_page_several_at_once(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert storage.PAGE == 1000
    dataset = small_dataset(12)
    load(dataset, "b1", "--limit", "11")
    load(dataset, "b2")
    calls: list[list[str]] = []
    together = threading.Barrier(4)
    remove = Storage.remove

    def noted(self: Storage, keys: Sequence[str]) -> list[str]:
        calls.append(list(keys))
        together.wait(30)  # breaks unless four calls are under way at the same time
        return remove(self, keys)

    monkeypatch.setattr("pipeline.steps.reset.PAGE", 6)
    monkeypatch.setattr(Storage, "remove", noted)
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert sorted(len(keys) for keys in calls) == [4, 6, 6, 6]
    assert {key for keys in calls for key in keys} == {
        row[2] for row in world.expected(dataset, "b1", sorted(world.folders(dataset))[:11]).images
    }
    world.check(settings, (dataset, "b2", [max(world.folders(dataset))]))


def test_objects_that_arrive_while_others_go_are_removed_as_well(
    load: LoadBatch,
    command: Command,
    small_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(3), "b1")
    remove = Storage.remove
    late = itertools.repeat("b1/recognitions/1/camera1.jpg")

    def overtaken(self: Storage, keys: Sequence[str]) -> list[str]:
        gone = remove(self, keys)
        for key in itertools.islice(late, 1):
            self.upload(key, b"of a run that was overtaken")
        return gone

    monkeypatch.setattr(Storage, "remove", overtaken)
    endless = command("reset", "--batch-id", "b1", "--confirm")
    assert endless.code == 3
    assert "Storage still holds objects of batch b1" in endless.err
    assert batch_states(dsn) == {"b1": "resetting"}
    late = itertools.repeat("b1/recognitions/999999999/camera2.jpg", 2)
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert list(late) == []
    world.nothing(settings)


def test_what_is_not_below_the_prefix_of_the_batch_stays(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings
) -> None:
    load(small_dataset(3), "b1")
    load(small_dataset(3, seed=9), "b1.1")
    load(small_dataset(3, seed=8), "b10")
    with closing(Storage(settings)) as door:
        door.upload("b1/thumbnails/1.jpg", b"of somebody else")
    before = world.objects(settings)
    assert command("reset", "--batch-id", "b1", "--confirm").code == 0
    assert world.objects(settings) == {key: one for key, one in before.items() if not key.startswith("b1/recognitions")}


# Under Luigi


def test_the_bare_command_resets_what_is_confirmed(
    load: LoadBatch, run_luigi: RunLuigi, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    load(small_dataset(3, broken=True), "b1")
    before = everything(settings)
    code, out, err = told(run_luigi(*BARE, "--batch-id", "b1"))
    assert (code, out) == (40, "")
    assert "Error: Batch b1 is not reset without --confirm." in err
    assert "Hint: " in err
    assert "Traceback" not in err
    assert everything(settings) == before
    world.query(dsn, NOTES.create)
    code, out, err = told(run_luigi(*BARE, "--batch-id", "b1", "--confirm"))
    assert code == 30
    assert re.search(NOTES.told(3), err)
    assert "Traceback" not in err
    world.query(dsn, f"DROP TABLE {NOTES.table}")
    assert everything(settings) == before
    done = told(run_luigi(*BARE, "--batch-id", "b1", "--confirm"))
    assert (done[0], after_target(done[2])) == (0, "")
    plan, summary = done[1].split("Batch b1 is reset, it had 3 recognitions, 6 photos, ")
    assert plan.startswith("Reset of batch b1, load, done, started ")
    assert "\n  public.images: 6 rows are deleted\n" in plan
    assert f"\n  bucket {settings.bucket}: 6 objects are deleted, " in plan
    assert "Rejected" not in summary
    world.nothing(settings)
    again = told(run_luigi(*BARE, "--batch-id", "b1", "--confirm"))
    assert again[:2] == (0, f"Batch b1 is reset, it had 3 recognitions, 6 photos, {summary}")


def test_under_luigid_a_batch_comes_goes_and_comes_again_at_once(
    luigid: str,
    run_pipeline: RunPipeline,
    workdir: Path,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    (workdir / "luigi.cfg").write_text(f"[core]\nscheduler_url = {luigid}\n", encoding="utf-8")
    dataset = small_dataset(3)
    for command in ("load", "reset", "load", "reset"):
        options = ("--source", dataset) if command == "load" else ("--confirm",)
        done = run_pipeline(command, "--batch-id", "b1", *options)
        assert (done.returncode, after_target(done.stderr)) == (0, "")
        if command == "load":
            world.check(settings, (dataset, "b1", None))
        else:
            world.nothing(settings)
    with requests.Session() as session:
        session.trust_env = False
        told = session.get(f"{luigid}/api/task_list", params={"data": '{"status": "DONE"}'}, timeout=10).text
    for task in ("LoadBatch_b1", "ResetBatch_b1", "UploadShard_b1"):
        assert task in told  # it was luigid that handed them out


# History


def test_history_stays(
    load: LoadBatch, command: Command, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    load(small_dataset(6), "b1")
    load(small_dataset(6), "q1", qwen=True)
    kept = {}
    for batch_id in ("b1", "q1"):
        kept[batch_id] = json.loads(command("status", "--batch-id", batch_id, "--json").out)
        assert command("reset", "--batch-id", batch_id, "--confirm").code == 0
    found = {batch["batch_id"]: batch for batch in json.loads(command("status", "--json").out)["batches"]}
    lines = command("status").out.splitlines()
    for batch_id in ("b1", "q1"):
        [(moment,)] = world.query(dsn, f"SELECT reset_at FROM ingest.batches WHERE id = '{batch_id}'")
        assert (found[batch_id]["state"], found[batch_id]["reset_at"]) == ("reset", moment.isoformat())
        assert any(line.split()[:2] == [batch_id, "reset"] and f"{moment:%Y-%m-%d %H:%M:%S}" in line for line in lines)
        former = json.loads(command("status", "--batch-id", batch_id, "--json").out)
        assert former == {**kept[batch_id], "state": "reset", "reset_at": moment.isoformat()}
        assert former["total_seconds"] > 0
    text = command("status", "--batch-id", "b1")
    assert text.out.startswith("Batch b1 is reset, it had 6 recognitions, 12 photos, ")
    assert "    storage_upload: 12 ops, avg " in text.out
    assert json.loads(command("status", "--json").out)["unfinished"] == []
