"""Loading annotations: its output, its memory, its Luigi tasks, and what happens between its steps."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Settings
from pipeline.database import Database
from pipeline.dataset.annotations import ANNOTATIONS
from pipeline.errors import HeldError
from pipeline.steps.annotations import stage_annotations
from tests import annotating, world
from tests.annotating import (
    Annotate,
    Done,
    Run,
    annotated,
    break_transforms,
    ids_of,
    key_of,
    markers,
    of,
    read,
    value_of,
    write,
)
from tests.services import MakeDataset, RunLuigi, RunPipeline, Start, after_target
from tests.test_luigi import as_first, finish, first_line, told

BARE = ("luigi", "--module", "pipeline", "LoadQwen")
#: Where discovery calls what reads the file.
STAGE = "pipeline.steps.discover.stage_annotations"


run = annotating.run
dsn = annotating.dsn


# What it says


def test_json_tells_the_same_and_status_keeps_it(run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    dataset = small_dataset(6, broken=True)
    assert run("load", "--source", dataset, "--batch-id", "b1", "--max-rejects", "100%").code == 0
    told = run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1", "--json")
    assert told.code == 0
    loaded = json.loads(told.out)
    assert loaded.pop("failures") == []
    kept = json.loads(run("status", "--batch-id", "q1", "--json").out)
    assert loaded == kept
    detections = len(world.domain(dsn).annotations)
    assert (kept["kind"], kept["state"], kept["force"]) == ("qwen", "done", False)
    assert kept["source"] == str((dataset / ANNOTATIONS).resolve())
    assert (kept["recognitions_processed"], kept["images_processed"]) == (6, 11)
    assert kept["detections_processed"] == detections > 0
    assert "bytes_uploaded" not in kept
    assert set(kept["throughput"]) == {"recognitions_processed", "images_processed", "detections_processed"}
    assert kept["throughput"]["detections_processed"]["count"] == detections
    once = ("annotation_key", "box_outside", "json_shape", "label_unknown", "recognition_unknown")
    assert kept["rejects"] == {**dict.fromkeys(once, 1), "box_malformed": 4}
    assert kept["operations"]["db_bulk_copy"]["ops"] == 1
    assert {"transform_tray_items", "transform_annotations"} <= set(kept["operations"])
    assert "storage_upload" not in kept["operations"]


def test_photos_whose_recognition_is_not_loaded_are_in_the_file(run: Run, own_dataset: MakeDataset, dsn: str) -> None:
    dataset = own_dataset(4)
    assert run("load", "--source", dataset, "--batch-id", "b1", "--limit", "1").code == 0
    arguments = ("load-qwen", "--file", dataset / ANNOTATIONS, "--max-rejects", "100%", "--json")
    assert json.loads(run(*arguments).out)["found"] == 8
    assert json.loads(run(*arguments).out)["found"] == 8  # of a look that made no batch


def test_the_numbers_are_told_as_text_and_kept(run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    dataset = small_dataset(6)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    done = run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1")
    detections = len(world.domain(dsn).annotations)
    assert "\nPerformance Metrics:\n  Total time: " in done.out
    for pattern in (
        r"    recognitions_processed: 6 \(\d+\.\d/s\)",
        r"    images_processed: 12 \(\d+\.\d/s\)",
        rf"    detections_processed: {detections} \(\d+\.\d/s\)",
        r"    db_bulk_copy: 1 op, avg \d+\.\d\d ms, total \d+\.\d\d s",
    ):
        assert re.search(f"^{pattern}$", done.out, re.MULTILINE)
    assert "bytes_uploaded" not in done.out
    assert run("status", "--batch-id", "q1").out == done.out
    [row] = world.query(
        dsn, "SELECT recognitions, photos, detections, metrics ->> 'state' FROM ingest.batches WHERE id = 'q1'"
    )
    assert row == (6, 12, detections, "done")


def test_what_failed_is_told_as_json(run: Run, small_dataset: MakeDataset, dsn: str) -> None:
    dataset = small_dataset(3)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    break_transforms(dsn)
    failed = run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1", "--json")
    assert failed.code == 3
    told = json.loads(failed.out)
    assert told["state"] == "loading"
    [failure] = [one for one in told["failures"] if one["task"].startswith("TransformQwen(")]
    assert failure["error"] == "DataError"


MEASURED = """
import sys
from pipeline.cli import main
code = main(sys.argv[1:])
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM:")), file=sys.stderr)
raise SystemExit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_stays_bounded_whatever_the_values_hold(
    run: Run, start: Start, small_dataset: MakeDataset, settings: Settings, tmp_path: Path
) -> None:
    dataset = small_dataset(6)
    ids = ids_of(dataset)
    nested = "[" * 90 + "]" * 90
    large = f"[{','.join([nested] * ((5 << 19) // len(nested)))}]"
    wrong = '{"dishes": {"qwen_detections": [' + "0," * 500_000 + "0]}}"
    kept = {key_of(ids[4]): value_of("dish_0", "plate"), key_of(ids[5], "Qualifying"): value_of("plate")}
    entries = [("nobody.jpg", large), *((key_of(number), large) for number in ids[:2]), (key_of(ids[2]), wrong)]
    entries += [(key, json.dumps(value)) for key, value in kept.items()]
    file = tmp_path / "a.json"
    file.write_text("{" + ",\n".join(f'"{key}": {value}' for key, value in entries) + "}", encoding="utf-8")
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    measured = start(sys.executable, "-c", MEASURED, "load-qwen", "--file", file, "--batch-id", "q1")
    code, _, stderr = finish(measured)
    assert code == 0
    assert int(after_target(stderr)) < 250_000
    world.check(settings, (dataset, "b1", None), qwen=write(tmp_path / "kept.json", kept))


