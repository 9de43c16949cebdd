"""The whole load, as its users run it: what it leaves in the database and in the bucket, and what it says."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config import Settings
from pipeline.dataset.layout import MAXIMUM_DOCUMENT_BYTES, MAXIMUM_PHOTO_BYTES
from pipeline.graph.run import registry
from pipeline.sample.broken import BROKEN
from pipeline.storage import Storage
from pipeline.units import moment
from tests import world
from tests.database_support import recorded_statements
from tests.services import MakeDataset, RunPipeline, Start, after_target
from tests.test_luigi import as_first, first_line


def ids_of(dataset: Path) -> list[int]:
    return sorted(world.folders(dataset))


def rejects_of(settings: Settings) -> dict[int | None, str]:
    rows = world.query(settings.database_url.reveal(), "SELECT recognition_id, code FROM ingest.rejects")
    return dict(rows)


def test_a_dataset_becomes_rows_and_objects_as_its_files_say(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = small_dataset(12)
    done = run_pipeline("load", "--source", dataset, "--batch-id", "b1")
    assert (done.returncode, after_target(done.stderr)) == (0, "")
    assert done.stdout.startswith("Batch b1 is done: 12 recognitions, 24 photos, ")
    assert "\nPerformance Metrics:\n  Total time: " in done.stdout
    for name in (
        "recognitions_processed: 12 (",
        "images_processed: 24 (",
        "bytes_uploaded: ",
        "storage_upload: 24 ops",
    ):
        assert f"    {name}" in done.stdout
    assert re.search(r"    db_bulk_copy: 1 op, avg \d+\.\d\d ms, total \d+\.\d\d s\n", done.stdout)
    assert "transform" not in done.stdout
    everything = run_pipeline("status", "--batch-id", "b1", "--verbose").stdout
    totals = [float(one) for one in re.findall(r"^    \w+: \d+ ops?, .* (\d+\.\d\d) s$", everything, re.MULTILINE)]
    assert len(totals) > 10
    assert totals == sorted(totals, reverse=True)
    world.check(settings, (dataset, "b1", None))
    statement = f"SELECT recognition_id, raw_payload FROM public.recipes WHERE {world.ours('public.recipes')}"
    payloads = world.query(settings.database_url.reveal(), statement)
    assert dict(payloads) == {
        number: json.loads(path.read_text("utf-8-sig"))
        for number, folder in world.folders(dataset).items()
        for path in folder.glob("*correct_dishes.json")
    }
    markers = world.query(
        settings.database_url.reveal(), "SELECT step, shard FROM ingest.batch_state WHERE batch_id = 'b1' ORDER BY 1, 2"
    )
    assert markers == [("copy", 1), ("discover", 0), ("load", 0), ("transform", 0), ("upload", 1)]
    assert world.query(settings.database_url.reveal(), "SELECT count(*) FROM ingest.claims") == [(0,)]


def test_a_second_run_changes_nothing_and_says_that_the_batch_is_done(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    arguments = ("load", "--source", small_dataset(12), "--batch-id", "b1")
    first = run_pipeline(*arguments)
    before = world.dump(settings.database_url.reveal()), world.objects(settings)
    again = run_pipeline(*arguments)
    assert (again.returncode, after_target(again.stderr)) == (0, "")
    assert as_first(again.stdout) == first_line(first.stdout)
    told = [json.loads(run_pipeline(*load, "--json").stdout) for load in (arguments, arguments)]
    assert told[0] == told[1]
    assert (told[0]["state"], told[0]["failures"]) == ("done", [])
    assert (world.dump(settings.database_url.reveal()), world.objects(settings)) == before


def test_a_second_run_asks_as_much_of_a_large_batch_as_of_a_small_one(
    small_dataset: MakeDataset, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "1")
    numbers = []
    for batch_id, count in (("small", 3), ("large", 20)):
        arguments = ["load", "--source", str(small_dataset(count, seed=count)), "--batch-id", batch_id]
        assert main(arguments) == 0
        with recorded_statements() as asked:
            assert main(arguments) == 0
            numbers.append(len(asked))
    assert f"nothing was loaded. It has {count} recognitions" in capsys.readouterr().out
    assert numbers[0] == numbers[1] < 20


def test_a_load_without_work_takes_less_than_a_second(start: Start, small_dataset: MakeDataset, workdir: Path) -> None:
    def seconds(*arguments: str | Path) -> float:
        """Return the processor time of a command, which other processes of the machine do not lengthen."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = start(sys.executable, "-m", "pipeline", *arguments)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    load = ("load", "--source", small_dataset(12), "--batch-id", "b1")
    seconds(*load)
    alone = seconds("completion", "bash")
    assert any(seconds(*load) - alone < 1 for _ in range(3))


