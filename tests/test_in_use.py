"""What people work on stays as it is, and so does what no batch has on record; the rest of a batch goes on."""

from __future__ import annotations

import io
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.errors
import pytest
from PIL import Image

from embedded_supabase.postgres.server import EmbeddedPostgres
from pipeline.config import Settings
from pipeline.database import Connection, Database
from pipeline.database.migrate import migrate
from pipeline.errors import DatabaseUnavailable, RefusedError
from pipeline.steps import transform
from pipeline.steps.in_use import set_aside
from pipeline.steps.reset import reset_batch
from pipeline.storage import Storage
from tests import annotating, world
from tests.annotating import RECEIPT, Run, give_menu, give_receipt, ids_of, key_of, value_of, write
from tests.people import NOTES, WORK, People
from tests.services import MakeDataset, fresh_database
from tests.sweeps import sweep

run = annotating.run
dsn = annotating.dsn


@pytest.fixture(params=["app", pytest.param("own", marks=pytest.mark.slow)])
def project(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database_url(
    postgres_server: EmbeddedPostgres, template_database: str, app_template: str, project: str
) -> Iterator[str]:
    """A database of the app's, or an empty one with a table of others."""
    template = app_template if project == "app" else template_database
    with fresh_database(postgres_server.dsn, f"{project}_{uuid.uuid4().hex}", template) as url:
        if project != "app":
            world.query(url, NOTES)
        yield url


@pytest.fixture
def people(settings: Settings, database: Database, project: str) -> People:
    migrate(database)
    return People(settings.database_url.reveal(), project)


def changed(dataset: Path) -> list[int]:
    """Change the receipts of a dataset so that each loses its first line; return its recognitions."""
    for number in ids_of(dataset):
        give_receipt(dataset, number, RECEIPT[1:])
    return ids_of(dataset)


@pytest.fixture
def dataset(run: Run, people: People, own_dataset: MakeDataset) -> Path:
    """Three recognitions that were loaded as b1."""
    folder = own_dataset(3)
    for number in ids_of(folder):
        give_receipt(folder, number, RECEIPT)
    assert run("load", "--source", folder, "--batch-id", "b1").code == 0
    return folder


def notices(dsn: str, batch_id: str) -> list[tuple[Any, ...]]:
    """Return which recognitions a batch left as they are, the code and the step."""
    statement = """
        SELECT recognition_id, code, step FROM ingest.notices
        WHERE batch_id = %s AND code IN ('in_use', 'not_adopted') ORDER BY id"""
    return world.query(dsn, statement, (batch_id,))


def shown(dsn: str, numbers: list[int]) -> list[str]:
    rows = world.query(dsn, "SELECT batch_id FROM public.recognitions WHERE id = ANY (%s) ORDER BY id", (numbers,))
    return [batch_id for (batch_id,) in rows]


def files_of(dsn: str, dataset: Path, batch_id: str) -> dict[str, int]:
    """Return the files of a batch by class, which add up."""
    ((files,),) = world.query(dsn, "SELECT ingest.files_of(b) FROM ingest.batches b WHERE id = %s", (batch_id,))
    assert sum(files.values()) == sum(path.is_file() for path in dataset.rglob("*"))
    return {name: count for name, count in files.items() if count}


def rows_of(dsn: str, number: int) -> list[list[tuple[Any, ...]]]:
    """Return what the domain has of a recognition, ids included."""
    own = "WHERE recognition_id = {0}"
    lines = "WHERE recipe_id IN (SELECT id FROM public.recipes WHERE recognition_id = {0})"
    conditions = {
        "recognitions": "WHERE id = {0}",
        "images": own,
        "recipes": own,
        "recipe_lines": lines,
        "recipe_line_options": f"WHERE recipe_line_id IN (SELECT id FROM public.recipe_lines {lines})",
        "initial_tray_items": own,
        "initial_annotations": f"WHERE image_id IN (SELECT id FROM public.images {own})",
        "recognition_active_menu_items": own,
    }
    return [
        world.query(dsn, f"SELECT x.*::text FROM public.{name} x {condition.format(number)} ORDER BY 1")
        for name, condition in conditions.items()
    ]


def test_what_is_in_use_is_neither_sent_nor_changed(
    run: Run, people: People, dataset: Path, settings: Settings, dsn: str
) -> None:
    first, *others = changed(dataset)
    people.begin(first)
    before = rows_of(dsn, first)
    dry = run("load", "--source", dataset, "--batch-id", "b2", "--force", "--dry-run", "--json")
    assert (dry.code, json.loads(dry.out)["notices"]["in_use"]) == (0, 1)
    done = run("load", "--source", dataset, "--batch-id", "b2", "--force", "--json")
    assert done.code == 0, done.err
    assert notices(dsn, "b2") == [(first, "in_use", "discover")]
    summary = json.loads(done.out)
    assert summary["recognitions_processed"] == 2
    assert summary["operations"]["storage_upload"]["ops"] == 4
    assert rows_of(dsn, first) == before
    assert shown(dsn, ids_of(dataset)) == ["b1", "b2", "b2"]
    per_tray = sum(path.is_file() for path in world.folders(dataset)[first].rglob("*"))
    assert files_of(dsn, dataset, "b2")["not_taken"] == per_tray
    assert {key.split("/")[2] for key in world.objects(settings) if key.startswith("b2/")} == set(map(str, others))
    assert world.inconsistencies(settings) == []
    # An incremental load does not send it, a forced one does once it is free.
    assert run("load", "--source", dataset, "--batch-id", "b3").code == 0
    assert run("load", "--source", dataset, "--batch-id", "b4", "--force").code == 0
    assert notices(dsn, "b3") == []
    assert notices(dsn, "b4") == [(first, "in_use", "discover")]
    people.end(first)
    assert run("load", "--source", dataset, "--batch-id", "b5", "--force").code == 0
    assert notices(dsn, "b5") == []
    assert shown(dsn, ids_of(dataset)) == ["b5", "b5", "b5"]
    assert run("verify").code == 0


def test_work_that_the_new_version_keeps_does_not_stop_it(run: Run, people: People, dataset: Path, dsn: str) -> None:
    numbers = ids_of(dataset)
    for number in numbers:
        people.begin(number)
        give_receipt(dataset, number, [{"Count": 1, "Dishes": [{"Name": "Квас", "ExternalId": "9"}]}, *RECEIPT])
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    assert (notices(dsn, "b2"), shown(dsn, numbers)) == ([], ["b2"] * 3)


@pytest.mark.parametrize("step", ["discover", "transform"])
def test_what_is_in_use_alone_makes_no_batch(
    step: str, run: Run, people: People, dataset: Path, settings: Settings, dsn: str
) -> None:
    numbers = changed(dataset)
    for number in numbers[1:]:
        people.begin(number)
    if step == "discover":
        people.begin(numbers[0])
    else:
        people.begin_at("copy", numbers[0])
    before = [rows_of(dsn, number) for number in numbers]
    objects = world.objects(settings)
    done = run("load", "--source", dataset, "--batch-id", "b2", "--force")
    assert done.code == 0, done.err
    assert "Nothing to load:" in done.out
    assert world.query(dsn, "SELECT id FROM ingest.batches") == [("b1",)]
    assert sorted(notices(dsn, "b2"))[0] == (numbers[0], "in_use", step)
    assert sorted(number for number, *_ in notices(dsn, "b2")) == numbers
    assert [rows_of(dsn, number) for number in numbers] == before
    assert world.objects(settings) == objects
    assert world.inconsistencies(settings) == []
    again = run("load", "--source", dataset, "--batch-id", "b2", "--force")
    assert again.code == 0
    assert [rows_of(dsn, number) for number in numbers] == before


def test_rejects_beside_what_is_in_use_do_not_hold_the_batch(run: Run, people: People, dataset: Path, dsn: str) -> None:
    first, second, third = changed(dataset)
    people.begin(first)
    people.begin_at("upload", second)
    for number in (third,):
        next(world.folders(dataset)[number].rglob("*_Main.jpg")).unlink()
    done = run("load", "--source", dataset, "--batch-id", "b2", "--force")
    assert done.code == 0, done.err
    assert [(number, code) for number, code, _ in notices(dsn, "b2")] == [(first, "in_use"), (second, "in_use")]
    files = files_of(dsn, dataset, "b2")
    assert files["not_taken"] == 8
    assert "used" not in files


def test_annotations_that_people_work_on_stay_and_the_rest_goes_on(
    run: Run, people: People, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    first, second, _ = numbers = ids_of(dataset)
    cameras = ("Main", "Qualifying")
    values = {key_of(one, camera): value_of("dish_0", "dish_7", "plate") for one in numbers for camera in cameras}
    assert run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1").code == 0
    people.begin(first)
    before = rows_of(dsn, first)
    values = {key: value_of("dish_1") for key in values}
    bad = values[key_of(first)]["dishes"]["qwen_detections"]
    bad.append({"bbox_2d": [1, 1, 1, 1], "label": "dish_0"})
    done = run("load-qwen", "--file", write(tmp_path / "2.json", values), "--batch-id", "q2", "--force")
    assert done.code == 0, done.err
    assert notices(dsn, "q2") == [(first, "in_use", "transform")] * 2
    assert rows_of(dsn, first) == before
    labels = "SELECT a.label FROM public.initial_annotations a JOIN public.images i ON i.id = a.image_id"
    assert world.query(dsn, f"{labels} WHERE i.recognition_id = {second}") == [("dish_1",)] * 2
    assert world.inconsistencies(settings) == []
    assert run("reset", "--batch-id", "q2", "--confirm").code == 0
    assert rows_of(dsn, first) == before


@pytest.mark.parametrize("option", ["--changed", "--force"])
def test_another_photo_of_boxes_that_people_work_on_is_neither_sent_nor_shown(
    option: str, run: Run, people: People, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    first, second, third = numbers = ids_of(dataset)
    values = {key_of(one): value_of("dish_0", "dish_7") for one in numbers}
    values |= {key_of(one, "Qualifying"): value_of("dish_0") for one in numbers}
    assert run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1").code == 0
    for number in (first, second):
        people.begin(number)
        next(world.folders(dataset)[number].rglob("*_Main.jpg")).write_bytes(jpeg(number))
    next(world.folders(dataset)[third].rglob("*_Main.jpg")).write_bytes(jpeg(third))
    before = [rows_of(dsn, number) for number in (first, second)]
    assert run("load", "--source", dataset, "--batch-id", "b2", option).code == 0
    assert notices(dsn, "b2") == [(first, "in_use", "discover"), (second, "in_use", "discover")]
    assert shown(dsn, numbers) == ["b1", "b1", "b2"]
    assert [rows_of(dsn, number) for number in (first, second)] == before
    assert {key.split("/")[2] for key in world.objects(settings) if key.startswith("b2/")} == {str(third)}
    assert world.inconsistencies(settings) == []
    people.end(first)
    assert run("load", "--source", dataset, "--batch-id", "b3", option).code == 0
    assert shown(dsn, [first, second]) == ["b3", "b1"]
    boxes = "SELECT count(*) FROM public.initial_annotations a JOIN public.images i ON i.id = a.image_id"
    assert world.query(dsn, f"{boxes} WHERE i.recognition_id = {first}") == [(1,)]
    assert world.inconsistencies(settings) == []


@pytest.mark.parametrize("option", ["--changed", "--force"])
def test_what_the_model_saw_in_the_place_of_a_new_line_and_people_work_on_is_not_sent(
    option: str, run: Run, people: People, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    first, second, _ = numbers = ids_of(dataset)
    values = {key_of(one): value_of("dish_0", "dish_3", "plate") for one in numbers}
    assert run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1").code == 0
    for number in numbers:
        give_receipt(dataset, number, [*RECEIPT, {"Count": 1, "Dishes": [{"Name": "Сок", "ExternalId": "41"}]}])
    people.begin(first)
    before = rows_of(dsn, first)
    assert run("load", "--source", dataset, "--batch-id", "b2", option).code == 0
    assert notices(dsn, "b2") == [(first, "in_use", "discover")]
    assert (rows_of(dsn, first), shown(dsn, numbers)) == (before, ["b1", "b2", "b2"])
    assert world.inconsistencies(settings) == []
    people.end(first)
    assert run("load", "--source", dataset, "--batch-id", "b3", option).code == 0
    assert shown(dsn, [first, second]) == ["b3", "b3" if option == "--force" else "b2"]
    assert world.inconsistencies(settings) == []


def jpeg(number: int) -> bytes:
    """Return a photo of the size of the sample's, and of another size in bytes."""
    photo = io.BytesIO()
    Image.new("RGB", (160, 120), (number % 256, 9, 99)).save(photo, "JPEG")
    return photo.getvalue()


def test_annotations_are_done_where_all_photos_are_in_use(
    run: Run, people: People, dataset: Path, dsn: str, tmp_path: Path
) -> None:
    numbers = ids_of(dataset)
    values = {key_of(one): value_of("dish_7", "plate") for one in numbers}
    assert run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1").code == 0
    for number in numbers:
        people.begin(number)
    values = {key_of(one): value_of("dish_0") for one in numbers}
    done = run("load-qwen", "--file", write(tmp_path / "2.json", values), "--batch-id", "q2", "--force")
    assert done.code == 0, done.err
    assert notices(dsn, "q2") == [(number, "in_use", "transform") for number in numbers]


# Recognitions that no batch has on record


#: Its photos are in no bucket; those of a test that adopts them are moved to the keys of the older script.
SCRIPT = """
    INSERT INTO public.recognitions (id, batch_id) VALUES ({0}, 'batch_20250601_021500');
    INSERT INTO public.images (recognition_id, camera_number, storage_path, width, height)
    SELECT {0}, c, format('older/{0}/camera%s.jpg', c), 640, 480 FROM generate_series(1, 2) AS c;
    INSERT INTO public.recipes (recognition_id, raw_payload) VALUES ({0}, '[]');
    INSERT INTO public.recipe_lines (recipe_id, line_number, quantity, raw_name)
    SELECT id, 1, 1, 'soup' FROM public.recipes WHERE recognition_id = {0};
    INSERT INTO public.initial_tray_items (recognition_id, item_type, source, metadata)
    VALUES ({0}, 'PLATE', 'MODEL', '{{"qwen_label": "plate"}}')
"""

BOX = """
    INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, bbox)
    SELECT i.id, t.id, '{{"x": 1, "y": 2, "w": 3, "h": 4}}'
    FROM public.images i JOIN public.initial_tray_items t USING (recognition_id) WHERE i.recognition_id = {0}
"""


def script(dsn: str, number: int) -> None:
    """Load a recognition as another tool would."""
    world.query(dsn, SCRIPT.format(number))


def adopted_beside(run: Run, settings: Settings, dsn: str) -> None:
    """Let another tool load a recognition, and adopt it."""
    script(dsn, 7)
    moved = "UPDATE public.images SET storage_path = replace(storage_path, 'older/', 'recognitions/')"
    with closing(Storage(settings)) as storage:
        for (key,) in world.query(dsn, f"{moved} WHERE recognition_id = 7 RETURNING storage_path"):
            storage.upload(key, b"photo")
    assert run("adopt", "--confirm").code == 0


@pytest.mark.parametrize("options", [(), ("--force",)], ids=["incremental", "forced"])
def test_what_no_batch_has_on_record_is_neither_sent_nor_changed(
    options: tuple[str, ...], run: Run, people: People, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(3)
    first, *others = ids_of(dataset)
    script(dsn, first)
    before = rows_of(dsn, first)
    done = run("load", "--source", dataset, "--batch-id", "b1", *options)
    assert done.code == 0, done.err
    assert notices(dsn, "b1") == ([(first, "not_adopted", "discover")] if options else [])
    assert ("`python -m pipeline adopt`" in done.out + done.err) == bool(options)
    assert rows_of(dsn, first) == before
    assert {key.split("/")[2] for key in world.objects(settings)} == set(map(str, others))
    assert files_of(dsn, dataset, "b1")["not_taken" if options else "unchanged"] == 4
    assert world.inconsistencies(settings) == []
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    assert rows_of(dsn, first) == before


def test_a_forced_load_of_nothing_that_is_on_record_is_done(
    run: Run, people: People, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(3)
    for number in ids_of(dataset):
        script(dsn, number)
    done = run("load", "--source", dataset, "--batch-id", "b1", "--force")
    assert done.code == 0, done.err
    assert [code for _, code, _ in notices(dsn, "b1")] == ["not_adopted"] * 3
    assert world.objects(settings) == {}


@pytest.mark.parametrize("statement", [SCRIPT, "INSERT INTO public.recipes (recognition_id) VALUES ({0})"])
@pytest.mark.parametrize("options", [(), ("--force",)], ids=["incremental", "forced"])
def test_what_another_tool_inserts_during_a_load_is_not_written_over(
    statement: str,
    options: tuple[str, ...],
    run: Run,
    people: People,
    own_dataset: MakeDataset,
    settings: Settings,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = own_dataset(3)
    first, *others = ids_of(dataset)
    monkeypatch.setitem(WORK, people.project, (statement, ""))
    people.begin_at("upload", first)
    done = run("load", "--source", dataset, "--batch-id", "b1", *options)
    assert done.code == 0, done.err
    assert notices(dsn, "b1") == [(first, "not_adopted", "transform")]
    assert files_of(dsn, dataset, "b1")["not_taken"] == 4
    assert {key.split("/")[2] for key in world.objects(settings)} == set(map(str, others))
    found = world.query(dsn, "SELECT batch_id FROM public.recognitions WHERE id = %s", (first,))
    assert found == ([("batch_20250601_021500",)] if statement is SCRIPT else [])
    # Later loads pass over it.
    assert run("load", "--source", dataset, "--batch-id", "b2").code == 0
    assert {key.split("/")[0] for key in world.objects(settings)} == {"b1"}
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    assert world.query(dsn, "SELECT count(*) FROM public.recipes WHERE recognition_id = %s", (first,)) == [(1,)]


def test_a_recognition_inserted_while_its_batch_commits_is_found_by_the_next_attempt(
    run: Run, people: People, own_dataset: MakeDataset, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = own_dataset(2)
    first, second = ids_of(dataset)
    inserted: list[int] = []
    original = Database.run

    def watched(database: Database, work: Callable[..., Any], *values: Any, **options: Any) -> Any:
        """Insert once, between the plan and the publication."""

        def wrapped(connection: Any) -> Any:
            execute = connection.execute

            def one(name: str, /, **parameters: object) -> Any:
                if name == "transform_batch" and not inserted:
                    inserted.append(first)
                    script(dsn, first)
                return execute(name, **parameters)

            connection.execute = one
            return work(connection)

        return original(database, wrapped, *values, **options)

    monkeypatch.setattr(Database, "run", watched)
    monkeypatch.setenv("PIPELINE_RETRY_BACKOFF_FACTOR", "1.01")
    before_and_after = run("load", "--source", dataset, "--batch-id", "b1")
    assert before_and_after.code == 0, before_and_after.err
    assert inserted == [first]
    assert notices(dsn, "b1") == [(first, "not_adopted", "transform")]
    assert shown(dsn, [first, second]) == ["batch_20250601_021500", "b1"]


@pytest.mark.parametrize("is_other", [False, True], ids=["unanswered", "another process"])
def test_objects_of_what_is_left_out_at_the_commit_go_whoever_left_it_out(
    run: Run,
    people: People,
    dataset: Path,
    settings: Settings,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    is_other: bool,
) -> None:
    first, *_ = changed(dataset)
    begun: list[str] = []
    remove = transform._remove_rejected
    commit = Connection.commit

    def removing(database: Database, storage: Storage, batch_id: str) -> None:
        remove(database, storage, batch_id)
        if not begun:
            people.begin(first)
            begun.append("work")
            if is_other:
                assert database.run(lambda connection: set_aside(connection, batch_id))

    def setting_aside(connection: Connection, batch_id: str) -> bool:
        is_any = set_aside(connection, batch_id)
        if is_any:
            begun.append("left out")
        return is_any

    def committing(connection: Connection) -> None:
        commit(connection)
        if begun[-1:] == ["left out"]:
            begun.append("unanswered")
            raise DatabaseUnavailable("The connection was lost.", "")

    monkeypatch.setattr(transform, "_remove_rejected", removing)
    monkeypatch.setattr(transform, "set_aside", setting_aside)
    monkeypatch.setattr(Connection, "commit", committing)
    monkeypatch.setenv("PIPELINE_RETRY_BACKOFF_FACTOR", "1.01")
    done = run("load", "--source", dataset, "--batch-id", "b2", "--force")
    assert done.code == 0, done.err
    assert begun == (["work"] if is_other else ["work", "left out", "unanswered"])
    assert notices(dsn, "b2") == [(first, "in_use", "transform")]
    assert [key for key in world.objects(settings) if key.startswith(f"b2/recognitions/{first}/")] == []
    assert world.inconsistencies(settings) == []


def test_objects_of_what_is_left_out_at_the_commit_are_not_believed_to_be_gone(
    run: Run, people: People, dataset: Path, settings: Settings, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = changed(dataset)

    def late(connection: Connection, batch_id: str) -> bool:
        people.begin(first)
        monkeypatch.setattr(transform, "set_aside", set_aside)
        return set_aside(connection, batch_id)

    monkeypatch.setattr(transform, "set_aside", late)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove", lambda _, keys: list(keys))
        failed = run("load", "--source", dataset, "--batch-id", "b2", "--force")
    assert failed.code == 3
    assert f"Storage still holds objects that it was asked to delete, b2/recognitions/{first}/" in failed.err
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    assert notices(dsn, "b2") == [(first, "in_use", "transform")]
    assert world.inconsistencies(settings) == []


@pytest.mark.parametrize("options", [(), ("--force",)], ids=["incremental", "forced"])
def test_photos_that_no_batch_has_on_record_get_no_boxes(
    options: tuple[str, ...],
    run: Run,
    people: People,
    dataset: Path,
    settings: Settings,
    dsn: str,
    tmp_path: Path,
) -> None:
    first, *_ = ids_of(dataset)
    script(dsn, 7)
    before = rows_of(dsn, 7)
    values = {
        key_of(one, camera): value_of("dish_0", "plate") for one in (7, first) for camera in ("Main", "Qualifying")
    }
    done = run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1", *options)
    assert done.code == 0, done.err
    assert notices(dsn, "q1") == [(7, "not_adopted", "discover")] * 2
    assert rows_of(dsn, 7) == before
    assert annotating.annotated(dsn) - {90001, 90002, 90003} == {first}
    # Nor do photos of nothing else hold a batch.
    alone = {key: value for key, value in values.items() if "recognition_7/" in key}
    done = run("load-qwen", "--file", write(tmp_path / "2.json", alone), "--batch-id", "q2", *options)
    assert done.code == 0, done.err
    assert "Nothing to load:" in done.out
    assert run("reset", "--batch-id", "q1", "--confirm").code == 0
    assert rows_of(dsn, 7) == before


def test_a_reset_leaves_what_another_tool_loaded_in_the_place_of_a_batch(
    run: Run, people: People, dataset: Path, dsn: str, tmp_path: Path
) -> None:
    first, *_ = ids_of(dataset)
    values = {key_of(first): value_of("dish_0", "plate")}
    assert run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1").code == 0
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    script(dsn, first)
    world.query(dsn, BOX.format(first))
    before = rows_of(dsn, first)
    assert run("reset", "--batch-id", "q1", "--confirm").code == 0
    assert rows_of(dsn, first) == before


@pytest.mark.parametrize("command", ["load --force", "load-qwen", "load-qwen beside adopted ones"])
def test_what_another_tool_loaded_anew_after_a_batch_is_left_to_it(
    command: str, run: Run, people: People, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    first, *others = changed(dataset)
    if "adopted" in command:
        adopted_beside(run, settings, dsn)
    world.query(dsn, f"DELETE FROM public.recognitions WHERE id = {first}")
    world.query(dsn, f"DELETE FROM public.recipes WHERE recognition_id = {first}")
    script(dsn, first)
    name, *options = command.partition(" beside")[0].split()
    if name == "load":
        world.query(dsn, BOX.format(first))
        arguments: tuple[str | Path, ...] = ("load", "--source", dataset)
    else:
        values = {key_of(one): value_of("dish_0", "plate") for one in (first, *others)}
        arguments = ("load-qwen", "--file", write(tmp_path / "1.json", values))
    before, objects = rows_of(dsn, first), world.objects(settings)
    done = run(*arguments, "--batch-id", "n1", *options)
    assert done.code == 0, done.err
    assert notices(dsn, "n1") == [(first, "not_adopted", "discover")]
    assert rows_of(dsn, first) == before
    assert {key for key in world.objects(settings).keys() - objects if f"/{first}/" in key} == set()
    assert world.query(dsn, "SELECT recognition_id FROM ingest.manifest WHERE batch_id = 'n1' ORDER BY 1") == [
        (number,) for number in others
    ]
    for batch_id in ("n1", "b1"):
        done = run("reset", "--batch-id", batch_id, "--confirm")
        assert done.code == 0, done.err
    assert rows_of(dsn, first) == before


def test_what_another_tool_loads_anew_during_load_qwen_is_left_to_it(
    run: Run, people: People, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    first, *_ = numbers = ids_of(dataset)
    adopted_beside(run, settings, dsn)
    values = {key_of(one): value_of("dish_0", "plate") for one in numbers}
    arguments = ("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1")
    assert run("discover", *arguments[1:]).code == 0
    world.query(dsn, f"DELETE FROM public.recognitions WHERE id = {first}")
    world.query(dsn, f"DELETE FROM public.recipes WHERE recognition_id = {first}")
    script(dsn, first)
    before = rows_of(dsn, first)
    assert run(*arguments).code == 0
    assert notices(dsn, "q1") == [(first, "not_adopted", "transform")]
    assert rows_of(dsn, first) == before


def test_a_recognition_whose_batch_id_the_app_changed_is_left_to_it_with_its_photos(
    run: Run, people: People, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    first, *_ = numbers = ids_of(dataset)
    world.query(dsn, "UPDATE public.recognitions SET batch_id = 'training' WHERE id = %s", (first,))
    before, objects = rows_of(dsn, first), world.objects(settings)
    values = {key_of(one): value_of("dish_0", "plate") for one in numbers}
    assert run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1").code == 0
    assert notices(dsn, "q1") == [(first, "not_adopted", "discover")]
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    assert notices(dsn, "b2") == [(first, "not_adopted", "discover")]
    assert run("reset", "--batch-id", "b2", "--confirm").code == 0
    told = run("reset", "--batch-id", "b1", "--dry-run")
    assert (told.code, f"name objects that would be deleted: {first}\n" in told.out) == (0, True)
    refused = run("reset", "--batch-id", "b1", "--confirm")
    assert (refused.code, f"name objects that would be deleted: {first}." in refused.err) == (4, True)
    with closing(Database(settings)) as database, pytest.raises(RefusedError, match=str(first)):
        reset_batch(database, settings, "b1")
    assert (rows_of(dsn, first), world.objects(settings)) == (before, objects)
    world.query(dsn, "UPDATE public.recognitions SET batch_id = 'b1' WHERE id = %s", (first,))
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    assert (shown(dsn, numbers), world.objects(settings)) == ([], {})


def test_photos_of_a_recognition_that_the_app_took_over_stay_while_it_may_get_them_back(
    run: Run, people: People, dataset: Path, settings: Settings, dsn: str
) -> None:
    first, *_ = numbers = ids_of(dataset)
    adopted_beside(run, settings, dsn)
    world.query(dsn, "UPDATE public.recognitions SET batch_id = 'training' WHERE id = %s", (first,))
    before, objects = rows_of(dsn, first), world.objects(settings)
    adopted = run("adopt", "--confirm")
    assert adopted.code == 0, adopted.err
    assert "batch training: 1 recognition\n  photos with a row and without an object: 0 " in adopted.out
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    assert shown(dsn, numbers) == ["b2"] * 3
    assert run("reset", "--batch-id", "b1", "--confirm").code == 4
    assert run("reset", "--batch-id", "b2", "--confirm").code == 0
    assert (rows_of(dsn, first), world.objects(settings)) == (before, objects)
    assert run("adopt", "--undo", "--confirm").code == 0


def test_a_batch_with_the_name_of_another_tool_takes_none_of_its_rows(
    run: Run, people: People, own_dataset: MakeDataset, dsn: str
) -> None:
    script(dsn, 7)
    before = rows_of(dsn, 7)
    assert run("load", "--source", own_dataset(2), "--batch-id", "batch_20250601_021500").code == 0
    assert run("reset", "--batch-id", "batch_20250601_021500", "--confirm").code == 0
    assert rows_of(dsn, 7) == before


def test_a_recognition_that_the_app_deleted_is_loaded_again_beside_its_receipt(
    run: Run, people: People, dataset: Path, settings: Settings, dsn: str
) -> None:
    first, *_ = numbers = ids_of(dataset)
    give_receipt(dataset, first, RECEIPT[1:])
    world.query(dsn, "DELETE FROM public.recognitions WHERE id = %s", (first,))
    done = run("load", "--source", dataset, "--batch-id", "b2")
    assert (done.code, notices(dsn, "b2")) == (0, [])
    assert shown(dsn, numbers) == ["b2", "b1", "b1"]
    lines = (
        "SELECT count(*) FROM public.recipe_lines JOIN public.recipes p ON p.id = recipe_id WHERE recognition_id = %s"
    )
    assert world.query(dsn, lines, (first,)) == [(len(RECEIPT) - 1,)]
    assert world.inconsistencies(settings) == []


def test_an_item_of_another_tool_on_a_line_of_ours_is_not_deleted_and_stops_nothing_else(
    run: Run, people: People, dataset: Path, settings: Settings, dsn: str
) -> None:
    first, *others = changed(dataset)
    item = (
        "INSERT INTO public.initial_tray_items (recognition_id, item_type, source, recipe_line_option_id)"
        " SELECT recognition_id, item_type, source, recipe_line_option_id FROM public.initial_tray_items"
        " WHERE recipe_line_option_id IS NOT NULL AND recognition_id = %s"
    )
    foreign = "DELETE FROM public.initial_tray_items WHERE ordinal IS NULL AND recognition_id = %s"
    world.query(dsn, item, (first,))
    before = rows_of(dsn, first)
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    assert notices(dsn, "b2") == [(first, "in_use", "discover")]
    assert shown(dsn, [first, *others]) == ["b1", "b2", "b2"]
    assert rows_of(dsn, first) == before
    refused = run("reset", "--batch-id", "b1", "--confirm")
    assert (refused.code, "initial_tray_items" in refused.err) == (4, True)
    assert rows_of(dsn, first) == before
    world.query(dsn, foreign, (first,))
    assert run("load", "--source", dataset, "--batch-id", "b3", "--force").code == 0
    assert shown(dsn, [first, *others]) == ["b3"] * 3
    world.query(dsn, item, (first,))
    refused = run("reset", "--batch-id", "b3", "--confirm")
    assert (refused.code, "initial_tray_items" in refused.err) == (4, True)
    world.query(dsn, foreign, (first,))
    assert run("reset", "--batch-id", "b3", "--confirm").code == 0
    assert shown(dsn, [first, *others]) == ["b1", "b2", "b2"]
    assert world.inconsistencies(settings) == []


# Lines, options and items that people edited


def line_of(dsn: str, number: int, name: str) -> tuple[int, int]:
    """Return the ids of a receipt line and of its option with this name."""
    found = world.query(
        dsn,
        "SELECT l.id, o.id FROM public.recipe_line_options o JOIN public.recipe_lines l ON l.id = o.recipe_line_id"
        " JOIN public.recipes p ON p.id = l.recipe_id WHERE p.recognition_id = %s AND o.name = %s",
        (number, name),
    )
    return found[0][0], found[0][1]


ITEMS = """
    SELECT item_type::text, source::text, line_number, ordinal, recipe_line_id, recipe_line_option_id, id
    FROM public.initial_tray_items WHERE recognition_id = %s ORDER BY id"""
EDITS = {
    "quantity": "UPDATE public.recipe_lines SET quantity = 2 WHERE id = {line}",
    "name": "UPDATE public.recipe_line_options SET name = 'Хлеб ржаной' WHERE id = {option}",
    "option": "INSERT INTO public.recipe_line_options (recipe_line_id, external_id, name) VALUES ({line}, '99', 'x')",
    "line": "WITH l AS (INSERT INTO public.recipe_lines (recipe_id, line_number, quantity) SELECT recipe_id, 9, 1"
    " FROM public.recipe_lines WHERE id = {line} RETURNING id)"
    " INSERT INTO public.recipe_line_options (recipe_line_id, external_id, name) SELECT id, '500', 'x' FROM l",
    "no line": "DELETE FROM public.initial_tray_items WHERE recipe_line_option_id = {option};"
    "DELETE FROM public.recipe_lines WHERE id = {line}",
    "no item": "DELETE FROM public.initial_tray_items"
    " WHERE recognition_id = {number} AND line_number = 3 AND ordinal = 1",
    "type": "UPDATE public.initial_tray_items SET item_type = 'BOTTLE' WHERE recipe_line_option_id = {option}",
    "place": "UPDATE public.initial_tray_items i SET recipe_line_id = o.recipe_line_id, recipe_line_option_id = o.id,"
    " metadata = '{{}}' FROM public.recipe_line_options o JOIN public.recipe_lines l ON l.id = o.recipe_line_id"
    " JOIN public.recipes p ON p.id = l.recipe_id AND p.recognition_id = {number} AND o.name = 'Чай'"
    " WHERE i.recipe_line_option_id = {option}",
    "foreign item": "INSERT INTO public.initial_tray_items (recognition_id, item_type, source, recipe_line_option_id)"
    " VALUES ({number}, 'FOOD', 'RECIPE_LINE_OPTION', {option})",
}


@pytest.mark.parametrize("edit", sweep(zip(EDITS.values()), 4), ids=EDITS)
def test_annotations_leave_a_receipt_that_people_edited_as_it_is(
    edit: str, run: Run, people: People, dataset: Path, dsn: str, tmp_path: Path
) -> None:
    first, second, _ = ids_of(dataset)
    line, option = line_of(dsn, first, "Хлеб")
    world.query(dsn, edit.format(line=line, option=option, number=first))

    def receipt() -> list[list[tuple[Any, ...]]]:
        _, _, *rows = rows_of(dsn, first)
        items = world.query(dsn, f"SELECT * FROM ({ITEMS}) i WHERE source = 'RECIPE_LINE_OPTION'", (first,))
        return [*rows[:3], items]

    before = receipt()
    labels = ("dish_0", "dish_0", "dish_1", "dish_1", "dish_2", "dish_2", "dish_2", "plate")
    for name, left in (("q1", 10), ("q2", 30)):
        values = {key_of(one): value_of(*labels, left=left) for one in (first, second)}
        done = run("load-qwen", "--file", write(tmp_path / name, values), "--batch-id", name, "--changed")
        assert (done.code, notices(dsn, name)) == (0, []), done.err
        assert receipt() == before
        counts = Counter(row[0] for row in world.domain(dsn).annotations)
        assert (counts[first], counts[second]) == (len(labels), len(labels))
    for name in ("q2", "q1"):
        assert run("reset", "--batch-id", name, "--confirm").code == 0
        assert receipt() == before
    assert annotating.annotated(dsn) & {first, second} == set()


@pytest.mark.parametrize("edit", ["type", "place"])
def test_an_item_of_another_type_or_line_does_not_stop_a_batch(
    edit: str, run: Run, people: People, dataset: Path, settings: Settings, dsn: str, tmp_path: Path
) -> None:
    first, *others = ids_of(dataset)
    values = {key_of(first): value_of("dish_1", "dish_2")}
    assert run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1").code == 0
    line, option = line_of(dsn, first, "Хлеб")
    world.query(dsn, EDITS[edit].format(line=line, option=option, number=first))
    before, items = rows_of(dsn, first), world.query(dsn, ITEMS, (first,))
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    assert world.query(dsn, ITEMS, (first,)) == items
    if edit == "place":
        assert notices(dsn, "b2") == [(first, "in_use", "discover")]
        assert rows_of(dsn, first) == before
    else:
        assert notices(dsn, "b2") == []
    left = "b1" if edit == "place" else "b2"
    assert shown(dsn, [first, *others]) == [left, "b2", "b2"]
    # Nor where the line of the item goes.
    for number in (first, *others):
        give_receipt(dataset, number, [RECEIPT[0], RECEIPT[2]])
    assert run("load", "--source", dataset, "--batch-id", "b3", "--changed").code == 0
    # What is in use for the same reason is not told again.
    assert notices(dsn, "b3") == ([(first, "in_use", "discover")] if edit == "type" else [])
    assert shown(dsn, [first, *others]) == [left, "b3", "b3"]
    assert world.query(dsn, ITEMS, (first,)) == items
    assert world.dangling(settings) == []


def test_an_item_of_the_model_whose_type_people_changed_keeps_its_box(
    run: Run, people: People, dataset: Path, dsn: str, tmp_path: Path
) -> None:
    first, second, _ = ids_of(dataset)

    def annotate(name: str, *labels: str, left: float = 10) -> None:
        values = {key_of(one): value_of(*labels, left=left) for one in (first, second)}
        done = run("load-qwen", "--file", write(tmp_path / name, values), "--batch-id", name, "--force")
        assert done.code == 0, done.err

    annotate("q1", "dish_7", "plate")
    world.query(
        dsn,
        "UPDATE public.initial_tray_items SET item_type = 'BOTTLE' WHERE line_number = 8 AND recognition_id = %s",
        (first,),
    )
    items = world.query(dsn, ITEMS, (first,))
    boxes = (
        "SELECT a.bbox -> 'x', t.id FROM public.initial_annotations a JOIN public.initial_tray_items t"
        " ON t.id = a.initial_tray_item_id WHERE recognition_id = %s AND line_number = 8"
    )
    for name, left in (("q2", 10), ("q3", 30)):
        annotate(name, "dish_7", "plate", left=left)
        assert world.query(dsn, ITEMS, (first,)) == items
        assert world.query(dsn, boxes, (first,)) == [(left, items[-2][-1])]
    # Without a box, it still is what a person made of it.
    annotate("q4", "plate", left=50)
    assert notices(dsn, "q4") == [(first, "in_use", "transform")]
    assert world.query(dsn, ITEMS, (first,)) == items
    assert world.query(dsn, boxes, (second,)) == []


@pytest.mark.parametrize("project", ["app"], indirect=True)
def test_a_choice_that_the_new_menu_lacks_is_in_use(
    run: Run, people: People, own_dataset: MakeDataset, dsn: str
) -> None:
    dataset = own_dataset(3)
    first, second, third = ids_of(dataset)
    for number in (first, second, third):
        give_receipt(dataset, number, RECEIPT)
        give_menu(dataset, number, ["11", "12", "21", "31"])
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    line, option = line_of(dsn, first, "Щи")
    choice = (
        "UPDATE public.initial_tray_items SET recipe_line_option_id = %s, menu_item_external_id = '12'"
        " WHERE recipe_line_id = %s AND ordinal = 1"
    )
    world.query(dsn, choice, (option, line))
    before = rows_of(dsn, first)
    for number in (first, second):
        give_menu(dataset, number, ["11", "21", "31"])
    done = run("load", "--source", dataset, "--batch-id", "b2", "--changed")
    assert done.code == 0, done.err
    assert [(number, code) for number, code, _ in notices(dsn, "b2")] == [(first, "in_use")]
    assert shown(dsn, [first, second, third]) == ["b1", "b2", "b1"]
    assert rows_of(dsn, first) == before


def test_an_item_of_the_model_that_people_gave_an_option_that_goes_is_in_use(
    run: Run, people: People, dataset: Path, dsn: str, tmp_path: Path
) -> None:
    first, second, third = ids_of(dataset)
    values = {key_of(one): value_of("dish_0", "dish_7", "plate") for one in (first, second)}
    assert run("load-qwen", "--file", write(tmp_path / "1.json", values), "--batch-id", "q1").code == 0
    _, option = line_of(dsn, first, "Хлеб")
    another, _ = line_of(dsn, second, "Хлеб")
    chosen = "UPDATE public.initial_tray_items SET {} = %s WHERE recognition_id = %s AND line_number = 8"
    world.query(dsn, chosen.format("recipe_line_option_id"), (option, first))
    world.query(dsn, chosen.format("recipe_line_id"), (another, second))
    before = [rows_of(dsn, number) for number in (first, second)]
    for number in (first, second, third):
        give_receipt(dataset, number, [RECEIPT[0], RECEIPT[2]])
    done = run("load", "--source", dataset, "--batch-id", "b2", "--changed")
    assert done.code == 0, done.err
    assert notices(dsn, "b2") == [(first, "in_use", "discover"), (second, "in_use", "discover")]
    assert [rows_of(dsn, number) for number in (first, second)] == before
    assert shown(dsn, [first, second, third]) == ["b1", "b1", "b2"]


@pytest.mark.parametrize("ambiguity", ["true", "false", "NULL"])
def test_a_choice_counts_whatever_has_ambiguity_says(
    ambiguity: str, run: Run, people: People, dataset: Path, dsn: str
) -> None:
    first, *others = ids_of(dataset)
    line, option = line_of(dsn, first, "Щи")
    world.query(
        dsn,
        f"UPDATE public.recipe_lines SET has_ambiguity = {ambiguity} WHERE id = {line};"
        f"UPDATE public.initial_tray_items SET recipe_line_option_id = {option}"
        f" WHERE recipe_line_id = {line} AND ordinal = 1",
    )
    before = rows_of(dsn, first)
    changed(dataset)
    done = run("load", "--source", dataset, "--batch-id", "b2", "--changed")
    assert done.code == 0, done.err
    assert notices(dsn, "b2") == [(first, "in_use", "discover")]
    assert shown(dsn, [first, *others]) == ["b1", "b2", "b2"]
    assert rows_of(dsn, first) == before


# While a batch commits


def test_a_choice_during_the_commit_waits_for_it(run: Run, people: People, dataset: Path, dsn: str) -> None:
    numbers = ids_of(dataset)
    world.query(
        dsn,
        "INSERT INTO ingest.batches (id, kind, state, source, bucket) VALUES ('b2', 'load', 'loading', '/', 'x');"
        "INSERT INTO raw.receipts (batch_id, recognition_id, receipt)"
        " SELECT 'b2', id, '[]' FROM public.recognitions WHERE id = ANY (%s)",
        (numbers,),
    )
    with closing(psycopg2.connect(dsn)) as committing, committing.cursor() as cursor:
        cursor.execute("SELECT * FROM ingest.plan_batch('b2')")
        assert cursor.fetchall() == []
        for table in ("initial_tray_items", "recognitions"):
            key = "recognition_id" if table == "initial_tray_items" else "id"
            change = f"UPDATE public.{table} SET {key} = {key} WHERE {key} = {numbers[0]}"
            with pytest.raises(psycopg2.errors.LockNotAvailable):
                world.query(dsn, f"SET lock_timeout = '50ms'; {change}")


def test_a_menu_that_others_reference_stays_with_one_of_its_recognitions(
    run: Run, people: People, dataset: Path, settings: Settings, dsn: str
) -> None:
    numbers = ids_of(dataset)
    world.query(
        dsn,
        "CREATE TABLE public.menu_marks (menu_id bigint REFERENCES public.menus (id));"
        "INSERT INTO public.menu_marks SELECT id FROM public.menus",
    )
    for path in dataset.rglob("*AM.json"):
        path.unlink()
    done = run("load", "--source", dataset, "--batch-id", "b2", "--force")
    assert done.code == 0, done.err
    menus = world.query(dsn, "SELECT count(*) FROM public.menus")[0][0]
    left = [number for number, code, _ in notices(dsn, "b2") if code == "in_use"]
    assert len(left) == menus >= 1
    assert shown(dsn, numbers).count("b1") == len(left)
    assert world.inconsistencies(settings) == []


@pytest.mark.parametrize("project", ["app"], indirect=True)
def test_menu_entries_that_others_added_or_changed_stay(
    run: Run, people: People, own_dataset: MakeDataset, dsn: str, project: str
) -> None:
    dataset = own_dataset(3)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    menu = min(dataset.rglob("*AM.json"))
    number = int(menu.parent.name.removeprefix("recognition_"))
    entries = json.loads(menu.read_bytes().decode("utf-8-sig"))
    edited, gone = (entry["ExternalId"] for entry in entries[:2])
    table = "public.recognition_active_menu_items"
    world.query(
        dsn, f"UPDATE {table} SET price = 3.33 WHERE recognition_id = %s AND external_id = %s", (number, edited)
    )
    own = f"INSERT INTO {table} (recognition_id, external_id, name, price) VALUES (%s, '888', 'of the app', 5)"
    world.query(dsn, own, (number,))

    def shown() -> dict[str, tuple[Any, ...]]:
        rows = world.query(
            dsn, f"SELECT external_id, id, name, price FROM {table} WHERE recognition_id = %s ORDER BY id", (number,)
        )
        return {key: tuple(rest) for key, *rest in rows}

    before = shown()
    added = [{**entries[0], "ExternalId": key, "Name": "of the menu"} for key in ("888", "889")]
    menu.write_text(json.dumps([*(one for one in entries if one["ExternalId"] != gone), *added]), encoding="utf-8")
    for batch_id, option in (("b2", "--changed"), ("b3", "--force")):
        assert run("load", "--source", dataset, "--batch-id", batch_id, option).code == 0
        after = shown()
        assert after.pop("889")[1] == "of the menu"
        assert after == {key: value for key, value in before.items() if key != gone}
        kept = "SELECT message FROM ingest.notices WHERE batch_id = %s AND code = 'menu_entry_kept'"
        assert [text[-3:] for (text,) in world.query(dsn, kept, (batch_id,))] == [": 2"]
    for batch_id in ("b3", "b2"):
        assert run("reset", "--batch-id", batch_id, "--confirm").code == 0
    assert {key: value[1:] for key, value in shown().items()} == {key: value[1:] for key, value in before.items()}
    refused = run("reset", "--batch-id", "b1", "--confirm")
    assert (refused.code, f"{table} (2 rows, to public.recognitions)" in refused.err) == (4, True)
    world.query(dsn, f"DELETE FROM {table} WHERE external_id IN ('888', %s)", (edited,))
    assert run("reset", "--batch-id", "b1", "--confirm").code == 0
    assert shown() == {}


@pytest.mark.parametrize("project", ["app"], indirect=True)
@pytest.mark.parametrize("how", ["load", "load-qwen"])
def test_an_entry_that_a_person_added_and_chose_stays_chosen(
    how: str, run: Run, people: People, own_dataset: MakeDataset, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(2)
    first, second = numbers = ids_of(dataset)
    for number in numbers:
        give_receipt(dataset, number, RECEIPT[1:])
        give_menu(dataset, number, ["11", "12", "31"])
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    world.query(
        dsn,
        "INSERT INTO public.recognition_active_menu_items (recognition_id, external_id, name) VALUES (%s, '21', 'x');"
        "UPDATE public.initial_tray_items SET menu_item_external_id = '21'"
        " WHERE recognition_id = %s AND line_number = 1",
        (first, first),
    )
    chosen = "SELECT recognition_id FROM public.initial_tray_items WHERE menu_item_external_id = '21'"
    if how == "load":
        for number in numbers:
            next(world.folders(dataset)[number].rglob("*_Main.jpg")).write_bytes(jpeg(number))
        assert run("load", "--source", dataset, "--batch-id", "b2", "--changed").code == 0
        assert (notices(dsn, "b2"), shown(dsn, numbers)) == ([], ["b2"] * 2)
    else:
        for batch_id, left in (("q1", 10), ("q2", 30)):
            file = write(tmp_path / "1.json", {key_of(number): value_of("dish_0", left=left) for number in numbers})
            assert run("load-qwen", "--file", file, "--batch-id", batch_id, "--changed").code == 0
            assert notices(dsn, batch_id) == []
    assert world.query(dsn, chosen) == [(first,)]
    # Without its line, the choice keeps the recognition.
    for number in numbers:
        give_receipt(dataset, number, RECEIPT[2:])
    assert run("load", "--source", dataset, "--batch-id", "b3", "--changed").code == 0
    assert (notices(dsn, "b3"), world.query(dsn, chosen)) == ([(first, "in_use", "discover")], [(first,)])
    assert shown(dsn, [second]) == ["b3"]


@pytest.mark.parametrize("project", ["app"], indirect=True)
def test_an_entry_that_a_person_deleted_is_no_obstacle(
    run: Run, people: People, own_dataset: MakeDataset, dsn: str, tmp_path: Path
) -> None:
    dataset = own_dataset(2)
    first, second = numbers = ids_of(dataset)
    for number in numbers:
        give_receipt(dataset, number, RECEIPT)
        give_menu(dataset, number, ["11", "12", "21", "31"])
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    file = write(tmp_path / "1.json", {key_of(number): value_of("dish_0") for number in numbers})
    assert run("load-qwen", "--file", file, "--batch-id", "q1").code == 0
    world.query(
        dsn,
        "UPDATE public.initial_tray_items SET menu_item_external_id = NULL"
        " WHERE recognition_id = %s AND menu_item_external_id = '21';"
        "DELETE FROM public.recognition_active_menu_items WHERE recognition_id = %s AND external_id = '21'",
        (first, first),
    )
    chosen = "SELECT recognition_id FROM public.initial_tray_items WHERE menu_item_external_id = '21'"
    write(file, {key_of(number): value_of("dish_0", "dish_1", left=30) for number in numbers})
    done = run("load-qwen", "--file", file, "--batch-id", "q2", "--changed")
    assert (done.code, notices(dsn, "q2")) == (0, []), done.err
    assert run("reset", "--batch-id", "q2", "--confirm").code == 0
    assert world.query(dsn, chosen) == [(second,)]
    # A load publishes the entry, and leaves the item as it is.
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    assert (shown(dsn, numbers), world.query(dsn, chosen)) == (["b2"] * 2, [(second,)])


def test_an_adopted_recognition_is_loaded_by_force_once_nobody_works_on_it(
    run: Run, people: People, own_dataset: MakeDataset, settings: Settings, dsn: str
) -> None:
    dataset = own_dataset(3)
    first, second, _ = ids_of(dataset)
    for number in (first, second):
        script(dsn, number)
    assert run("load", "--source", dataset, "--batch-id", "b0").code == 0
    moved = (
        "UPDATE public.images SET storage_path = replace(storage_path, 'older/', 'recognitions/')"
        " WHERE storage_path LIKE 'older/%'"
    )
    with closing(Storage(settings)) as storage:
        for (key,) in world.query(dsn, f"{moved} RETURNING storage_path"):
            storage.upload(key, b"photo")
    adopted = run("adopt", "--confirm")
    assert adopted.code == 0, adopted.err
    world.query(dsn, "CREATE TABLE public.line_marks (line bigint REFERENCES public.recipe_lines (id))")
    lines = "SELECT l.id FROM public.recipe_lines l JOIN public.recipes p ON p.id = l.recipe_id WHERE recognition_id ="
    world.query(dsn, f"INSERT INTO public.line_marks {lines} {first}")
    before = rows_of(dsn, first)
    done = run("load", "--source", dataset, "--batch-id", "b1", "--force")
    assert done.code == 0, done.err
    assert notices(dsn, "b1") == [(first, "in_use", "discover")]
    assert rows_of(dsn, first) == before
    assert shown(dsn, ids_of(dataset)) == ["batch_20250601_021500", "b1", "b1"]
    world.query(dsn, "DROP TABLE public.line_marks")
    assert run("load", "--source", dataset, "--batch-id", "b2", "--force").code == 0
    assert shown(dsn, ids_of(dataset)) == ["b2"] * 3
    for name in ("b2", "b1"):
        assert run("reset", "--batch-id", name, "--confirm").code == 0
    assert rows_of(dsn, first) == before


# How long it takes


SEED = """
    INSERT INTO ingest.batches (id, kind, state, source, bucket, version)
    VALUES ('b1', 'load', 'done', '/', 'x', 1), ('b2', 'load', 'loading', '/', 'x', NULL);
    INSERT INTO ingest.manifest (batch_id, recognition_id, shard, photo_paths, photo_sizes, photo_mtimes, object_keys)
    SELECT 'b1', n, 1, '{}', '{}', '{}', '{}' FROM generate_series(1, %(count)s) AS n;
    INSERT INTO public.recognitions (id, batch_id) SELECT n, 'b1' FROM generate_series(1, %(count)s) AS n;
    INSERT INTO public.recipes (recognition_id) SELECT id FROM public.recognitions WHERE batch_id = 'b1';
    CREATE VIEW public.seeded AS SELECT p.* FROM public.recipes p
    JOIN public.recognitions r ON r.id = p.recognition_id AND r.batch_id = 'b1';
    INSERT INTO public.recipe_lines (recipe_id, line_number, quantity, has_ambiguity)
    SELECT id, l, 1, false FROM public.seeded, generate_series(1, 3) AS l;
    INSERT INTO public.recipe_line_options (recipe_line_id, external_id, name, is_selected)
    SELECT l.id, line_number, 'dish ' || line_number, true
    FROM public.recipe_lines l
    JOIN public.seeded p ON p.id = l.recipe_id;
    INSERT INTO public.initial_tray_items
        (recognition_id, item_type, source, recipe_line_id, recipe_line_option_id, line_number, ordinal, metadata)
    SELECT p.recognition_id, 'FOOD', 'RECIPE_LINE_OPTION', l.id, o.id, l.line_number, 1, '{}'
    FROM public.seeded p
    JOIN public.recipe_lines l ON l.recipe_id = p.id
    JOIN public.recipe_line_options o ON o.recipe_line_id = l.id;
    INSERT INTO raw.receipts (batch_id, recognition_id, receipt)
    SELECT 'b2', recognition_id, jsonb_agg(jsonb_build_object('Count', 1, 'Dishes', jsonb_build_array(
        jsonb_build_object('ExternalId', l::text, 'Name', 'dish ' || l))) ORDER BY l DESC)
    FROM public.seeded, generate_series(0, 3) AS l GROUP BY recognition_id;
"""


@pytest.mark.slow
@pytest.mark.parametrize("project", ["own"], indirect=True)
def test_a_forced_load_of_ten_times_the_trays_takes_about_ten_times_as_long(
    people: People, postgres_server: EmbeddedPostgres, template_database: str
) -> None:
    seconds = []
    for count in (1200, 12_000):
        with fresh_database(postgres_server.dsn, f"grown_{uuid.uuid4().hex}", template_database) as url:
            world.query(url, SEED % {"count": count})
            world.query(url, "ANALYZE")
            begin = time.perf_counter()
            with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
                cursor.execute("SET LOCAL statement_timeout = '120s'")
                cursor.execute("SELECT * FROM ingest.plan_batch('b2')")
                assert cursor.fetchall() == []
                cursor.execute("SELECT * FROM ingest.transform_batch('b2')")
                ours = "WHERE recipe_id IN (SELECT id FROM public.seeded)"
                cursor.execute(f"SELECT count(*), max(line_number) FROM public.recipe_lines {ours}")
                assert cursor.fetchall() == [(4 * count, 4)]
            seconds.append(time.perf_counter() - begin)
    print(f"{seconds[0]:.2f} s, then {seconds[1]:.2f} s")
    assert seconds[1] < 30 * seconds[0]
