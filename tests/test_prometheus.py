"""observe/prometheus.py: format and content of the metrics file."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.config import Settings
from pipeline.observe.prometheus import batch_metrics, look_metrics, run_metrics, verify_metrics, write_metrics
from pipeline.storage import Storage
from tests import annotating, world
from tests.annotating import Run
from tests.services import MakeDataset

run = annotating.run

SUMMARY = {
    "batch_id": 'b"1\\',
    "kind": "load",
    "state": "loading",
    "total_seconds": 1.5,
    "recognitions_processed": 3,
    "images_processed": 6,
    "bytes": 123,
    "shards": 2,
    "shards_done": {"upload": 1, "copy": 0},
    "already_loaded": 4,
    "rejects": {"photo_empty": 2},
    "counters": {"bytes_uploaded": 123},
    "gauges": {"requests_in_flight": {"last": 7, "max": 16}},
    "operations": {"storage_upload": {"ops": 6, "average_seconds": 0.25, "total_seconds": 1.5}},
}


def samples(file: Path, command: str = "load") -> dict[str, float]:
    """Return name and last label's value -> number of every sample."""
    found = {}
    for family in text_string_to_metric_families(file.read_text(encoding="utf-8")):
        assert family.type == "gauge"
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.labels["command"] == command
            rest = [value for name, value in sample.labels.items() if name != "command"]
            found[" ".join([sample.name, *rest])] = sample.value
    return found


def labels(file: Path) -> set[tuple[str, frozenset[str]]]:
    """Return the series: names, and the values of their labels; the last batch as a mere name."""
    return {
        (sample.name, frozenset(value for name, value in sample.labels.items() if name != "batch_id"))
        for family in text_string_to_metric_families(file.read_text(encoding="utf-8"))
        for sample in family.samples
    }


def test_the_file_has_every_number_under_its_labels(tmp_path: Path) -> None:
    file = tmp_path / "load.prom"
    write_metrics(file, "load", [*run_metrics(3, 1.25), *batch_metrics(SUMMARY)])
    found = samples(file)
    assert found.pop("pipeline_last_run_timestamp_seconds") == pytest.approx(os.stat(file).st_mtime, abs=60)
    assert found == {
        "pipeline_last_run_exit_code": 3,
        "pipeline_last_run_duration_seconds": 1.25,
        'pipeline_batch_info b"1\\': 1,
        "pipeline_batch_state loading": 1,
        "pipeline_batch_state held": 0,
        "pipeline_batch_state done": 0,
        "pipeline_batch_state resetting": 0,
        "pipeline_batch_state reset": 0,
        "pipeline_batch_active_seconds": 1.5,
        "pipeline_batch_recognitions": 3,
        "pipeline_batch_images": 6,
        "pipeline_batch_size_bytes": 123,
        "pipeline_batch_shards": 2,
        "pipeline_batch_shards_done upload": 1,
        "pipeline_batch_shards_done copy": 0,
        "pipeline_batch_already_loaded": 4,
        "pipeline_batch_rejects photo_empty": 2,
        "pipeline_batch_counts bytes_uploaded": 123,
        "pipeline_batch_latest requests_in_flight": 7,
        "pipeline_batch_operations storage_upload": 6,
        "pipeline_batch_operation_seconds storage_upload": 1.5,
    }
    assert stat.S_IMODE(os.stat(file).st_mode) & 0o400
    assert os.listdir(tmp_path) == ["load.prom"]


def test_a_file_that_cannot_be_written_any_more_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metrics(tmp_path / "none" / "load.prom", "load", batch_metrics(SUMMARY))
    assert "The command itself is not affected." in capsys.readouterr().err


