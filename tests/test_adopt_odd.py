"""Adopted trays with odd rows, and an app that changes them between our commands."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Storage
from tests import annotating, older_script, test_adopt, world
from tests.annotating import Run, give_receipt, key_of, value_of, write
from tests.test_adopt import BOXES, RECEIPT, Project

pytestmark = pytest.mark.slow

run = annotating.run
dsn = annotating.dsn
database_url = test_adopt.database_url
project = test_adopt.project
SALAD = [{"Count": 1, "Dishes": [{"Name": "salad", "ExternalId": "9"}]}]


def ok(run: Run, *args: object) -> None:
    done = run(*[str(a) for a in args])
    assert done.code == 0, (args, done.code, done.err[-1500:], done.out[-300:])


def start(run: Run, project: Project) -> None:
    ok(run, "migrate")
    ok(run, "adopt", "--confirm")


def force(run: Run, project: Project, batch: str, receipt: list[Any] | str = "keep") -> None:
    if not isinstance(receipt, str):
        for number in project.numbers:
            give_receipt(project.dataset, number, receipt)
    ok(run, "load", "--source", project.dataset, "--batch-id", batch, "--force")


def reset(run: Run, *batches: str) -> None:
    for b in batches:
        ok(run, "reset", "--batch-id", b, "--confirm")


@pytest.mark.parametrize("recipe", [False, True])
def test_a_tray_that_the_app_deleted_stays_deleted(run: Run, project: Project, dsn: str, recipe: bool) -> None:
    start(run, project)
    first = project.numbers[0]
    world.query(dsn, "DELETE FROM public.recognitions WHERE id = %s", (first,))
    if recipe:
        world.query(dsn, "DELETE FROM public.recipes WHERE recognition_id = %s", (first,))
    left = project.now()
    force(run, project, "b1")
    assert world.inconsistencies(project.settings) == []
    reset(run, "b1")
    now = project.now()
    for name in left[0]:
        assert now[0][name] == left[0][name], name
    assert now[1] == left[1]


def test_a_tray_that_was_deleted_and_loaded_anew_is_copied_anew(run: Run, project: Project, dsn: str) -> None:
    start(run, project)
    first = project.numbers[0]
    force(run, project, "b1", SALAD)
    world.query(dsn, "DELETE FROM public.recognitions WHERE id = %s", (first,))
    world.query(dsn, "DELETE FROM public.recipes WHERE recognition_id = %s", (first,))
    reset(run, "b1")
    older_script.load(project.settings, project.dataset, [first], "manual_load", {(first, 1): BOXES})
    then = project.now()
    force(run, project, "b2", RECEIPT)
    reset(run, "b2")
    now = project.now()
    for name in then[0]:
        assert now[0][name] == then[0][name], name


def test_columns_that_the_app_adds_meanwhile_get_their_defaults(run: Run, project: Project, dsn: str) -> None:
    start(run, project)
    force(run, project, "b1", SALAD)
    for t in ("recipe_lines", "recipe_line_options", "initial_tray_items", "initial_annotations", "images"):
        world.query(
            dsn,
            f"ALTER TABLE public.{t} ADD COLUMN flag boolean NOT NULL DEFAULT false,"
            " ADD COLUMN gen text GENERATED ALWAYS AS (id::text) STORED",
        )
    force(run, project, "b2", SALAD * 2)
    reset(run, "b2", "b1")
    project.check()


@pytest.mark.parametrize("kind", ["BOTTLE", "BUZZER", "OTHER"])
@pytest.mark.parametrize("over", ["line", "option"])
def test_items_of_other_types_keep_a_tray_as_it_is(run: Run, project: Project, dsn: str, kind: str, over: str) -> None:
    if over == "line":
        world.query(
            dsn, "UPDATE public.initial_tray_items SET item_type = %s WHERE recipe_line_id IS NOT NULL", (kind,)
        )
    else:
        world.query(
            dsn, "UPDATE public.initial_tray_items SET item_type = %s WHERE recipe_line_option_id IS NOT NULL", (kind,)
        )
    project.then = project.now()
    start(run, project)
    force(run, project, "b1", SALAD)
    assert world.query(dsn, "SELECT count(*) FROM ingest.batches WHERE id = 'b1'") == [(0,)]
    project.check()


def test_annotations_that_people_delete_or_correct_stay_so(run: Run, project: Project, dsn: str) -> None:
    start(run, project)
    force(run, project, "b1")
    [(one,)] = world.query(dsn, "SELECT min(id) FROM public.initial_annotations")
    [(two,)] = world.query(dsn, "SELECT max(id) FROM public.initial_annotations")
    world.query(dsn, "DELETE FROM public.initial_annotations WHERE id = %s", (one,))
    box = '{"x": 3, "y": 3, "w": 4, "h": 4}'
    world.query(dsn, "UPDATE public.initial_annotations SET bbox = %s WHERE id = %s", (box, two))
    then = project.now()[0]["public.initial_annotations"]
    force(run, project, "b2")
    assert project.now()[0]["public.initial_annotations"] == then
    reset(run, "b2", "b1")
    assert project.now()[0]["public.initial_annotations"] == then


@pytest.mark.parametrize("table", ["recipes", "images", "recognition_active_menu_items"])
def test_a_reset_passes_over_rows_whose_parent_the_app_deleted(
    run: Run, project: Project, dsn: str, table: str
) -> None:
    start(run, project)
    force(run, project, "b1", SALAD)
    if table == "recognition_active_menu_items":
        world.query(dsn, "UPDATE public.initial_tray_items SET menu_item_external_id = NULL")
    world.query(dsn, f"DELETE FROM public.{table} WHERE recognition_id = %s", (project.numbers[0],))
    reset(run, "b1")


@pytest.mark.parametrize("metadata", ["5", "null", "[1]", '"x"', None])
def test_metadata_of_any_kind_comes_back(run: Run, project: Project, dsn: str, metadata: str | None) -> None:
    world.query(dsn, "UPDATE public.initial_tray_items SET metadata = %s WHERE source = 'MODEL'", (metadata,))
    world.query(dsn, "UPDATE public.initial_tray_items SET metadata = %s WHERE recipe_line_id IS NOT NULL", (metadata,))
    project.then = project.now()
    start(run, project)
    values = {key_of(number): value_of("dish_0", "dish_1", "dish_2", "plate") for number in project.numbers}
    force(run, project, "b1", [*SALAD, *RECEIPT])
    write(Path("q.json"), values)
    ok(run, "load-qwen", "--file", "q.json", "--batch-id", "q1", "--force")
    reset(run, "b1", "q1")
    project.check()


def test_ids_that_a_batch_cannot_have_are_adopted(run: Run, project: Project, dsn: str) -> None:
    world.query(dsn, "UPDATE public.recognitions SET batch_id = '' WHERE batch_id = 'a b'")
    world.query(dsn, "UPDATE public.recognitions SET batch_id = 'adopted_1' WHERE batch_id = 'manual_load'")
    world.query(dsn, "UPDATE public.recognitions SET batch_id = 'a/b' WHERE batch_id LIKE 'batch%%'")
    project.then = project.now()
    start(run, project)
    ok(run, "verify")
    force(run, project, "b1")
    ok(run, "verify")
    reset(run, "b1")
    ok(run, "verify")
    ok(run, "verify", "--deep")
    project.check()


def test_a_tray_that_appears_during_a_commit_can_be_adopted(run: Run, project: Project, dsn: str) -> None:
    # as test_work_at_commit: appears at the commit
    ok(run, "migrate")
    first = project.numbers[0]
    world.query(dsn, "DELETE FROM public.recognitions WHERE id = %s", (first,))
    world.query(dsn, "DELETE FROM public.recipes WHERE recognition_id = %s", (first,))
    world.query(
        dsn,
        f"""
        CREATE FUNCTION public.appear() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO public.recognitions (id, batch_id) VALUES ({first}, 'late') ON CONFLICT DO NOTHING;
            RETURN NULL;
        END $$;
        CREATE TRIGGER appear AFTER INSERT ON ingest.batch_state
            FOR EACH ROW WHEN (NEW.step = 'copy') EXECUTE FUNCTION public.appear()""",
    )
    ok(run, "load", "--source", project.dataset, "--batch-id", "b1")
    ok(run, "adopt", "--confirm")
    assert world.query(dsn, "SELECT count(*) FROM ingest.manifest WHERE NOT rejected") == [(4,)]
    world.query(dsn, "DROP TRIGGER appear ON ingest.batch_state")
    force(run, project, "b2")
    reset(run, "b2")
    assert world.query(dsn, "SELECT batch_id FROM public.recognitions WHERE id = %s", (first,)) == [("late",)]


@pytest.mark.parametrize("prefix", ["manual_load", "b0"])
def test_an_object_that_an_image_names_is_no_orphan(run: Run, project: Project, dsn: str, prefix: str) -> None:
    first = project.numbers[0]
    key = f"{prefix}/recognitions/{first}/camera1.jpg"
    with closing(Storage(project.settings)) as storage:
        storage.upload(key, b"photo")
    world.query(
        dsn, "UPDATE public.images SET storage_path = %s WHERE recognition_id = %s AND camera_number = 1", (key, first)
    )
    project.then = project.now()
    start(run, project)
    run("verify", "--repair")
    project.check()
    force(run, project, "b1")
    reset(run, "b1")
    project.check()


def test_a_batch_that_was_reset_and_loaded_again_is_adopted_again(run: Run, project: Project, dsn: str) -> None:
    start(run, project)
    first = project.numbers[0]
    reset(run, "manual_load")
    older_script.load(project.settings, project.dataset, [first], "manual_load", {(first, 1): BOXES})
    project.then = project.now()
    ok(run, "adopt", "--confirm")
    ok(run, "verify")
    force(run, project, "b1", SALAD)
    ok(run, "verify")
    reset(run, "b1")
    project.check()
    ok(run, "verify")


def test_equal_boxes_of_two_items_both_stay(run: Run, project: Project, dsn: str) -> None:
    world.query(
        dsn,
        """
        INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, bbox)
        SELECT a.image_id, (SELECT max(t.id) FROM public.initial_tray_items t WHERE t.recognition_id = i.recognition_id
            AND t.recipe_line_option_id = x.recipe_line_option_id AND t.id <> x.id), a.bbox
        FROM public.initial_annotations a JOIN public.initial_tray_items x ON x.id = a.initial_tray_item_id
        JOIN public.images i ON i.id = a.image_id WHERE x.metadata ->> 'qwen_label' = 'dish_0'""",
    )
    project.then = project.now()
    start(run, project)
    n = world.query(dsn, "SELECT id, image_id, bbox FROM public.initial_annotations ORDER BY 1")
    force(run, project, "b1")
    assert world.query(dsn, "SELECT id, image_id, bbox FROM public.initial_annotations ORDER BY 1") == n
    force(run, project, "b2", SALAD)
    assert world.query(dsn, "SELECT id, image_id, bbox FROM public.initial_annotations ORDER BY 1") == n
    reset(run, "b2", "b1")
    project.check()


@pytest.mark.parametrize("shift", ["-line_number", "line_number - 1", "line_number * 10"])
def test_line_numbers_of_any_kind_come_back(run: Run, project: Project, dsn: str, shift: str) -> None:
    lines = world.query(dsn, f"SELECT {shift}, id FROM public.recipe_lines")
    world.query(dsn, "UPDATE public.recipe_lines SET line_number = -1000 - line_number")
    for line in lines:
        world.query(dsn, "UPDATE public.recipe_lines SET line_number = %s WHERE id = %s", line)
    project.then = project.now()
    start(run, project)
    force(run, project, "b1", [*SALAD, *RECEIPT])
    force(run, project, "b2", RECEIPT[1:])
    force(run, project, "b3", [RECEIPT[2], *SALAD])
    reset(run, "b2", "b3", "b1")
    project.check()
