"""First annotations of a recognition are written without a comparison, and come to the same rows as with one."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

from pipeline.config import Settings
from pipeline.dataset.annotations import ANNOTATIONS
from tests import annotating, world
from tests.annotating import Run, annotated, break_transforms, ids_of, key_of, mend_transforms, value_of, write
from tests.services import MakeDataset

run = annotating.run
dsn = annotating.dsn

#: Let every recognition be compared, as if each had annotations.
COMPARE_ALL = """
ALTER FUNCTION ingest.plan_unannotated(text) RENAME TO plan_found;
CREATE FUNCTION ingest.plan_unannotated(batch text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM ingest.plan_found(batch);
    DELETE FROM pg_temp.unannotated;
END $$
"""
#: What makes a comparison necessary: the statement, with the id of the recognition in it.
FOUND = {
    "an annotation of somebody": (
        "INSERT INTO public.initial_annotations (image_id, initial_tray_item_id, label, bbox, source)"
        " SELECT p.id, i.id, 'dish_1', '{{}}', 'MODEL' FROM public.images p"
        " JOIN public.initial_tray_items i USING (recognition_id) WHERE recognition_id = {0} LIMIT 1"
    ),
    "an item of the model": (
        "INSERT INTO public.initial_tray_items (recognition_id, item_type, source) VALUES ({0}, 'FOOD', 'MODEL')"
    ),
    "an item of the receipt less": (
        "DELETE FROM public.initial_tray_items WHERE id = (SELECT id FROM public.initial_tray_items"
        " WHERE recognition_id = {0} AND source = 'RECIPE_LINE_OPTION' ORDER BY id LIMIT 1)"
    ),
    "a photo of no version": "UPDATE public.images SET sha256 = repeat('0', 64) WHERE recognition_id = {0}",
    "annotations that were there": (
        "DELETE FROM public.initial_annotations USING public.images i WHERE i.id = image_id AND i.recognition_id = {0}"
    ),
}


@pytest.mark.parametrize("compares", [False, True], ids=["as they are", "compared"])
def test_annotations_of_recognitions_without_any_are_the_same_with_and_without_a_comparison(
    compares: bool, run: Run, settings: Settings, small_dataset: MakeDataset, dsn: str
) -> None:
    dataset = small_dataset(6)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    if compares:
        world.query(dsn, COMPARE_ALL)
    done = run("load-qwen", "--file", dataset / ANNOTATIONS, "--batch-id", "q1", "--verbose")
    assert done.code == 0
    written = re.search(r"transform_unannotated: (\d+) row", done.err)
    assert written is not None
    world.check(settings, (dataset, "b1", None), qwen=dataset / ANNOTATIONS)
    numbers = ids_of(dataset)
    shown = sum(row[0] in numbers for row in world.domain(dsn).annotations)
    assert int(written[1]) == (0 if compares else shown)
    assert shown > 0


def test_a_recognition_on_which_anything_was_found_before_is_compared(
    run: Run, small_dataset: MakeDataset, dsn: str, tmp_path: Path
) -> None:
    dataset = small_dataset(6)
    first, *numbers = ids_of(dataset)
    found = dict(zip(FOUND, numbers, strict=True))
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    former = write(tmp_path / "former.json", {key_of(numbers[-1]): value_of("plate")})
    assert run("load-qwen", "--file", former, "--batch-id", "q0").code == 0
    break_transforms(dsn)
    content = {key_of(number): value_of("dish_1", "plate") for number in (first, *numbers)}
    command = ("load-qwen", "--file", write(tmp_path / "a.json", content), "--batch-id", "q1", "--force")
    assert run(*command).code == 3
    for kind, number in found.items():
        world.query(dsn, FOUND[kind].format(number))
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT ingest.plan_unannotated('q1')")
        cursor.execute("SELECT recognition_id FROM pg_temp.unannotated")
        assert cursor.fetchall() == [(first,)]
    mend_transforms(dsn)
    assert run(*command).code == 0
    assert annotated(dsn) == {first, *numbers}