def test_json_tells_the_same_and_status_keeps_it(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dsn = settings.database_url.reveal()
    loaded = json.loads(
        run_pipeline("load", "--source", small_dataset(12), "--batch-id", "b1", "--workers", "2", "--json").stdout
    )
    assert loaded.pop("failures") == []
    kept = json.loads(run_pipeline("status", "--batch-id", "b1", "--json").stdout)
    assert loaded == kept
    assert kept["state"] == "done"
    assert kept["recognitions_processed"] == 12
    assert kept["images_processed"] == 24
    assert kept["bytes_uploaded"] == sum(row[5] for row in world.domain(dsn).images)
    assert kept["operations"]["storage_upload"]["ops"] == 24
    assert kept["throughput"]["images_processed"]["per_second"] == pytest.approx(24 / kept["total_seconds"], rel=0.02)
    everything = json.loads(run_pipeline("status", "--json").stdout)
    assert everything["environment"] == "local"
    assert everything["storage"]["ok"]
    assert everything["storage"]["bucket_public"] is False
    assert everything["database"]["migrations_pending"] == []
    assert everything["rows"]["images"] == world.query(dsn, "SELECT count(*) FROM public.images")[0][0]
    assert [batch["batch_id"] for batch in everything["batches"]] == ["b1"]
    assert everything["unfinished"] == []


def test_status_lists_the_batch_that_changed_last_first(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    assert run_pipeline("status").stdout.endswith("No batch was loaded yet.\n")
    for seed, batch_id in enumerate(("b1", "b2", "b3")):
        assert run_pipeline("load", "--source", small_dataset(1, seed=seed), "--batch-id", batch_id).returncode == 0
    world.query(
        settings.database_url.reveal(),
        "UPDATE ingest.batches SET created_at = timestamptz '2026-01-02 00:00Z' - right(id, 1)::int * interval '1 h',"
        " finished_at = timestamptz '2026-01-02 03:00Z' + right(id, 1)::int * interval '1 h'",
    )
    assert run_pipeline("reset", "--batch-id", "b1", "--confirm").returncode == 0
    listed = run_pipeline("status").stdout.split("Batches, the last changed first:\n")[1].splitlines()
    batches = json.loads(run_pipeline("status", "--json").stdout)["batches"]
    assert [batch["batch_id"] for batch in batches] == ["b1", "b3", "b2"]
    assert listed[0].startswith(f"  b1  reset      {moment(batches[0]['reset_at'])}  1 recognition, ")
    assert listed[1].startswith("  b3  done       2026-01-02 06:00:00 UTC  1 recognition, ")
    assert listed[2].startswith("  b2  done       2026-01-02 05:00:00 UTC  1 recognition, ")


def test_one_of_every_kind_of_reject_is_left_out_and_the_rest_is_loaded(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = small_dataset(6, broken=True)
    good = ids_of(small_dataset(6))
    done = run_pipeline("load", "--source", dataset, "--batch-id", "b1", "--max-rejects", "100%")
    assert done.returncode == 0
    found = world.query(settings.database_url.reveal(), "SELECT code, path, message FROM ingest.rejects")
    assert len(found) == len(BROKEN)
    assert {code for code, _, _ in found} == {
        "id_invalid",
        "json_broken",
        "json_nul",
        "json_shape",
        "json_too_large",
        "json_other_recognition",
        "photo_other_recognition",
        "photo_cameras",
        "photo_count",
        "photo_empty",
        "photo_not_jpeg",
        "photo_too_large",
        "photo_truncated",
        "photo_undecodable",
        "receipt_count",
    }
    assert all((dataset / path).exists() and message for _, path, message in found)
    assert f"Rejected: {len(BROKEN)} (" in done.stdout
    summary = json.loads(run_pipeline("status", "--batch-id", "b1", "--json").stdout)
    assert summary["found"] == summary["recognitions_processed"] + summary["rejected"]
    world.check(settings, (dataset, "b1", good))


def test_a_file_that_is_too_large_is_rejected_by_its_size(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(3)
    first, second, _ = ids_of(dataset)
    folders = world.folders(dataset)
    os.truncate(next(folders[first].rglob("*_Main.jpg")), MAXIMUM_PHOTO_BYTES + 1)
    os.truncate(next(folders[second].rglob("*_AM.json")), MAXIMUM_DOCUMENT_BYTES + 1)
    done = run_pipeline("load", "--source", dataset)
    assert done.returncode == 0, done.stderr
    assert rejects_of(settings) == {first: "photo_too_large", second: "json_too_large"}


def test_strict_refuses_all_of_it_before_anything_is_written(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    done = run_pipeline("load", "--source", small_dataset(6, broken=True), "--batch-id", "b1", "--strict")
    assert done.returncode == 4
    assert f"--strict refuses the batch, {len(BROKEN)} inputs are not usable" in done.stderr
    assert done.stderr.count("\n  photo_") == 11
    assert "Traceback" not in done.stderr
    assert set(world.counts(settings.database_url.reveal()).values()) == {0}
    assert world.objects(settings) == {}
    assert run_pipeline("load", "--source", small_dataset(6), "--batch-id", "b1", "--strict").returncode == 0
    world.check(settings, (small_dataset(6), "b1", None))


def test_a_dry_run_tells_and_writes_nothing(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings, is_app: bool
) -> None:
    dataset = small_dataset(6, broken=True)
    told = run_pipeline("load", "--source", dataset, "--dry-run", "--limit", "4")
    assert told.returncode == 0
    assert "Would load 4 recognitions, 8 photos" in told.stdout
    assert "Nothing was written." in told.stdout
    assert "\nPhotos and documents were not read: " in told.stdout
    found = json.loads(run_pipeline("load", "--source", dataset, "--dry-run", "--json").stdout)
    assert found["dry_run"] is True
    assert found["rejects"]["photo_count"] == 2
    assert set(world.counts(settings.database_url.reveal()).values()) == {0}
    status = json.loads(run_pipeline("status", "--json").stdout)
    assert status["storage"]["bucket_exists"] is is_app


def test_a_limit_takes_the_lowest_ids_that_are_new(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = small_dataset(12)
    ids = ids_of(dataset)
    first = run_pipeline("load", "--source", dataset, "--limit", "5", "--batch-id", "b1")
    second = run_pipeline("load", "--source", dataset, "--limit", "5", "--batch-id", "b2")
    assert (first.returncode, second.returncode) == (0, 0)
    assert "Skipped: 7 beyond the limit." in first.stdout
    assert "Skipped: 5 already loaded; 2 beyond the limit." in second.stdout
    world.check(settings, (dataset, "b1", ids[:5]), (dataset, "b2", ids[5:10]))


def test_without_new_recognitions_there_is_nothing_to_do(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = small_dataset(6)
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    done = run_pipeline("load", "--source", dataset, "--batch-id", "b2")
    assert done.returncode == 0
    assert done.stdout.startswith("Nothing to load: ")
    assert "Skipped: 6 already loaded." in done.stdout
    world.check(settings, (dataset, "b1", None))


def test_a_forced_load_is_a_new_version_that_keeps_the_ids(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dsn = settings.database_url.reveal()
    dataset = own_dataset(6)
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    ids = "SELECT id, recognition_id, camera_number FROM public.images ORDER BY 1"
    items = "SELECT id, recognition_id, line_number, ordinal FROM public.initial_tray_items ORDER BY 1"
    before = world.query(dsn, ids), world.query(dsn, items)
    former = world.objects(settings)
    photo = next((dataset).rglob("*_Main.jpg"))
    other = next(path for path in (dataset).rglob("*_Main.jpg") if path != photo)
    shutil.copyfile(other, photo)
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b2", "--force").returncode == 0
    assert (world.query(dsn, ids), world.query(dsn, items)) == before
    wanted = world.expected(dataset, "b2")
    assert world.domain(dsn).images == wanted.images
    assert world.domain(dsn).recognitions == wanted.recognitions
    assert world.objects(settings) == {**former, **{row[2]: row[6] for row in wanted.images}}
    assert world.query(dsn, "SELECT batch_id, count(*) FROM raw.photos GROUP BY 1 ORDER BY 1") == [
        ("b1", 12),
        ("b2", 12),
    ]


def test_a_forced_load_that_would_delete_referenced_rows_changes_nothing(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dsn = settings.database_url.reveal()
    dataset = own_dataset(6)
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    world.query(
        dsn,
        "CREATE TABLE public.app_marks (item bigint REFERENCES public.initial_tray_items (id));"
        "INSERT INTO public.app_marks SELECT id FROM public.initial_tray_items",
    )
    before = world.dump(dsn)
    for path in dataset.rglob("*correct_dishes.json"):
        path.unlink()
    done = run_pipeline("load", "--source", dataset, "--batch-id", "b2", "--force")
    assert done.returncode == 0
    assert re.search(r"in_use: \S+/recognition_\d+: the recognition stays as it is", done.stdout)
    assert "public.app_marks (" in done.stdout
    assert world.dump(dsn) == before
    world.query(dsn, "DROP TABLE public.app_marks")
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b3", "--force").returncode == 0
    assert world.domain(dsn).lines == []
    assert world.domain(dsn).items == []


def test_of_several_exports_the_one_that_sorts_last_wins(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(6)
    export = next(path for path in dataset.iterdir() if path.name.startswith("export_"))
    later = dataset / "export_20991231_000000"
    later.mkdir()
    first, second = sorted(export.iterdir())[:2]
    shutil.copytree(first, later / first.name)
    for camera in ("Main", "Qualifying"):
        source = next(second.rglob(f"*_{camera}.jpg"))
        shutil.copyfile(source, next((later / first.name).rglob(f"*_{camera}.jpg")))
    done = run_pipeline("load", "--source", dataset, "--batch-id", "b1")
    assert done.returncode == 0
    assert "the newest with two photos was taken, 1 earlier copy was left" in done.stdout
    world.check(settings, (dataset, "b1", None))


def test_recognition_folders_without_an_export_or_a_folder_photos(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings, tmp_path: Path
) -> None:
    dataset = own_dataset(6)
    flat = tmp_path / "RRS Dataset 2 (копия)"
    flat.mkdir()
    for number, folder in world.folders(dataset).items():
        target = flat / str(number)
        shutil.copytree(folder, target)
        for photo in (target / "photos").iterdir():
            photo.rename(target / photo.with_suffix(".JPEG").name)
        (target / "photos").rmdir()
    assert run_pipeline("load", "--source", flat, "--batch-id", "b1").returncode == 0
    world.check(settings, (flat, "b1", None))


def test_workers_share_the_work(run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings) -> None:
    dataset = small_dataset(12)
    done = run_pipeline(
        "load", "--source", dataset, "--batch-id", "b1", "--workers", "4", env={"PIPELINE_BATCH_SIZE": "2"}
    )
    assert done.returncode == 0
    world.check(settings, (dataset, "b1", None))
    workers = world.query(
        settings.database_url.reveal(), "SELECT count(DISTINCT worker) FROM ingest.batch_state WHERE shard > 0"
    )
    assert workers[0][0] > 1


def test_an_unfinished_batch_holds_its_recognitions_and_is_resumed_without_an_id(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dsn = settings.database_url.reveal()
    dataset = small_dataset(6)
    ids = ids_of(dataset)
    world.query(
        dsn,
        "CREATE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'on purpose' USING ERRCODE = '23514'; END $$;"
        "CREATE TRIGGER fail BEFORE INSERT ON raw.receipts EXECUTE FUNCTION public.fail()",
    )
    failed = run_pipeline("load", "--source", dataset, "--limit", "4", env={"PIPELINE_BATCH_SIZE": "2"})
    assert failed.returncode == 3
    assert "on purpose" in failed.stderr
    assert "Traceback" not in failed.stderr
    [(held,)] = world.query(dsn, "SELECT id FROM ingest.batches")
    assert f"python -m pipeline load --batch-id {held}" in failed.stderr
    # COPY, its marker and the rows of the same transaction: none of it.
    assert world.query(dsn, "SELECT count(*) FROM raw.photos") == [(0,)]
    # The rows were refused: the upload of the shard was rolled back as well.
    assert world.query(dsn, "SELECT step FROM ingest.batch_state ORDER BY 1") == [("discover",)]
    assert world.objects(settings) == {}
    world.query(dsn, "DROP FUNCTION public.fail CASCADE")
    planned = f"Batch {held} is unfinished: 4 recognitions with 8 photos planned"
    assert f"{planned}, 0 uploaded, 0 copied.\n" in failed.stderr
    marker = "INSERT INTO ingest.batch_state (batch_id, step, shard, started_at) SELECT %s, 'upload', 1, now()"
    world.query(dsn, marker, (held,))
    shown = run_pipeline("status", "--batch-id", held).stdout
    assert shown.startswith(f"{planned}, 2 uploaded, 0 copied.\n")
    assert "recognitions_processed: 0 (" in shown
    assert shown.endswith(f"To go on: python -m pipeline load --batch-id {held} --limit 4\n")
    world.query(dsn, "DELETE FROM ingest.batch_state WHERE step = 'upload'")

    other = run_pipeline("load", "--source", dataset, "--batch-id", "other")
    assert other.returncode == 0
    assert f"Skipped: 4 held by unfinished {held}." in other.stdout
    status = json.loads(run_pipeline("status", "--json").stdout)
    assert [batch["batch_id"] for batch in status["unfinished"]] == [held]
    assert f"python -m pipeline load --batch-id {held}" in run_pipeline("status").stdout

    resumed = run_pipeline("load", "--source", dataset, "--limit", "4")
    assert resumed.returncode == 0
    assert resumed.stdout.startswith(f"Batch {held} is done: 4 recognitions")
    world.check(settings, (dataset, held, ids[:4]), (dataset, "other", ids[4:]))


def test_a_resumed_batch_needs_only_its_id_once_its_parameters_are_on_record(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = small_dataset(6)
    world.query(settings.database_url.reveal(), "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard < 0)")
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 3
    world.query(settings.database_url.reveal(), "ALTER TABLE raw.menus DROP CONSTRAINT never")
    assert run_pipeline("load", "--batch-id", "b1").returncode == 0
    world.check(settings, (dataset, "b1", None))


def test_a_transform_that_fails_leaves_neither_rows_nor_marker(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dsn = settings.database_url.reveal()
    world.query(dsn, "ALTER TABLE public.initial_tray_items ADD CONSTRAINT never CHECK (ordinal < 0)")
    failed = run_pipeline("load", "--source", small_dataset(6), "--batch-id", "b1")
    assert failed.returncode == 3
    found = world.counts(dsn)
    assert {name: found[name] for name in found if name.startswith("public.")} == dict.fromkeys(
        (f"public.{name}" for name in world.DOMAIN), 0
    )
    assert world.query(dsn, "SELECT count(*) FROM ingest.batch_state WHERE step = 'transform'") == [(0,)]
    assert world.query(dsn, "SELECT state FROM ingest.batches") == [("loading",)]
    world.query(dsn, "ALTER TABLE public.initial_tray_items DROP CONSTRAINT never")
    assert run_pipeline("load", "--source", small_dataset(6), "--batch-id", "b1").returncode == 0
    world.check(settings, (small_dataset(6), "b1", None))


@pytest.mark.parametrize("option", [("--limit", "3"), ("--force",), ("--source", "other")])
def test_the_same_id_with_other_parameters_is_refused(
    option: tuple[str, ...], run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = small_dataset(6)
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    arguments = [str(small_dataset(3, seed=9)) if value == "other" else value for value in option]
    source = [] if option[0] == "--source" else ["--source", str(dataset)]
    refused = run_pipeline("load", "--batch-id", "b1", *source, *arguments)
    assert refused.returncode == 4
    assert "Batch b1 was started with " in refused.stderr
    world.check(settings, (dataset, "b1", None))


def test_a_menu_is_stored_once_for_all_batches(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = small_dataset(12)
    for batch_id in ("b1", "b2", "b3"):
        assert run_pipeline("load", "--source", dataset, "--limit", "4", "--batch-id", batch_id).returncode == 0
    contents = {path.read_bytes() for path in dataset.rglob("*_AM.json")}
    menus = world.query(settings.database_url.reveal(), "SELECT count(*) FROM public.menus")
    assert menus == [(len(contents),)]
    world.check(settings, *((dataset, f"b{n + 1}", ids_of(dataset)[4 * n : 4 * n + 4]) for n in range(3)))


def test_prices_that_are_numbers_count_and_others_are_kept_as_they_are(
    run_pipeline: RunPipeline, own_dataset: MakeDataset, settings: Settings
) -> None:
    dataset = own_dataset(1)
    path = next(dataset.rglob("*_AM.json"))
    prices = ["12.50", "12,50", "по запросу", "1e3", True, None, -1, 1e3, "0", ""]
    menu = [{"ExternalId": f"{n}", "Name": f"n{n}", "Price": price} for n, price in enumerate(prices)]
    menu += [{"ExternalId": "none", "Name": "without"}]
    path.write_text("\ufeff" + json.dumps(menu, ensure_ascii=False), encoding="utf-8")
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    rows = world.query(
        settings.database_url.reveal(),
        "SELECT price::text, metadata FROM public.recognition_active_menu_items WHERE recognition_id = %s"
        " ORDER BY external_id",
        (*ids_of(dataset),),
    )
    assert rows == [
        ("12.50", {}),
        ("12.50", {"Price": "12,50"}),
        (None, {"Price": "по запросу"}),
        (None, {"Price": "1e3"}),
        (None, {"Price": True}),
        (None, {}),
        ("-1.00", {}),
        ("1000.00", {}),
        ("0.00", {"Price": "0"}),
        (None, {"Price": ""}),
        (None, {}),
    ]


def test_the_command_forgets_what_an_earlier_one_in_the_same_process_did(
    workdir: Path, small_dataset: MakeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", "--source", str(small_dataset(3)), "--batch-id", "one"]) == 0
    assert main(["load", "--source", str(small_dataset(3, seed=9)), "--batch-id", "two"]) == 0
    assert "Batch two is done: 3 recognitions" in capsys.readouterr().out
    assert "--batch-id two" in registry.resume_hint()


def test_an_unfinished_batch_of_another_bucket_is_not_resumed(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings
) -> None:
    dsn = settings.database_url.reveal()
    world.query(dsn, "ALTER TABLE raw.menus ADD CONSTRAINT never CHECK (shard < 0)")
    assert run_pipeline("load", "--source", small_dataset(6), "--limit", "3").returncode == 3
    world.query(dsn, "ALTER TABLE raw.menus DROP CONSTRAINT never")
    [(held,)] = world.query(dsn, "SELECT id FROM ingest.batches")
    other = {"STORAGE_BUCKET": f"{settings.bucket}-other"}
    with closing(Storage(replace(settings, bucket=other["STORAGE_BUCKET"]))) as storage:
        storage.ensure_bucket()
    assert run_pipeline("load", "--source", small_dataset(6), "--limit", "3", env=other).returncode == 0
    assert run_pipeline("load", "--source", small_dataset(6), "--limit", "3").returncode == 0
    buckets = dict(world.query(dsn, "SELECT id, bucket FROM ingest.batches WHERE state = 'done'"))
    assert buckets.pop(held) == settings.bucket
    assert list(buckets.values()) == [other["STORAGE_BUCKET"]]
    assert len(world.objects(settings)) == 6