@pytest.mark.parametrize("command", ["load", "load-qwen"])
def test_the_series_are_the_same_every_night(
    command: str,
    run: Run,
    small_dataset: MakeDataset,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset, file = small_dataset(3), tmp_path / "load.prom"
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    where = ("--source", dataset) if command == "load" else ("--file", dataset / "qwen_annotations.json")
    seen = []
    for batch_id in ("n1", "n2"):
        assert run(command, *where, "--force", "--batch-id", batch_id, "--metrics-file", file).code == 0
        found = samples(file, command)
        told = json.loads(run("status", "--batch-id", batch_id, "--json").out)
        assert found[f"pipeline_batch_info {batch_id}"] == found["pipeline_batch_state done"] == 1
        assert found["pipeline_batch_recognitions"] == 3
        assert found["pipeline_batch_active_seconds"] == told["total_seconds"]
        assert ("pipeline_batch_detections" in found) == (command == "load-qwen")
        for kind in ("load", *(["qwen"] if command == "load-qwen" else [])):
            assert found[f"pipeline_last_look_timestamp_seconds {kind}"] == pytest.approx(time.time(), abs=60)
        assert found["pipeline_newest_data_timestamp_seconds load"] % 86400 == 0
        seen.append(labels(file))
    assert seen[0] == seen[1]
    monkeypatch.setenv("PIPELINE_RETRY_MAX_ATTEMPTS", "0")
    never = "ALTER TABLE ingest.batch_state ADD CONSTRAINT never CHECK (step <> 'transform') NOT VALID"
    world.query(settings.database_url.reveal(), never)
    assert run(command, *where, "--force", "--metrics-file", file).code == 3
    failed = samples(file, command)
    assert failed["pipeline_last_run_exit_code"] == 3
    assert "pipeline_last_look_timestamp_seconds load" in failed
    monkeypatch.setenv("DATABASE_URL", "postgresql://postgres@127.0.0.1:9/postgres")
    assert run(command, *where, "--metrics-file", file).code == 3
    assert set(samples(file, command)) == {
        f"pipeline_last_run_{name}" for name in ("timestamp_seconds", "exit_code", "duration_seconds")
    }


def test_a_verification_has_its_findings(
    run: Run, small_dataset: MakeDataset, settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "verify.prom"
    assert run("load", "--source", small_dataset(3), "--batch-id", "b1").code == 0
    with closing(Storage(settings)) as storage:
        storage.remove(list(world.objects(settings))[:2])
    cases: tuple[tuple[tuple[str, ...], int, int], ...] = (((), 5, 2), (("--deep", "--repair"), 0, 0), ((), 0, 0))
    for options, code, left in cases:
        assert run("verify", *options, "--metrics-file", file).code == code
        found = samples(file, "verify")
        assert found["pipeline_last_run_exit_code"] == code
        assert found["pipeline_verify_differences"] == left
        assert found["pipeline_verify_repaired"] == found["pipeline_verify_deep"] * 2 == 2 * ("--deep" in options)
        assert found["pipeline_verify_findings dangling"] == (0 if options == () and not code else 2)
        assert found["pipeline_verify_findings equal"] == 6 - found["pipeline_verify_findings dangling"]
        assert "pipeline_last_look_timestamp_seconds load" in found


def test_an_unwritable_file_is_refused_before_the_command(run: Run, small_dataset: MakeDataset, tmp_path: Path) -> None:
    for file in (tmp_path / "none" / "load.prom", tmp_path):
        for command in (("load", "--source", small_dataset(3)), ("verify",)):
            done = run(*command, "--metrics-file", file)
            assert done.code == 2
            assert f"{file} is no file in an existing, writable folder" in done.err
    assert "No batch was loaded yet." in run("status").out


def test_the_alert_rules_name_metrics_that_commands_write() -> None:
    guide = Path(__file__).parents[1] / "docs" / "guides"
    totals = dict.fromkeys(("equal",), 1)
    families = [
        *run_metrics(0, 1),
        *look_metrics([]),
        *batch_metrics(SUMMARY),
        *verify_metrics(totals, 0, 0, deep=True),
    ]
    written = {f"pipeline_{family.name}" for family in families}
    assert set(re.findall(r"pipeline_\w+", (guide / "alerts.rules.yml").read_text(encoding="utf-8"))) <= written
    table = re.findall(r"pipeline_[a-z_]+", (guide / "alerts.md").read_text(encoding="utf-8"))
    assert {name for name in table if not name.endswith("_")} <= written
    assert {name for name in written if not name.startswith("pipeline_batch_")} <= set(table)


def test_a_batch_of_an_earlier_version_has_no_gauges(tmp_path: Path) -> None:
    former = {name: value for name, value in SUMMARY.items() if name != "gauges"}
    write_metrics(tmp_path / "load.prom", "load", batch_metrics(former))
    found = samples(tmp_path / "load.prom")
    assert "pipeline_batch_recognitions" in found
    assert "pipeline_batch_latest requests_in_flight" not in found
