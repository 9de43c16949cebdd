"""Loading annotations again, beside loads and resets, and by several batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from embedded_supabase.ports import free_port
from pipeline.config import Settings
from pipeline.dataset.annotations import ANNOTATIONS
from tests import annotating, world
from tests.annotating import (
    RECEIPT,
    Run,
    annotated,
    annotation_ids,
    break_transforms,
    give_receipt,
    ids_of,
    item_ids,
    key_of,
    markers,
    mend_transforms,
    of,
    read,
    rejects,
    value_of,
    write,
)
from tests.database_support import recorded_statements
from tests.services import MakeDataset
from tests.test_luigi import as_first, first_line

run = annotating.run
dsn = annotating.dsn


# Again


def test_a_second_run_changes_nothing(
    run: Run, small_dataset: MakeDataset, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "1")
    numbers = []
    for seed, count in ((1, 2), (2, 9)):
        dataset = small_dataset(count, seed=seed)
        file = dataset / ANNOTATIONS
        assert run("load", "--source", dataset, "--batch-id", f"b{seed}").code == 0
        first = run("load-qwen", "--file", file, "--batch-id", f"q{seed}")
        assert first.code == 0
        before = world.dump(dsn), world.counts(dsn)
        with recorded_statements() as asked:
            again = run("load-qwen", "--file", file, "--batch-id", f"q{seed}")
            numbers.append(len(asked))
        assert replace(again, out=as_first(again.out)) == replace(first, out=first_line(first.out))
        assert run("load-qwen", "--batch-id", f"q{seed}") == again
        assert (world.dump(dsn), world.counts(dsn)) == before
    assert numbers[0] == numbers[1] < 20


def test_a_finished_batch_does_not_need_its_file_any_more(
    run: Run, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(3)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    first = run("load-qwen", "--file", file, "--batch-id", "q1")
    file.rename(dataset / "moved.json")
    again = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert replace(again, out=as_first(again.out)) == replace(first, out=first_line(first.out))
    world.check(settings, (dataset, "b1", None), qwen=dataset / "moved.json")


def test_a_forced_batch_is_a_new_version_that_keeps_the_ids_of_what_stays(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(3)
    first, second, third = ids_of(dataset)
    give_receipt(dataset, first, RECEIPT)
    former = {
        key_of(first): value_of("dish_0", "dish_0", "dish_5", "dish_6", "plate", "plate"),
        key_of(first, "Qualifying"): value_of("dish_0", "plate", "plate", "plate"),
        key_of(second): value_of("dish_0", "plate"),
        key_of(third): value_of("plate"),
    }
    latter = {
        key_of(first): value_of("dish_2", "dish_0", "dish_5", "plate", left=90),
        key_of(first, "Qualifying"): value_of("dish_0", "dish_8", "dish_8", "dish_8", "plate", left=90),
        key_of(second): former[key_of(second)],
    }
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", write(tmp_path / "1.json", former), "--batch-id", "q1").code == 0
    annotations, items = annotation_ids(dsn), item_ids(dsn)
    unchanged = {key: row for key, row in annotations.items() if key[0] != first}
    assert run("load-qwen", "--file", write(tmp_path / "2.json", latter), "--batch-id", "q2", "--force").code == 0
    # The recognition that the second file does not name keeps what it had.
    wanted = write(tmp_path / "3.json", {**latter, key_of(third): former[key_of(third)]})
    world.check(settings, (dataset, "b1", None), qwen=wanted)
    for now, before in ((annotation_ids(dsn), annotations), (item_ids(dsn), items)):
        kept = now.keys() & before.keys()
        assert {key: now[key] for key in kept} == {key: before[key] for key in kept}
        assert min(now[key] for key in now.keys() - kept) > max(before.values())
    assert annotation_ids(dsn).items() >= unchanged.items()
    for gone in ((first, "FOOD", "MODEL", 7, 1), (first, "PLATE", "MODEL", 0, 2), (first, "PLATE", "MODEL", 0, 3)):
        assert gone in items
        assert gone not in item_ids(dsn)
    # The rows of both versions.
    assert world.query(dsn, "SELECT batch_id, count(*) FROM raw.detections GROUP BY 1 ORDER BY 1") == [
        ("q1", 13),
        ("q2", 11),
    ]


def test_a_forced_batch_that_says_the_same_changes_no_row(run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    dataset = small_dataset(6)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1").code == 0
    rows = "SELECT ctid::text, xmin::text, id FROM public.{} ORDER BY 3"
    tables = ("initial_annotations", "initial_tray_items", "images", "recognitions")
    before = [world.query(dsn, rows.format(name)) for name in tables]
    assert run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q2", "--force").code == 0
    assert [world.query(dsn, rows.format(name)) for name in tables] == before


def test_a_forced_file_without_detections_clears_a_recognition_and_an_unforced_one_does_not(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(2)
    first, second = ids_of(dataset)
    give_receipt(dataset, first, RECEIPT)
    full = {key_of(first): value_of("dish_0", "dish_7", "plate"), key_of(second): value_of("plate")}
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    bare = item_ids(dsn)
    assert run("load-qwen", "--file", write(tmp_path / "1.json", full), "--batch-id", "q1").code == 0
    empty = write(tmp_path / "2.json", {key_of(first): value_of(), key_of(first, "Qualifying"): value_of()})
    done = run("load-qwen", "--file", empty, "--batch-id", "q2")
    assert done.code == 0
    assert "Skipped: 1 photo already annotated." in done.out
    assert annotated(dsn) == {first, second}
    done = run("load-qwen", "--file", empty, "--batch-id", "q3", "--force")
    assert done.code == 0
    assert done.out.startswith("Batch q3 is done: 1 recognition, 2 photos, 0 detections.")
    wanted = write(tmp_path / "3.json", {key_of(second): full[key_of(second)]})
    world.check(settings, (dataset, "b1", None), qwen=wanted)
    assert {key: row for key, row in item_ids(dsn).items() if key[0] == first} == {
        key: row for key, row in bare.items() if key[0] == first
    }
    # What is cleared has no annotations, so it is annotated again without --force.
    assert run("load-qwen", "--file", tmp_path / "1.json", "--batch-id", "q4").code == 0
    world.check(settings, (dataset, "b1", None), qwen=tmp_path / "1.json")


def test_a_forced_file_that_is_broken_for_a_recognition_leaves_it_as_it_was(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(2)
    first, second = ids_of(dataset)
    full = {key_of(first): value_of("dish_0", "plate"), key_of(second): value_of("plate")}
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", write(tmp_path / "1.json", full), "--batch-id", "q1").code == 0
    latter = {key_of(second): value_of("plate", "plate", left=50)}
    file = write(tmp_path / "2.json", {key_of(first): [], key_of(first, "Qualifying"): {}, **latter})
    assert run("load-qwen", "--file", file, "--batch-id", "q2", "--force").code == 0
    assert rejects(dsn, "q2") == [(first, "json_shape", "discover")] * 2
    world.check(settings, (dataset, "b1", None), qwen=write(tmp_path / "3.json", {**full, **latter}))


# Beside loads and resets


def test_a_forced_load_keeps_the_annotations_and_pairs_them_with_the_new_receipt(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(3)
    first, second, third = ids_of(dataset)
    for number in (first, second):
        give_receipt(dataset, number, RECEIPT)
    give_receipt(dataset, third, None)
    file = write(
        tmp_path / "a.json",
        {
            key_of(number, camera): value_of("dish_0", "dish_0", "dish_0", "dish_1", "dish_2", "dish_3", "plate")
            for number in (first, second, third)
            for camera in ("Main", "Qualifying")
        },
    )
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    annotations, items = annotation_ids(dsn), item_ids(dsn)
    give_receipt(dataset, first, [{**RECEIPT[0], "Count": 3}, RECEIPT[1]])
    give_receipt(dataset, second, None)
    give_receipt(dataset, third, RECEIPT[:1])
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    world.check(settings, (dataset, "b2", None), qwen=file, superseded=[(dataset, "b1", None)])
    assert annotation_ids(dsn) == annotations
    now = item_ids(dsn)
    stays, changes = ((first, "FOOD", "RECIPE_LINE_OPTION", *place) for place in ((2, 1), (1, 2)))
    assert now[stays] == items[stays]
    assert now[changes] != items[changes]
    assert (first, "FOOD", "RECIPE_LINE_OPTION", 3, 1) not in now
    assert (third, "FOOD", "RECIPE_LINE_OPTION", 1, 2) in now
    assert (third, "FOOD", "MODEL", 1, 1) not in now


@pytest.mark.slow
def test_a_recognition_that_is_loaded_again_after_a_reset_has_its_annotations_again(
    run: Run, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(6)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    empty = world.domain(dsn)
    assert (empty.recognitions, empty.items, empty.annotations) == ([], [], [])
    for batch_id in ("b1", "b2"):
        assert run("load", "--source", dataset, "--batch-id", batch_id).code == 0
        world.check(settings, (dataset, batch_id, None), qwen=file)
        assert run("reset", "--batch-id", batch_id, "--confirm").code == 0
    assert world.domain(dsn).annotations == []


def test_a_reset_of_annotations_gives_back_the_former_ones(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(2)
    first, second = ids_of(dataset)
    former = write(tmp_path / "1.json", {key_of(first): value_of("dish_0", "plate"), key_of(second): value_of("plate")})
    latter = write(tmp_path / "2.json", {key_of(first): value_of("dish_9", "plate", "plate", left=50)})
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", former, "--batch-id", "q1").code == 0
    before = world.dump(dsn)
    assert run("load-qwen", "--file", latter, "--batch-id", "q2", "--force").code == 0
    assert run("reset", "--batch-id", "q2", "--confirm").code == 0
    after = world.dump(dsn)
    assert {name: len(rows) for name, rows in after.items()} == {name: len(rows) for name, rows in before.items()}
    world.check(settings, (dataset, "b1", None), qwen=former)
    assert run("reset", "--batch-id", "q1", "--confirm").code == 0
    world.check(settings, (dataset, "b1", None))
    assert world.counts(dsn)["raw.detections"] == 0


def test_annotations_need_no_storage(
    run: Run, small_dataset: MakeDataset, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = small_dataset(6)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    with monkeypatch.context() as patch:
        patch.setenv("NEXT_PUBLIC_SUPABASE_URL", f"http://127.0.0.1:{free_port()}")
        assert run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1").code == 0
    world.check(settings, (dataset, "b1", None), qwen=dataset / ANNOTATIONS)


REFERENCE = f"""
    CREATE TABLE public.app_marks (item bigint REFERENCES public.initial_tray_items (id));
    INSERT INTO public.app_marks SELECT id FROM public.initial_tray_items
    WHERE item_type = %s AND {world.ours("public.initial_tray_items")}
