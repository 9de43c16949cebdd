"""The manifests of the guide: what the schema or the client of each engine says of them, and the commands in them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import kubernetes_validate
import pytest
import yaml
from botocore.validate import validate_parameters

from pipeline import cli
from pipeline.cli.array import INDEX_VARIABLES
from pipeline.cli.output import EXIT_CODES
from tests.services import REPOSITORY
from tests.test_docs import section
from tests.test_docs_examples import blocks

GUIDE = (REPOSITORY / "docs" / "guides" / "several-machines.md").read_text(encoding="utf-8")


def of_engine(name: str) -> list[str]:
    """Return the blocks of an engine's section."""
    return [block for _, block in blocks(section(name, GUIDE))]


def parsed(command: list[str]) -> Any:
    """Return the options of a command of ours."""
    assert command[:3] in (["python", "-m", "pipeline"], [".venv/bin/python", "-m", "pipeline"])
    return cli.parser().parse_args(command[3:])


def containers(job: Any) -> Iterator[Any]:
    pod = job["spec"]["template"]["spec"]
    yield from (*pod.get("initContainers", ()), *pod["containers"])


def test_kubernetes_takes_the_jobs() -> None:
    (text,) = of_engine("Kubernetes")
    array, finish = yaml.safe_load_all(text)
    for job in (array, finish):
        kubernetes_validate.validate(job, "1.31", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**array, "spec": {**array["spec"], "completion": 1}}, "1.31", strict=True)
    found = {one["name"]: parsed(one["command"]) for job in (array, finish) for one in containers(job)}
    assert list(found) == ["discover", "shard", "finish"] == [one.name for one in found.values()]
    assert found["shard"].of == array["spec"]["completions"]
    assert found["shard"].index is None, f"{INDEX_VARIABLES[0]} has it"
    assert {one.batch_id for one in found.values()} == {"a1"}
    codes = {
        code
        for job in (array, finish)
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        for code in rule["onExitCodes"]["values"]
    }
    assert codes <= set(EXIT_CODES.values()) - {3, 130}, "a service that failed is tried again"


def test_aws_batch_takes_the_job_definition_and_the_array() -> None:
    definition, submission = map(json.loads, of_engine("AWS Batch"))
    model = botocore.session.get_session().get_service_model("batch")
    for operation, document in (("RegisterJobDefinition", definition), ("SubmitJob", submission)):
        shape = model.operation_model(operation).input_shape
        assert shape is not None
        validate_parameters(document, shape)
        with pytest.raises(Exception, match="Unknown parameter"):
            validate_parameters({**document, "unknown": 1}, shape)
    values = {f"Ref::{name}": value for name, value in submission["parameters"].items()}
    command = [values.get(word, word) for word in definition["containerProperties"]["command"]]
    assert parsed(command).of == submission["arrayProperties"]["size"]
    assert 2 <= submission["arrayProperties"]["size"] <= 10_000


def test_the_script_for_slurm_is_one_that_shells_take(tmp_path: Path) -> None:
    script, submission = of_engine("Slurm")
    for number, text in enumerate((script, f"#!/bin/bash\n{submission}")):
        file = tmp_path / f"{number}.sh"
        file.write_text(text, encoding="utf-8")
        checked = subprocess.run(
            [Path(sys.executable).with_name("shellcheck"), file], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout
    *_, command = script.splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if "SBATCH" in line
    )
    first, _, last = options["array"].partition("%")[0].partition("-")
    assert (int(first), int(last) + 1) == (0, parsed(shlex.split(command)[1:]).of)
