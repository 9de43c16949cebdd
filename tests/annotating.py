"""Write annotation files, load them step by step, and look at what was loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.batches.resolve import LoadRequest, resolve_batch
from pipeline.batches.state import KIND_QWEN
from pipeline.cli import main
from pipeline.config import Settings
from pipeline.database import Database
from pipeline.observe.metrics import Metrics
from pipeline.steps.discover import Discovery, Request, discover
from pipeline.steps.transform import transform_batch
from pipeline.storage import Storage
from tests import world
from tests.services import after_target

Value = dict[str, Any]
Annotations = dict[str, Any]


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, in the working directory."""

    def command(*arguments: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, after_target(captured.err))

    return command


@pytest.fixture
def dsn(settings: Settings) -> str:
    return settings.database_url.reveal()


def ids_of(dataset: Path) -> list[int]:
    return sorted(world.folders(dataset))


def key_of(number: int, camera: str = "Main", export: str = "export_1") -> str:
    return f"RRS_Dataset/{export}/recognition_{number}/photos/recognition_{number}_2025-10-11_{camera}.jpg"


def boxes(*labels: str, left: float = 10) -> list[Value]:
    """Boxes with these labels, each at another place."""
    return [{"bbox_2d": [left + n, 20.5, left + n + 50, 80], "label": label} for n, label in enumerate(labels)]


def value_of(*labels: str, left: float = 10) -> Value:
    """The value of a photo on which the model saw these."""
    everything = boxes(*labels, left=left)
    return {
        "dishes": {"qwen_detections": [one for one in everything if one["label"] != "plate"]},
        "plates": {"qwen_detections": [one for one in everything if one["label"] == "plate"]},
    }


def write(path: Path, content: Annotations) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def read(path: Path) -> Annotations:
    found: Annotations = json.loads(path.read_text(encoding="utf-8"))
    return found


def of(content: Annotations, numbers: Iterable[int]) -> Annotations:
    """Return the entries of these recognitions."""
    names = [f"recognition_{number}/" for number in numbers]
    return {key: value for key, value in content.items() if any(name in key for name in names)}


def rejects(dsn: str, batch_id: str = "q1") -> list[tuple[Any, ...]]:
    return world.query(
        dsn, "SELECT recognition_id, code, step FROM ingest.rejects WHERE batch_id = %s ORDER BY id", (batch_id,)
    )


def markers(dsn: str, batch_id: str = "q1") -> list[tuple[Any, ...]]:
    return world.query(dsn, "SELECT step, shard FROM ingest.batch_state WHERE batch_id = %s ORDER BY 1, 2", (batch_id,))


def annotated(dsn: str) -> set[int]:
    return {row[0] for row in world.domain(dsn).annotations}


def annotation_ids(dsn: str) -> dict[tuple[int, int, str, str], int]:
    """Return (recognition, camera, label, box) -> id."""
    rows = world.query(
        dsn,
        "SELECT i.recognition_id, i.camera_number, a.label, a.bbox::text, a.id"
        " FROM public.initial_annotations a JOIN public.images i ON i.id = a.image_id",
    )
    return {row[:4]: row[4] for row in rows}


def item_ids(dsn: str) -> dict[tuple[Any, ...], int]:
    """Return (recognition, type, source, line, ordinal) -> id."""
    rows = world.query(
        dsn, "SELECT recognition_id, item_type, source, line_number, ordinal, id FROM public.initial_tray_items"
    )
    return {row[:5]: row[5] for row in rows}


def break_transforms(dsn: str) -> None:
    """Let every transform of detections fail."""
    world.query(dsn, "ALTER TABLE public.initial_annotations ADD CONSTRAINT never CHECK (detection < 0) NOT VALID")


def mend_transforms(dsn: str) -> None:
    world.query(dsn, "ALTER TABLE public.initial_annotations DROP CONSTRAINT never")


class Annotate:
    """A batch `q1`, carried on step by step."""

    def __init__(self, settings: Settings, database: Database, file: Path) -> None:
        self.settings, self.database, self.file = settings, database, file
        self.metrics = Metrics()

    def discover(self, batch_id: str = "q1", *, force: bool = False) -> Discovery:
        begun = resolve_batch(
            self.settings, self.database, LoadRequest(batch_id, str(self.file), kind=KIND_QWEN, force=force)
        )
        request = Request(batch_id, begun.source, self.settings.bucket, kind=KIND_QWEN, force=force)
        found = discover(self.database, request)
        assert found is not None
        return found

    def transform(self, batch_id: str = "q1") -> None:
        with closing(Storage(self.settings, self.metrics)) as storage:
            transform_batch(self.database, storage, batch_id, self.metrics)


RECEIPT = [
    {"Count": 2, "Dishes": [{"Name": "Борщ", "ExternalId": "11"}, {"Name": "Щи", "ExternalId": "12"}]},
    {"Count": 1, "Dishes": [{"Name": "Хлеб", "ExternalId": "21"}]},
    {"Count": 3, "Dishes": [{"Name": "Чай", "ExternalId": "31"}]},
]


def give_receipt(dataset: Path, number: int, receipt: list[Any] | None) -> None:
    folder = world.folders(dataset)[number]
    for path in folder.glob("*correct_dishes.json"):
        path.unlink()
    if receipt is not None:
        path = folder / f"{number}_recognition_2025-10-11_correct_dishes.json"
        path.write_text(json.dumps(receipt, ensure_ascii=False), encoding="utf-8")


def give_menu(dataset: Path, number: int, external_ids: Iterable[str]) -> None:
    folder = world.folders(dataset)[number]
    for path in folder.glob("*AM.json"):
        path.unlink()
    entries = [{"ExternalId": one, "Name": f"dish {one}", "Category": "", "Price": 10} for one in external_ids]
    (folder / f"{number}_recognition_2025-10-11_AM.json").write_text(json.dumps(entries), encoding="utf-8")