"""


def test_a_forced_file_that_would_delete_a_referenced_item_leaves_the_photo_as_it_is(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(2)
    first, second = ids_of(dataset)
    full = {key_of(first): value_of("dish_0", "plate", "plate", "plate"), key_of(second): value_of("plate")}
    former = write(tmp_path / "1.json", full)
    changed = value_of("dish_0", "plate", left=70)
    latter = write(tmp_path / "2.json", {key_of(first): changed, key_of(second): changed})
    mixed = write(tmp_path / "3.json", {**full, key_of(second): changed})
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", former, "--batch-id", "q1").code == 0
    world.query(dsn, REFERENCE, ("PLATE",))
    for batch_id in ("q2", "q3"):
        done = run("load-qwen", "--file", latter, "--batch-id", batch_id, "--force")
        assert done.code == 0
        assert "public.app_marks (2 rows)" in done.out
        world.check(settings, (dataset, "b1", None), qwen=mixed)
    # A reference to what stays is no hindrance.
    world.query(
        dsn, "DELETE FROM public.app_marks WHERE item IN (SELECT id FROM public.initial_tray_items WHERE ordinal > 1)"
    )
    done = run("load-qwen", "--file", latter, "--batch-id", "q4", "--force")
    assert (done.code, done.err) == (0, "")
    world.check(settings, (dataset, "b1", None), qwen=latter)
    assert world.query(dsn, "SELECT count(*) FROM public.app_marks") == [(2,)]


def test_a_forced_file_that_would_delete_a_referenced_annotation_leaves_it(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(1)
    [number] = ids_of(dataset)
    former = write(tmp_path / "1.json", {key_of(number): value_of("plate", "plate")})
    latter = write(tmp_path / "2.json", {key_of(number): value_of("plate")})
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    assert run("load-qwen", "--file", former, "--batch-id", "q1").code == 0
    world.query(
        dsn,
        "CREATE TABLE public.app_checks (annotation bigint REFERENCES public.initial_annotations (id));"
        "INSERT INTO public.app_checks SELECT id FROM public.initial_annotations",
    )
    done = run("load-qwen", "--file", latter, "--batch-id", "q2", "--force")
    assert done.code == 0
    assert "public.app_checks (1 row)" in done.out
    world.check(settings, (dataset, "b1", None), qwen=former)


# Which batch is meant


@pytest.mark.parametrize("option", ["--file", "--force"])
@pytest.mark.parametrize("finished", [True, False])
def test_the_same_id_with_other_parameters_is_refused(
    option: str, finished: bool, run: Run, small_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = small_dataset(3)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    if not finished:
        break_transforms(dsn)
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == (0 if finished else 3)
    if not finished:
        mend_transforms(dsn)
    other = write(tmp_path / "other.json", {})
    arguments = ["--file", str(other)] if option == "--file" else ["--file", str(file), "--force"]
    refused = run("load-qwen", "--batch-id", "q1", *arguments)
    assert (refused.code, refused.out) == (4, "")
    begun = f"--file {file.resolve()}" if option == "--file" else "no --force"
    assert f"Batch q1 was started with {begun}." in refused.err
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    world.check(settings, (dataset, "b1", None), qwen=file)


def test_a_batch_is_of_one_kind(run: Run, small_dataset: MakeDataset, settings: Settings) -> None:
    dataset = small_dataset(3)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    refused = run("load-qwen", "--file", file, "--batch-id", "b1")
    assert (refused.code, refused.out) == (4, "")
    assert "Batch b1 holds a dataset." in refused.err
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    refused = run("load", "--source", dataset, "--batch-id", "q1")
    assert (refused.code, refused.out) == (4, "")
    assert "Batch q1 holds Qwen annotations." in refused.err
    world.check(settings, (dataset, "b1", None), qwen=file)


@pytest.mark.parametrize("batch_id", ["../q1", "q..1", " ", "-q", "q" * 101, "q/1", "q1\n"])
def test_an_id_that_cannot_be_one_is_refused(batch_id: str, run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    done = run("load-qwen", "--file", small_dataset(3) / ANNOTATIONS, f"--batch-id={batch_id}")
    assert (done.code, done.out) == (2, "")
    assert world.query(dsn, "SELECT id FROM ingest.batches") == []


@pytest.mark.slow
def test_without_an_id_the_newest_unfinished_batch_like_it_is_resumed(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(6)
    ids = ids_of(dataset)
    file = dataset / ANNOTATIONS
    half = write(tmp_path / "half.json", of(read(file), ids[4:]))
    assert run("load", "--source", dataset, "--batch-id", "b1", "--limit", "2").code == 0
    break_transforms(dsn)
    first = run("load-qwen", "--file", file, "--batch-id", "older")
    assert first.code == 3
    assert "To go on: python -m pipeline load-qwen --batch-id older" in first.err
    assert "Traceback" not in first.err
    assert run("load", "--source", dataset, "--batch-id", "b2").code == 0
    named = run("load-qwen", "--file", half, "--batch-id", "another-file")
    newer = run("load-qwen", "--file", file, "--batch-id", "newer")
    forced = run("load-qwen", "--file", file, "--batch-id", "forced", "--force")
    assert (named.code, newer.code, forced.code) == (3, 3, 3)  # of the forced one nothing was left to hold
    assert "Error: All that is new belongs to unfinished another-file, newer, older" in forced.err
    assert markers(dsn, "older") == [("copy", 1), ("discover", 0)]
    mend_transforms(dsn)
    for batch_id, numbers in (("newer", ids[2:4]), ("older", ids[:2])):
        done = run("load-qwen", "--file", file)
        assert done.code == 0
        assert done.out.startswith(f"Batch {batch_id} is done: 2 recognitions")
        assert annotated(dsn) >= set(numbers)
    done = run("load-qwen", "--file", file)
    assert done.code == 3
    assert "Error: All that is new belongs to unfinished another-file:" in done.err
    assert run("load-qwen", "--batch-id", "another-file").code == 0
    world.check(settings, (dataset, "b1", ids[:2]), (dataset, "b2", ids[2:]), qwen=file)


def test_two_unfinished_batches_never_share_a_recognition(
    run: Run, own_dataset: MakeDataset, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(6)
    ids = ids_of(dataset)
    file = dataset / ANNOTATIONS
    part = write(tmp_path / "part.json", of(read(file), ids[1:4]))
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    break_transforms(dsn)
    assert run("load-qwen", "--file", part, "--batch-id", "q1").code == 3
    assert run("load-qwen", "--file", file, "--batch-id", "q2").code == 3
    claims = "SELECT batch_id, recognition_id FROM ingest.claims WHERE kind = 'qwen' ORDER BY 1, 2"
    manifest = "SELECT batch_id, recognition_id FROM ingest.manifest WHERE batch_id LIKE 'q%' ORDER BY 1, 2"
    wanted = [*(("q1", number) for number in ids[1:4]), *(("q2", number) for number in (ids[0], *ids[4:]))]
    assert world.query(dsn, claims) == wanted
    assert world.query(dsn, manifest) == wanted
    status = json.loads(run("status", "--json").out)
    assert {one["batch_id"] for one in status["unfinished"]} == {"q1", "q2"}
    told = run("status").out
    for batch_id in ("q1", "q2"):
        assert f"python -m pipeline load-qwen --batch-id {batch_id}" in told
    mend_transforms(dsn)
    second = run("load-qwen", "--file", file, "--batch-id", "q2")
    assert second.code == 0
    assert "Skipped: 6 photos held by unfinished q1." in second.out
    assert annotated(dsn) <= {ids[0], *ids[4:]}
    assert run("load-qwen", "--file", part, "--batch-id", "q1").code == 0
    assert world.query(dsn, claims) == []
    world.check(settings, (dataset, "b1", None), qwen=file)
