"""Nights on which there is nothing to load: no batch is made, the look is on record, and nothing is told twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Settings
from pipeline.dataset.annotations import ANNOTATIONS
from pipeline.sample.broken import BROKEN
from pipeline.storage import Storage
from tests import annotating, world
from tests.annotating import Run, ids_of, key_of, value_of, write
from tests.database_support import recorded_statements
from tests.services import MakeDataset, Start
from tests.test_luigi import BARE, finish

run = annotating.run
dsn = annotating.dsn


def batches(dsn: str) -> list[str]:
    return [name for (name,) in world.query(dsn, "SELECT id FROM ingest.batches ORDER BY id")]


def looks(dsn: str) -> list[tuple[Any, ...]]:
    statement = "SELECT batch_id, batch_made, rejected, known_rejects FROM ingest.looks ORDER BY looked_at"
    return world.query(dsn, statement)


def cut(dataset: Path, numbers: Sequence[int]) -> list[Path]:
    """Truncate a photo of each recognition, so that only reading it reveals the damage; return the photos."""
    photos = [next(world.folders(dataset)[number].rglob("*_Main.jpg")) for number in numbers]
    for photo in photos:
        photo.write_bytes(photo.read_bytes()[:-200])
    return photos


@pytest.mark.parametrize("command", ["load", "load-qwen"])
def test_a_quiet_night_makes_no_batch_and_is_on_record(
    run: Run, small_dataset: MakeDataset, dsn: str, command: str, tmp_path: Path
) -> None:
    dataset = small_dataset(6)
    option = ["--source", dataset] if command == "load" else ["--file", dataset / ANNOTATIONS]
    for name, arguments in (("load", ["--source", dataset]), (command, option)):
        assert run(name, *arguments).code == 0
    before = world.dump(dsn), batches(dsn)
    quiet = run(command, *option, "--batch-id", "night")
    assert quiet.code == 0, quiet.err
    assert quiet.out.startswith("Nothing to load: ")
    assert (world.dump(dsn), batches(dsn)) == before
    metrics = tmp_path / "metrics.prom"
    unnamed = json.loads(run(command, *option, "--json", "--metrics-file", metrics).out)
    assert "pipeline_batch_recognitions{" in metrics.read_text(encoding="utf-8")
    assert (unnamed["state"], unnamed["batch_made"], unnamed["recognitions_processed"]) == ("done", False, 0)
    assert [row[1] for row in looks(dsn)][-2:] == [False, False]
    # The same id is a no-op, whatever comes; with other options it is refused.
    assert run(command, "--batch-id", "night") == quiet
    assert run("status", "--batch-id", "night").out == quiet.out
    refused = run(command, *option, "--batch-id", "night", "--force")
    assert (refused.code, "Batch night was started with no --force." in refused.err) == (4, True)
    assert run("load-qwen" if command == "load" else "load", "--batch-id", "night").code == 4


def test_the_statements_of_a_quiet_night_do_not_grow(
    run: Run, small_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = []
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "1")
    for count in (2, 9):
        dataset = small_dataset(count, seed=count)
        assert run("load", "--source", dataset).code == 0
        with recorded_statements() as asked:
            for name in ("look", "look again"):
                asked.clear()
                assert run("load", "--source", dataset, "--changed", "--batch-id", f"n{count}").code == 0
                numbers.append((name, len(asked)))
    assert numbers[:2] == numbers[2:]
    assert numbers[1][1] < 12


def test_what_is_known_is_told_once(run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str) -> None:
    dataset = own_dataset(12, broken=True)
    assert run("load", "--source", dataset, "--batch-id", "b1", "--max-rejects", "100%").code == 0
    told = world.query(dsn, "SELECT code, path FROM ingest.rejects"), world.query(dsn, "SELECT * FROM ingest.notices")
    for name in ("n1", "n2"):
        quiet = run("load", "--source", dataset, "--batch-id", name, "--changed")
        assert quiet.code == 0, quiet.err
        assert f"Known rejects: {len(BROKEN)}, recorded by earlier loads and unchanged.\n" in quiet.out
        assert "Rejected: " not in quiet.out + quiet.err
        assert "Noticed: " not in quiet.out + quiet.err
    assert told == (
        world.query(dsn, "SELECT code, path FROM ingest.rejects"),
        world.query(dsn, "SELECT * FROM ingest.notices"),
    )
    assert looks(dsn)[1:] == [("n1", False, 0, len(BROKEN)), ("n2", False, 0, len(BROKEN))]
    # A stray file makes no batch, either, and is told on its first night.
    (dataset / "minutes.docx").write_bytes(b"x")
    first, second = (run("load", "--source", dataset, "--batch-id", name) for name in ("n3", "n4"))
    assert ("minutes.docx" in first.out, "minutes.docx" in second.out) == (True, False)
    assert world.query(dsn, "SELECT path FROM ingest.notices WHERE batch_id = 'n3'") == [("minutes.docx",)]
    assert batches(dsn) == ["b1"]
    forgotten = run("reset", "--batch-id", "b1", "--confirm")
    assert forgotten.code == 0
    again = run("load", "--source", dataset, "--batch-id", "b2", "--max-rejects", "100%")
    assert (again.code, looks(dsn)[-1]) == (0, ("b2", True, looks(dsn)[0][2], 0))


def test_a_reject_is_read_again_once_its_files_change(run: Run, own_dataset: MakeDataset, dsn: str) -> None:
    dataset = own_dataset(8)
    numbers = ids_of(dataset)
    good = shutil.copytree(dataset, dataset.parent / "good")
    first, second = cut(dataset, numbers[:2])
    assert run("load", "--source", dataset, "--batch-id", "b1", "--limit", "3").code == 0
    assert [number for number, *_ in annotating.rejects(dsn, "b1")] == numbers[:2]
    # What is known is not counted against the limit: the lowest new ones are loaded.
    assert run("load", "--source", dataset, "--batch-id", "b2", "--limit", "2").code == 0
    assert [row[0] for row in world.domain(dsn).recognitions] == numbers[2:5]
    shutil.copyfile(good / first.relative_to(dataset), first)
    os.utime(second)
    assert run("load", "--source", dataset, "--batch-id", "b3").code == 0
    assert looks(dsn)[1:] == [("b2", True, 0, 2), ("b3", True, 0, 1)]
    assert (annotating.rejects(dsn, "b3"), len(world.domain(dsn).recognitions)) == ([], 7)


def test_what_is_delivered_broken_again_is_no_known_reject(run: Run, own_dataset: MakeDataset, dsn: str) -> None:
    dataset = own_dataset(4)
    numbers = ids_of(dataset)
    [photo] = cut(dataset, numbers[:1])
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    os.utime(photo)  # touched: read once more, and known
    for name in ("n1", "n2"):
        assert run("load", "--source", dataset, "--batch-id", name).code == 0
    assert looks(dsn)[1:] == [("n1", False, 0, 1), ("n2", False, 0, 1)]
    files = [json.loads(run("status", "--batch-id", name, "--json").out)["files"]["rejected"] for name in ("n1", "n2")]
    assert batches(dsn) == ["b1"], files
    cut(dataset, numbers[:1])
    held = run("load", "--source", dataset, "--batch-id", "b2")
    assert (held.code, "No new recognition of" in held.err) == (6, True)
    assert [number for number, *_ in annotating.rejects(dsn, "b2")] == numbers[:1]


def test_what_storage_refused_is_sent_again_every_night(
    run: Run, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(12)
    largest = max(path.stat().st_size for path in dataset.rglob("*.jpg"))
    with closing(Storage(settings)) as storage:
        storage.ensure_bucket()

        def limit(size: int | None) -> None:
            storage._send("PUT", storage._path("/bucket"), {"public": False, "file_size_limit": size})

        limit(largest - 1)
        assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
        refused = len(annotating.rejects(dsn, "b1"))
        assert refused
        quiet = run("load", "--source", dataset, "--batch-id", "n1")
        assert quiet.code == 0
        assert (batches(dsn), looks(dsn)[1]) == (["b1"], ("n1", False, 0, refused))
        summary = json.loads(run("status", "--batch-id", "n1", "--json").out)
        assert summary["files"]["used"] == 0
        assert summary["files"]["rejected"] >= 2 * refused
        dry = run("load", "--source", dataset, "--dry-run").out
        assert dry.startswith("Nothing that is new would be loaded. Nothing was written.\n")
        again = f"{refused} recognition{'' if refused == 1 else 's'}"
        assert f"\nWould try {again} again that an earlier load rejected.\n" in dry
        assert len(world.objects(settings)) == 2 * (12 - refused)
        limit(None)
    assert run("load", "--source", dataset, "--batch-id", "b2").code == 0
    assert len(world.domain(dsn).recognitions) == 12


def test_what_others_hold_is_exit_code_3_every_night(
    run: Run, own_dataset: MakeDataset, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = own_dataset(6)
    for path in dataset.rglob("*_Main.jpg"):
        path.unlink()
        break
    assert run("load", "--source", dataset, "--batch-id", "b1", "--max-rejects", "100%").code == 0
    for number in ids_of(dataset)[1:]:
        annotating.give_receipt(dataset, number, annotating.RECEIPT)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.graph.tasks.copy_shard", lambda *_, **__: 1 / 0)
        assert run("load", "--source", dataset, "--batch-id", "b2", "--changed").code == 3
    for name in ("n1", "n2"):
        claimed = run("load", "--source", dataset, "--batch-id", name, "--changed")
        assert (claimed.code, "b2" in claimed.err) == (3, True)
    plain = run("load", "--source", dataset, "--batch-id", "n3")
    assert (plain.code, "changed since" in plain.out) == (0, False)
    assert [row[0] for row in looks(dsn)] == ["b1", "b2", "n3"]


def test_status_shows_the_last_look_and_load_and_how_old_the_data_is(
    run: Run, small_dataset: MakeDataset, dsn: str
) -> None:
    dataset = small_dataset(6)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load", "--source", dataset, "--batch-id", "n1").code == 0
    many = "INSERT INTO ingest.batches (id, kind, state, source, bucket) SELECT 'x' || n, 'load', 'reset', '/x', 'x'"
    world.query(dsn, f"{many} FROM generate_series(1, 12) n")
    shown = json.loads(run("status", "--json").out)
    [look], [load] = shown["last_looks"], shown["last_loads"]
    assert (look["batch_id"], look["batch_made"], look["found"], load["batch_id"]) == ("n1", False, 6, "b1")
    newest = str(world.query(dsn, "SELECT max(captured_on) FROM public.recognitions")[0][0])
    assert (shown["newest"]["captured_on"], look["newest"], shown["more_batches"]) == (newest, newest, 3)
    text = run("status").out
    assert f"Newest data: captured on {newest}\n" in text
    assert f", 6 recognitions in {dataset}, nothing to load\n" in text
    assert "Last load (load): " in text
    assert "  and 3 more: python -m pipeline status --all\n" in text
    everything = run("status", "--all")
    assert ("more:" in everything.out, everything.out.count("  reset  ")) == (False, 12)


@pytest.mark.slow
def test_a_bare_luigi_command_ends_with_0_where_nothing_is_to_load(
    run: Run, start: Start, own_dataset: MakeDataset, dsn: str
) -> None:
    dataset = own_dataset(4)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    arguments = ("--source", dataset, "--changed", "--local-scheduler")
    code, stdout, stderr = finish(start(*BARE, "--batch-id", "n1", *arguments))
    assert code == 0, stderr
    assert "Nothing to load: " in stdout
    annotating.give_receipt(dataset, ids_of(dataset)[0], annotating.RECEIPT)
    code, _, stderr = finish(start(*BARE, "--batch-id", "b2", *arguments))
    assert code == 0, stderr
    assert looks(dsn)[1:] == [("n1", False, 0, 0), ("b2", True, 0, 0)]


def test_photos_whose_values_changed_are_annotated_anew(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(5)
    first, second, third, fourth, _ = ids_of(dataset)
    values = {
        key_of(number, camera): value_of("dish_0", "plate")
        for number in (first, second, third, fourth)
        for camera in ("Main", "Qualifying")
    }
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    file = write(tmp_path / "boxes.json", values)
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    ids = annotating.annotation_ids(dsn)
    file.write_text(json.dumps(values, indent=8), encoding="utf-8")  # the same in another form
    quiet = json.loads(run("load-qwen", "--file", file, "--batch-id", "n1", "--changed", "--json").out)
    assert (quiet["batch_made"], quiet["changed_since_load"]) == (False, 0)
    values[key_of(first)] = value_of("dish_0", "plate", left=40)  # moved
    values[key_of(second, "Qualifying")] = value_of("plate")  # fewer
    values[key_of(third)] = {"dishes": {"qwen_detections": []}, "plates": {"qwen_detections": []}}  # none
    values[key_of(ids_of(dataset)[-1])] = value_of("plate")  # new
    write(file, values)
    plain = run("load-qwen", "--file", file, "--batch-id", "q2")
    assert plain.code == 0
    assert "3 photos changed since they were loaded: load-qwen --changed\n" in plain.out
    done = run("load-qwen", "--file", file, "--batch-id", "q3", "--changed", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["images_processed"] == 3
    world.check(settings, (dataset, "b1", None), qwen=file)
    now = annotating.annotation_ids(dsn)
    assert {key: now[key] for key in now.keys() & ids.keys()} == {key: ids[key] for key in now.keys() & ids.keys()}
    again = json.loads(run("load-qwen", "--file", file, "--batch-id", "n2", "--changed", "--json").out)
    assert (again["batch_made"], again["changed_since_load"]) == (False, 0)
    # What the numbers mean is part of the value.
    other = run("load-qwen", "--file", file, "--batch-id", "q4", "--changed", "--coordinates", "320x240")
    assert other.code == 0
    assert "photos changed since they were loaded.\n" in other.out
    for name in ("q4", "q3"):
        assert run("reset", "--batch-id", name, "--confirm").code == 0
    assert annotating.annotation_ids(dsn).keys() >= ids.keys()


def test_changed_values_that_people_work_on_stay(run: Run, own_dataset: MakeDataset, dsn: str, tmp_path: Path) -> None:
    dataset = own_dataset(3)
    first, second, _ = ids_of(dataset)
    values = {key_of(number): value_of("dish_0", "plate") for number in (first, second)}
    file = write(tmp_path / "boxes.json", values)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    world.query(
        dsn,
        "CREATE TABLE public.checks (annotation_id bigint REFERENCES public.initial_annotations (id));"
        "INSERT INTO public.checks SELECT id FROM public.initial_annotations",
    )
    before = annotating.annotation_ids(dsn)
    write(file, {key: value_of("dish_0", left=40) for key in values})
    for name, told in (("n1", 2), ("n2", 0)):
        done = run("load-qwen", "--file", file, "--batch-id", name, "--changed")
        assert (done.code, done.out.count("in_use: ")) == (0, told)
    assert (annotating.annotation_ids(dsn), batches(dsn)) == (before, ["b1", "q1"])
    world.query(dsn, "DROP TABLE public.checks")
    assert run("load-qwen", "--file", file, "--batch-id", "q2", "--changed").code == 0
    ours = {key for key in before if key[0] in (first, second)}
    assert ours
    assert annotating.annotation_ids(dsn).keys().isdisjoint(ours)