class Failing(io.FileIO):
    """A file whose rest cannot be read."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size) or self.fail()

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(size) or self.fail()

    def fail(self) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("start", ["", "{", '{"a": 1}\n', "\x1f\x8b"])
def test_a_file_that_stops_being_readable_is_named(
    run: Run, small_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start: str
) -> None:
    dataset = small_dataset(1)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    file = tmp_path / "a.json"
    file.write_bytes(start.encode("latin-1"))
    monkeypatch.setattr("pipeline.steps.annotations._opened", Failing)
    failed = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert failed.code == 3
    assert f"The annotations file {file} cannot be read: Input/output error." in failed.err
    assert "Restore it" in failed.err


# Luigi


def test_the_bare_command_and_ours_are_one_engine(
    run: Run, run_luigi: RunLuigi, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(6)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    arguments = ("--file", file, "--batch-id", "q1", "--local-scheduler")
    first = told(run_luigi(*BARE, *arguments))
    assert (first[0], after_target(first[2])) == (0, "")
    assert first[1].startswith("Batch q1 is done: 6 recognitions, 12 photos, ")
    assert "Performance Metrics:" in first[1]
    again = told(run_luigi(*BARE, *arguments))
    assert (again[0], as_first(again[1]), again[2]) == (0, first_line(first[1]), first[2])
    assert run("load-qwen", *arguments) == Done(again[0], again[1], after_target(again[2]))
    world.check(settings, (dataset, "b1", None), qwen=file)
    code, stdout, stderr = told(run_luigi(*BARE, *arguments, "--force"))
    assert (code, stdout) == (40, "")
    assert "Error: Batch q1 was started with no --force." in stderr


def test_several_workers_are_accepted(
    run: Run, run_pipeline: RunPipeline, small_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = small_dataset(12)
    file = dataset / ANNOTATIONS
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    done = run_pipeline("load-qwen", "--file", file, "--batch-id", "q1", "--workers", "3")
    assert (done.returncode, after_target(done.stderr)) == (0, "")
    assert markers(dsn) == [("copy", 1), ("discover", 0), ("load", 0), ("transform", 0)]
    world.check(settings, (dataset, "b1", None), qwen=file)


# Step by step: what only happens in between


@pytest.fixture
def dataset(run: Run, own_dataset: MakeDataset) -> Path:
    """A dataset of six recognitions that batch b1 has loaded."""
    dataset = own_dataset(6)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    return dataset


@pytest.fixture
def annotate(dataset: Path, settings: Settings, database: Database) -> Annotate:
    return Annotate(settings, database, dataset / ANNOTATIONS)


def raw_photos(dsn: str, batch_id: str) -> set[tuple[int, int]]:
    """Return (recognition, camera) of the detections of a batch in the schema raw."""
    rows = world.query(dsn, "SELECT recognition_id, camera_number FROM raw.detections WHERE batch_id = %s", (batch_id,))
    return set(rows)


def test_discovery_copies_the_detections_with_its_marker(annotate: Annotate, dataset: Path, dsn: str) -> None:
    found = annotate.discover()
    assert (found.recognitions, found.photos, found.shards) == (6, 12, 1)
    assert raw_photos(dsn, "q1") == {(number, camera) for number in ids_of(dataset) for camera in (1, 2)}
    assert markers(dsn) == [("copy", 1), ("discover", 0)]


def test_only_chosen_photos_are_copied(
    annotate: Annotate, dataset: Path, settings: Settings, database: Database, dsn: str, tmp_path: Path
) -> None:
    ids = ids_of(dataset)
    held = write(tmp_path / "held.json", of(read(annotate.file), ids[:1]))
    Annotate(settings, database, held).discover("q0")
    done = Annotate(settings, database, write(tmp_path / "done.json", of(read(annotate.file), ids[1:2])))
    done.discover("q-done")
    done.transform("q-done")
    mixed = {
        **of(read(annotate.file), ids[:2]),
        key_of(ids[2], export="export_1"): value_of("dish_0", "dish_1", "plate"),
        key_of(ids[2], export="export_2"): value_of("plate"),
        key_of(999_999_999): value_of("plate"),
        key_of(ids[3]): [],
    }
    found = Annotate(settings, database, write(tmp_path / "mixed.json", mixed)).discover()
    assert (found.recognitions, found.already_loaded, found.held_elsewhere, found.superseded_copies) == (1, 2, 2, 1)
    assert world.query(dsn, "SELECT recognition_id, label FROM raw.detections WHERE batch_id = 'q1'") == [
        (ids[2], "plate")
    ]


def test_a_batch_of_rejects_alone_has_no_shard(annotate: Annotate, dsn: str) -> None:
    write(annotate.file, {key_of(999_999_999): value_of("plate")})
    found = annotate.discover()
    assert (found.recognitions, found.shards) == (0, 0)
    assert markers(dsn) == [("discover", 0)]
    with pytest.raises(HeldError, match=r"No photo of .* can be used \(1 rejected\)"):
        annotate.transform()
    assert markers(dsn) == [("discover", 0)]


def test_a_copy_that_fails_leaves_nothing_and_the_file_is_read_again(
    run: Run, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    file = dataset / ANNOTATIONS
    before = world.counts(dsn)
    world.query(dsn, "ALTER TABLE raw.detections ADD CONSTRAINT never CHECK (detection < 0)")
    failed = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert failed.code == 3
    assert "Traceback" not in failed.err
    assert world.counts(dsn) == before
    assert markers(dsn) == []
    world.query(dsn, "ALTER TABLE raw.detections DROP CONSTRAINT never")
    changed = write(file, {key: value_of("plate") for key in read(file)})
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    world.check(settings, (dataset, "b1", None), qwen=changed)


def test_a_file_that_changes_after_discovery_changes_nothing(
    annotate: Annotate, dataset: Path, settings: Settings, tmp_path: Path
) -> None:
    kept = write(tmp_path / "kept.json", read(annotate.file))
    annotate.discover()
    annotate.file.write_bytes(b"{}")
    annotate.transform()
    world.check(settings, (dataset, "b1", None), qwen=kept)


def test_a_file_that_vanished_before_discovery_is_one_sentence_and_nothing_is_written(
    run: Run, dataset: Path, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = dataset / ANNOTATIONS

    def vanish(*arguments: Any, **options: Any) -> str:
        file.unlink()
        return stage_annotations(*arguments, **options)

    monkeypatch.setattr(STAGE, vanish)
    failed = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert failed.code == 3
    assert "cannot be read: No such file or directory" in failed.err
    assert world.query(dsn, "SELECT id FROM ingest.batches") == [("b1",)]


def test_what_another_discovery_took_meanwhile_is_told(
    annotate: Annotate, dataset: Path, settings: Settings, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(dataset)
    part = write(tmp_path / "part.json", of(read(annotate.file), ids[:4]))

    def stage_and_lose(*arguments: Any, **options: Any) -> str:
        monkeypatch.setattr(STAGE, stage_annotations)
        held_reason = stage_annotations(*arguments, **options)
        with closing(Database(settings)) as other:
            Annotate(settings, other, part).discover("q0")
        return held_reason

    monkeypatch.setattr(STAGE, stage_and_lose)
    found = annotate.discover()
    assert (found.recognitions, found.held_elsewhere, found.held_by) == (2, 8, ["q0"])
    assert world.query(dsn, "SELECT held_elsewhere, held_by FROM ingest.batches WHERE id = 'q1'") == [(8, ["q0"])]
    annotate.transform()
    assert annotated(dsn) == set(ids[4:])


@pytest.mark.parametrize("force", [False, True])
def test_what_another_batch_annotated_meanwhile_is_skipped_unless_forced(
    force: bool, annotate: Annotate, dataset: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ids = ids_of(dataset)
    part = write(tmp_path / "part.json", of(read(annotate.file), ids[:4]))

    def stage_and_lose(*arguments: Any, **options: Any) -> str:
        monkeypatch.setattr(STAGE, stage_annotations)
        held_reason = stage_annotations(*arguments, **options)
        with closing(Database(settings)) as other:
            faster = Annotate(settings, other, part)
            faster.discover("q0")
            faster.transform("q0")
        return held_reason

    monkeypatch.setattr(STAGE, stage_and_lose)
    found = annotate.discover(force=force)
    assert (found.recognitions, found.already_loaded) == ((6, 0) if force else (2, 8))
    annotate.transform()
    world.check(settings, (dataset, "b1", None), qwen=annotate.file)


def test_a_batch_whose_recognitions_were_reset_meanwhile_annotates_them_when_they_are_back(
    run: Run, annotate: Annotate, dataset: Path, settings: Settings, dsn: str
) -> None:
    annotate.discover()
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    annotate.transform()
    assert world.domain(dsn).annotations == []
    assert run("load", "--source", dataset, "--batch-id", "b2").code == 0
    world.check(settings, (dataset, "b2", None), qwen=annotate.file)


def test_a_transform_that_fails_leaves_neither_rows_nor_marker(
    run: Run, dataset: Path, settings: Settings, dsn: str
) -> None:
    file = dataset / ANNOTATIONS
    before = world.dump(dsn)
    world.query(dsn, "ALTER TABLE public.initial_annotations ADD CONSTRAINT never CHECK (detection < 0)")
    failed = run("load-qwen", "--file", file, "--batch-id", "q1")
    assert failed.code == 3
    assert "Traceback" not in failed.err
    assert world.dump(dsn) == before
    assert markers(dsn) == [("copy", 1), ("discover", 0)]
    world.query(dsn, "ALTER TABLE public.initial_annotations DROP CONSTRAINT never")
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    world.check(settings, (dataset, "b1", None), qwen=file)
