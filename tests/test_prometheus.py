"""observe/prometheus.py: format and content of the metrics file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.errors import SettingsError
from pipeline.observe.prometheus import write_metrics
from tests.services import MakeDataset, RunPipeline

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


def samples(text: str) -> dict[str, float]:
    """Return name and last label's value -> number of every sample."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge"
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert {"batch_id", "kind"} <= set(sample.labels)
            rest = [value for name, value in sample.labels.items() if name not in ("batch_id", "kind")]
            found[" ".join([sample.name, *rest])] = sample.value
    return found


def test_the_file_has_every_number_under_its_labels(tmp_path: Path) -> None:
    write_metrics(tmp_path / "load.prom", SUMMARY)
    text = (tmp_path / "load.prom").read_text(encoding="utf-8")
    found = samples(text)
    assert found.pop("pipeline_last_run_timestamp_seconds") == pytest.approx(
        os.stat(tmp_path / "load.prom").st_mtime, abs=60
    )
    assert found == {
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
        "pipeline_batch_counter bytes_uploaded": 123,
        "pipeline_batch_gauge requests_in_flight": 7,
        "pipeline_batch_operations storage_upload": 6,
        "pipeline_batch_operation_seconds storage_upload": 1.5,
    }
    family = next(iter(text_string_to_metric_families(text)))
    assert family.samples[0].labels["batch_id"] == SUMMARY["batch_id"]
    assert stat.S_IMODE(os.stat(tmp_path / "load.prom").st_mode) & 0o400
    assert os.listdir(tmp_path) == ["load.prom"]


def test_an_unwritable_file_is_a_settings_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none/load\.prom"):
        write_metrics(tmp_path / "none" / "load.prom", SUMMARY)


@pytest.mark.parametrize("kind", ["load", "load-qwen"])
def test_a_load_writes_the_file(
    kind: str, run_pipeline: RunPipeline, small_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset = small_dataset(3)
    file = tmp_path / "load.prom"
    assert run_pipeline("load", "--source", dataset, "--batch-id", "b1", "--metrics-file", file).returncode == 0
    if kind == "load-qwen":
        annotations = dataset / "qwen_annotations.json"
        done = run_pipeline("load-qwen", "--file", annotations, "--batch-id", "q1", "--metrics-file", file)
        assert done.returncode == 0, done.stderr
    found = samples(file.read_text(encoding="utf-8"))
    told = json.loads(run_pipeline("status", "--batch-id", "b1" if kind == "load" else "q1", "--json").stdout)
    assert found["pipeline_batch_state done"] == 1
    assert found["pipeline_batch_recognitions"] == 3
    assert found["pipeline_batch_active_seconds"] == told["total_seconds"]
    assert ("pipeline_batch_detections" in found) == (kind == "load-qwen")


def test_an_unwritable_file_is_refused_before_the_load(
    run_pipeline: RunPipeline, small_dataset: MakeDataset, tmp_path: Path
) -> None:
    for file in (tmp_path / "none" / "load.prom", tmp_path):
        done = run_pipeline("load", "--source", small_dataset(3), "--batch-id", "b1", "--metrics-file", file)
        assert done.returncode == 2
        assert "The metrics cannot be written to" in done.stderr
    assert "No batch was loaded yet." in run_pipeline("status").stdout


def test_a_batch_of_an_earlier_version_has_no_gauges(tmp_path: Path) -> None:
    write_metrics(tmp_path / "load.prom", {name: value for name, value in SUMMARY.items() if name != "gauges"})
    found = samples((tmp_path / "load.prom").read_text(encoding="utf-8"))
    assert "pipeline_batch_recognitions" in found
    assert "pipeline_batch_gauge requests_in_flight" not in found
