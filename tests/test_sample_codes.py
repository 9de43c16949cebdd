"""The sample has one input of every kind of reject and notice that the reference lists."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pipeline.config import Settings
from pipeline.sample import write_sample
from pipeline.sample.writer import ANNOTATION_LINES, ANNOTATIONS, EXPORT
from tests import world
from tests.services import RunPipeline

REFERENCE = Path(__file__).parents[1] / "docs" / "reference" / "rejects.md"
#: What is not in the sample, and why.
ABSENT = {
    "path_encoding": "some file systems refuse names that are not UTF-8",
    "folder_unreadable": "root reads folders of any mode",
    "photo_unreadable": "root reads files of any mode",
    "json_unreadable": "root reads files of any mode",
    "photo_vanished": "a file is deleted during a load",
    "json_vanished": "a file is deleted during a load",
    "photo_changed": "a file is written during a load",
    "json_changed": "a file is written during a load",
    "in_use": "an app works with what was loaded",
    "menu_entry_kept": "an app adds or changes entries of a menu",
    "other_source": "another source has the recognition",
    "photo_size_unknown": "another tool has loaded before",
    "adopted_without_photo": "another tool has loaded before",
    "adopted_without_size": "another tool has loaded before",
    "not_adopted": "another tool loaded recognitions",
    "annotations_other_photo": "a photo is replaced after its annotations were loaded",
    "annotations_empty": "the sample has detections for each of its photos",
}
#: Wide enough that boxes in pixels are expected beyond 1000.
SIZE = (1110, 96)


def listed() -> tuple[set[str], set[str]]:
    """The codes of rejects and of notices in the reference."""
    rejects, notices = REFERENCE.read_text(encoding="utf-8").split("## Notices")
    return set(re.findall(r"^\| `(\w+)` \|", rejects, re.M)), set(re.findall(r"^\| `(\w+)` \|", notices, re.M))


def test_the_sample_has_each_code_of_the_reference(
    run_pipeline: RunPipeline, settings: Settings, tmp_path: Path
) -> None:
    dataset, dsn = tmp_path / "dataset", settings.database_url.reveal()
    summary = write_sample(dataset, 200, broken=True, unusual=True, size=SIZE, workers=1)
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1").returncode == 0
    assert world.query(dsn, "SELECT count(*) FROM public.recognitions") == [(200 + len(summary.unusual_ids),)]
    for name in (ANNOTATIONS, ANNOTATION_LINES):
        assert run_pipeline("load-qwen", "--file", dataset / name).returncode == 0
    shutil.rmtree(dataset / EXPORT / "recognition_100024")  # what was loaded of it stays
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b2").returncode in (0, 6)
    rejects, notices = listed()
    assert {code for (code,) in world.query(dsn, "SELECT code FROM ingest.rejects")} == rejects - ABSENT.keys()
    assert {code for (code,) in world.query(dsn, "SELECT code FROM ingest.notices")} == notices - ABSENT.keys()
    assert rejects | notices >= ABSENT.keys()


@pytest.mark.slow
def test_each_planted_recognition_is_rejected_or_noticed_for_itself(
    run_pipeline: RunPipeline, settings: Settings, tmp_path: Path
) -> None:
    dataset, dsn = tmp_path / "dataset", settings.database_url.reveal()
    summary = write_sample(dataset, 200, broken=True, unusual=True, size=(96, 48), workers=1)
    run_pipeline("load", "--source", dataset, "--batch-id", "b1")
    broken, unusual = summary.broken_ids.values(), summary.unusual_ids.values()
    assert world.query(dsn, "SELECT recognition_id FROM ingest.rejects WHERE recognition_id > 0 ORDER BY 1") == [
        (number,) for number in broken if number
    ]
    noticed = world.query(dsn, "SELECT DISTINCT recognition_id FROM ingest.notices WHERE recognition_id > 0 ORDER BY 1")
    assert noticed == [(number,) for number in unusual]
    assert len(broken) < (200 + len(broken) + len(unusual)) / 10
