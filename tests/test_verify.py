"""Verify: each difference between manifest, tables and bucket is reported and repaired."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from embedded_supabase.ports import free_port
from pipeline.config import Settings
from pipeline.storage import Storage
from tests import reset_support, verify_support, world
from tests.reset_support import Command, Done, LoadBatch, fail_at, stop_failing
from tests.services import MakeDataset, environment_file
from tests.verify_support import KINDS, Bucket, flip, photo_of, put_fewer_bytes, put_stranger, totals

command = reset_support.command
dsn = reset_support.dsn
load = reset_support.load
stored = verify_support.stored


def equal(keys: Sequence[str]) -> str:
    return "".join(f"= {key}\n" for key in sorted(keys))


# As it should be


def test_a_sound_database_and_bucket_are_equal_in_the_order_of_the_keys(
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "3")
    dataset = small_dataset(10, first_id=95)  # 100 sorts before 95
    load(dataset, "b1")
    load(dataset, "q1", qwen=True)
    # Ids that sort otherwise with a slash after them than without, or otherwise in another collation.
    for seed, batch_id in enumerate(("b1-a", "b1.a", "b10", "B1", "b_1"), 1):
        load(small_dataset(2, seed=seed), batch_id)
    load(dataset, "b0", "--force", "--limit", "4")
    load(small_dataset(2, seed=9), "gone")
    assert command("reset", "--batch-id", "gone", "--confirm").code == 0
    keys = list(world.objects(settings))
    assert keys == sorted(keys)
    assert len(keys) == 48
    for options in ((), ("--deep",), ("--repair",)):
        done = command("verify", *options)
        assert (done.code, done.err) == (0, "")
        wanted = equal(keys) + totals(settings, equal=48)
        assert done.out == wanted + ("Repaired: 0; remaining: 0.\n" if options == ("--repair",) else "")
    assert command("verify", "--quiet") == Done(0, totals(settings, equal=48), "")
    counts = {**dict.fromkeys(KINDS, 0), "equal": 48}
    assert json.loads(command("verify", "--json").out) == {
        "bucket": settings.bucket,
        "unfinished": [],
        "elsewhere": {},
        "differences": [],
        "totals": counts,
        "repaired": 0,
        "remaining": 0,
        "not_mended": [],
    }
    for batch_id, count in (("b1", 20), ("b1-a", 4), ("B1", 4), ("b0", 8)):
        done = command("verify", "--batch-id", batch_id)
        assert done.out == equal([key for key in keys if key.startswith(f"{batch_id}/")]) + totals(
            settings, equal=count
        )
        assert done.code == 0


def test_before_the_first_load_there_is_nothing_that_differs(command: Command, settings: Settings) -> None:
    assert command("verify") == Done(0, totals(settings), "")
    assert command("verify", "--repair").code == 0


@pytest.mark.slow
def test_many_pages_and_many_shards_are_merged_without_a_slip(
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIPELINE_BATCH_SIZE", "1")
    dataset = small_dataset(10, first_id=95)
    load(dataset, "b1")
    load(dataset, "b2", "--force")
    keys = stored.listed()
    assert len(keys) == 40
    monkeypatch.setattr("pipeline.storage.PAGE", 3)
    monkeypatch.setattr("pipeline.steps.verify.PAGE", 2)
    assert command("verify") == Done(0, equal(keys) + totals(settings, equal=40), "")
    lost = keys[::3]
    names = (
        "a/recognitions/1",
        "b1/recognitions/0",
        "b1/recognitions/999",
        "b2/recognitions/1039",
        "zz/recognitions/1",
    )
    strangers = [f"{name}/camera2.jpg" for name in names]
    foreign = ["a", "b1/recognitions/100/thumbnail.jpg", "b1/zz"]  # of others, and of no concern here
    stored.remove(*lost)
    for key in (*strangers, *foreign):
        stored.put(key, b"1")
    done = command("verify")
    assert done.code == 5
    told = [line.split() for line in done.out.splitlines()[:-1]]
    assert [line[1] for line in told] == sorted([*keys, *strangers])
    assert [line[1] for line in told if line[0] == "-"] == lost
    assert [line[1] for line in told if line[0] == "+"] == strangers
    assert command("verify", "--repair", "--quiet").code == 0
    assert stored.listed() == sorted([*keys, *foreign])
    assert command("verify") == Done(0, equal(keys) + totals(settings, equal=40), "")


# Each kind of difference


@dataclass(frozen=True)
class Plant:
    """A difference: what makes it of which key, and how its line goes on."""

    key: str
    make: Callable[[Bucket, str], None]
    sign: str
    kind: str
    message: str
    deep: bool = False

    def line(self) -> str:
        return f"{self.sign} {self.key} {self.kind}: {self.message}\n"


def put_other_bytes(bucket: Bucket, key: str) -> None:
    bucket.put(key, bytes(reversed(bucket.read(key))))


def plants(dataset: Path) -> list[Plant]:
    """Return some of each kind; `b1` and `b2` are versions of the dataset, `b0` was reset."""
    first, *_, last = sorted(world.folders(dataset))
    shown, other = (f"b2/recognitions/{first}/camera{camera}.jpg" for camera in (1, 2))
    former = f"b1/recognitions/{last}/camera2.jpg"
    whole = photo_of(dataset, other).stat().st_size
    stranger = "5 bytes, of no batch on record"
    unnamed = "5 bytes, that no row names"
    return [
        Plant(shown, Bucket.remove, "-", "dangling", "readers see its row, and there is no object"),
        Plant(former, Bucket.remove, "-", "missing", "the object of a version that a later one superseded"),
        Plant(other, put_fewer_bytes, "*", "damaged", f"{whole - 1} bytes instead of {whole}"),
        Plant(other, put_other_bytes, "*", "damaged", "its MD5 differs"),
        Plant(other, flip, "*", "damaged", f"its content differs, {whole} bytes", deep=True),
        Plant("0/recognitions/1/camera2.jpg", put_stranger, "+", "orphan", stranger),
        Plant("b/recognitions/1/camera1.jpg", put_stranger, "+", "orphan", stranger),
        Plant("zz/recognitions/9/camera2.jpg", put_stranger, "+", "orphan", stranger),
        Plant("b1/recognitions/1/camera1.jpg", put_stranger, "+", "orphan", unnamed),
        Plant(f"b2/recognitions/{last}9/camera2.jpg", put_stranger, "+", "orphan", unnamed),
        Plant("b2/recognitions/2/camera2.jpg", put_stranger, "+", "orphan", unnamed),
        Plant("b0/recognitions/1/camera1.jpg", put_stranger, "+", "orphan", unnamed),
    ]


def test_each_kind_of_difference_is_told_by_its_line_and_mended(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    dataset = small_dataset(3)
    load(small_dataset(2, seed=9), "b0")
    assert command("reset", "--batch-id", "b0", "--confirm").code == 0
    load(dataset, "b1")
    load(dataset, "b2", "--force")
    sound = world.objects(settings)
    for plant in plants(dataset):
        plant.make(stored, plant.key)
        options = ("--deep",) if plant.deep else ()
        if plant.deep:
            assert command("verify").code == 0, plant
        found = command("verify", *options)
        lines = {**{key: f"= {key}\n" for key in sound}, plant.key: plant.line()}
        same = len(sound) - (plant.key in sound)
        wanted = "".join(lines[key] for key in sorted(lines)) + totals(settings, equal=same, **{plant.kind: 1})
        assert found == Done(5, wanted, "")
        quiet = plant.line() + totals(settings, equal=same, **{plant.kind: 1})
        objects, orphans = ("0 objects", "1 orphan") if plant.kind == "orphan" else ("1 object", "0 orphans")
        plan = f"Repair: {objects} to upload again, {orphans} to remove.\n"
        mended = command("verify", "--repair", "--quiet", *options)
        assert mended == Done(0, f"{quiet}{plan}Repaired: 1; remaining: 0.\n", "")
        assert world.objects(settings) == sound, plant
    assert command("verify", "--deep", "--quiet") == Done(0, totals(settings, equal=len(sound)), "")


def test_all_of_them_at_once_are_one_json_object(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket
) -> None:
    dataset = small_dataset(3)
    load(dataset, "b1")
    load(dataset, "b2", "--force")
    sound = world.objects(settings)
    chosen = {plant.key: plant for plant in plants(dataset)}
    del chosen["b0/recognitions/1/camera1.jpg"]
    for plant in chosen.values():
        plant.make(stored, plant.key)
    differences = [
        {"sign": plant.sign, "kind": plant.kind, "key": key, "message": plant.message}
        for key, plant in sorted(chosen.items())
    ]
    counts = {kind: sum(one["kind"] == kind for one in differences) for kind in KINDS}
    counts["equal"] = len(sound) - 3
    found = command("verify", "--deep", "--json")
    assert (found.code, found.err, found.out.count("\n")) == (5, "", 1)
    report = {
        "bucket": settings.bucket,
        "unfinished": [],
        "elsewhere": {},
        "differences": differences,
        "totals": counts,
    }
    assert json.loads(found.out) == {**report, "repaired": 0, "remaining": len(chosen), "not_mended": []}
    mended = command("verify", "--deep", "--repair", "--json")
    assert (mended.code, mended.err, mended.out.count("\n")) == (0, "", 1)
    assert json.loads(mended.out) == {**report, "repaired": len(chosen), "remaining": 0, "not_mended": []}
    assert world.objects(settings) == sound


def spoil_by_removal(file: Path) -> None:
    file.unlink()


def spoil_by_cutting(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [spoil_by_removal, spoil_by_cutting])
def test_an_object_that_is_listed_and_cannot_be_read_is_damaged(
    spoil: Callable[[Path], None],
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
) -> None:
    load(small_dataset(2), "b1")
    sound = world.objects(settings)
    first, *rest = sound
    spoil(stored.file(first))
    assert command("verify", "--quiet") == Done(0, totals(settings, equal=4), "")
    found = command("verify", "--deep")
    assert found.code == 5, found.err
    line, _, others = found.out.partition("\n")
    assert line.startswith(f"* {first} damaged: ")
    assert others == equal(rest) + totals(settings, equal=3, damaged=1)
    assert command("verify", "--deep", "--repair", "--quiet").code == 0
    assert world.objects(settings) == sound


@pytest.mark.parametrize("threads", [4, 1])
def test_deep_reads_several_objects_at_once_and_tells_them_in_order(
    threads: int,
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIPELINE_THREAD_COUNT", str(threads))
    load(small_dataset(4), "b1")
    keys = stored.listed()
    flip(stored, keys[2])
    together = threading.Barrier(threads)
    digest, begun = Storage.digest, set()

    def noted(self: Storage, key: str, most: int) -> tuple[int, str]:
        if key not in begun:  # what differs is read again
            begun.add(key)
            together.wait(30)  # breaks unless so many are under way at the same time
        return digest(self, key, most)

    monkeypatch.setattr(Storage, "digest", noted)
    done = command("verify", "--deep")
    assert [line.split()[:2] for line in done.out.splitlines()[:-1]] == [
        ["*" if key == keys[2] else "=", key] for key in keys
    ]
    assert done.code == 5


def test_a_service_that_is_away_is_no_difference(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, workdir: Path
) -> None:
    load(small_dataset(1), "b1")
    away = replace(
        settings, url=f"http://127.0.0.1:{free_port()}", tuning=replace(settings.tuning, retry_max_attempts=0)
    )
    text = environment_file(away) + "PIPELINE_RETRY_MAX_ATTEMPTS='0'\n"
    (workdir / ".env.local").write_text(text, encoding="utf-8")
    for options in ((), ("--repair",), ("--deep",)):
        done = command("verify", *options)
        assert (done.code, done.out) == (3, "")
        assert "cannot be reached" in done.err


# Which batches


@pytest.mark.slow
def test_unfinished_batches_are_left_out_and_named(
    command: Command,
    load: LoadBatch,
    small_dataset: MakeDataset,
    settings: Settings,
    stored: Bucket,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(small_dataset(1), "b1")
    load(small_dataset(2, seed=9), "b2")
    with monkeypatch.context() as patch:
        reset_support.stop_in_storage(patch)
        assert command("reset", "--batch-id", "b2", "--confirm").code == 3
    fail_at(dsn, "transform")
    assert command("load", "--source", small_dataset(1, seed=8), "--batch-id", "b3", "--local-scheduler").code == 3
    stop_failing(dsn)
    stored.remove(next(key for key in stored.listed() if key.startswith("b3/")))
    stored.put("b3/recognitions/1/camera1.jpg", b"under way")
    keys = stored.listed()
    assert {key.split("/")[0] for key in keys} == {"b1", "b2", "b3"}
    named = "Skipped, because they are unfinished: b2, b3.\n"
    wanted = equal(keys[:2]) + totals(settings, equal=2) + named
    assert command("verify") == Done(0, wanted, "")
    assert command("verify", "--repair") == Done(0, f"{wanted}Repaired: 0; remaining: 0.\n", "")
    assert json.loads(command("verify", "--json").out)["unfinished"] == ["b2", "b3"]
    assert stored.listed() == keys
    for batch_id, state_now in (("b2", "resetting"), ("b3", "loading")):
        for option in ("--quiet", "--repair", "--json"):
            done = command("verify", "--batch-id", batch_id, option)
            assert (done.code, done.out) == (3, "")
            assert f"Batch {batch_id} is {state_now}" in done.err


def test_one_batch_alone_is_looked_at_and_mended(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, stored: Bucket, dsn: str
) -> None:
    load(small_dataset(2), "b1")
    load(small_dataset(2, seed=9), "b10")
    load(small_dataset(1, seed=8), "b0")
    assert command("reset", "--batch-id", "b0", "--confirm").code == 0
    keys = stored.listed()
    lost = [keys[0], keys[-1]]
    stored.remove(*lost)
    extra = [
        "b0/recognitions/7/camera1.jpg",
        "b1/recognitions/7/camera1.jpg",
        "b10/recognitions/7/camera1.jpg",
        "stranger",
    ]
    for key in extra:
        put_stranger(stored, key)
    world.query(dsn, "UPDATE public.images SET width = 1 WHERE id IN (SELECT max(id) FROM public.images)")
    found = command("verify", "--batch-id", "b1", "--repair", "--quiet")
    assert found.code == 0
    assert found.out.startswith(
        f"- {lost[0]} dangling: readers see its row, and there is no object\n+ b1/recognitions/7/camera1.jpg orphan: "
    )
    assert totals(settings, equal=3, dangling=1, orphan=1) in found.out
    assert found.out.endswith("Repaired: 2; remaining: 0.\n")
    assert stored.listed() == sorted({*keys, *extra} - {lost[1], "b1/recognitions/7/camera1.jpg"})
    assert command("verify", "--batch-id", "b0", "--quiet").out.startswith("+ b0/recognitions/7/camera1.jpg orphan: ")
    found = command("verify", "--batch-id", "b10", "--quiet")
    assert (found.code, found.out.count("\n")) == (5, 4)
    assert found.out.endswith(totals(settings, equal=3, dangling=1, orphan=1, inconsistent=1))


def test_a_batch_that_is_not_there_is_wrong_usage(
    command: Command, load: LoadBatch, small_dataset: MakeDataset, settings: Settings, workdir: Path, dsn: str
) -> None:
    load(small_dataset(1), "b1")
    for batch_id in ("never", "", "../b1"):
        done = command("verify", "--batch-id", batch_id)
        assert (done.code, done.out) == (2, "")
        assert f"There is no batch {batch_id} " in done.err
    (workdir / ".env.local").write_text(environment_file(replace(settings, bucket="another")), encoding="utf-8")
    done = command("verify", "--batch-id", "b1")
    assert (done.code, "There is no batch b1 with objects in the bucket another." in done.err) == (2, True)
    world.forget_migrations(dsn, "20260102000200")
    done = command("verify")
    assert (done.code, "20260102000200_pipeline_versions" in done.err) == (2, True)
