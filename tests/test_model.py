"""Random sequences of commands against a model: what readers see, what the bucket holds, and what is refused.

MODEL_SEED and MODEL choose other sequences, and how many; see tests/model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from embedded_supabase.postgres.server import EmbeddedPostgres
from tests.model.array import Array
from tests.model.dataset import FIRST, Dataset, Editions
from tests.model.disturbances import Disturbances, Neighbour
from tests.model.machine import Machine
from tests.model.older import Older
from tests.model.people import People
from tests.runner import ForkServer, placed_runner
from tests.services import MakeDataset, StorageServer


class Commands(Array, Disturbances):
    """All commands in an empty project."""


@pytest.fixture(scope="module")
def editions(small_dataset: MakeDataset, tmp_path_factory: pytest.TempPathFactory) -> Editions:
    """Recognitions in two editions."""
    return Editions(tmp_path_factory.mktemp("editions"), [small_dataset(6, seed=one, first_id=FIRST) for one in (0, 1)])


@pytest.fixture(scope="module")
def neighbour(
    postgres_server: EmbeddedPostgres,
    template_database: str,
    storage_server: StorageServer,
    fork_server: ForkServer,
    editions: Editions,
) -> Iterator[Neighbour]:
    """Another project on the same servers, with batches that have the names which those of a sequence have."""
    with placed_runner(postgres_server, template_database, storage_server, fork_server) as (found, runner):
        dataset = Dataset(editions, runner.folder / "dataset", 0, [FIRST, FIRST + 1])
        for name, *command in (("load1", "load", "--source"), ("qwen1", "load-qwen", "--file")):
            what = dataset.folder if name == "load1" else dataset.file
            assert runner(*command, what, "--batch-id", name).code == 0
        yield Neighbour(found)


@pytest.mark.slow
@pytest.mark.parametrize("project", [Commands, People, Older], ids=["empty", "people", "older"])
def test_any_sequence_of_commands_does_what_the_model_says(
    postgres_server: EmbeddedPostgres,
    template_database: str,
    storage_server: StorageServer,
    fork_server: ForkServer,
    editions: Editions,
    neighbour: Neighbour,
    is_app: bool,
    project: type[Machine],
) -> None:
    if is_app != (project is not Commands):
        pytest.skip("in another project")

    class Placed(project):  # type: ignore[valid-type,misc]
        place = partial(placed_runner, postgres_server, template_database, storage_server, fork_server)

    Placed.editions, Placed.neighbour = editions, neighbour
    examples, number = os.environ.get("MODEL", "2" if is_app else "10"), os.environ.get("MODEL_SEED")
    print(f"MODEL_SEED={number} MODEL={examples}")
    chosen = settings(
        max_examples=int(examples),
        stateful_step_count=12,
        deadline=None,
        derandomize=number is None,
        database=None,
        phases=(Phase.generate, *([Phase.shrink] if number is None else [])),  # which takes minutes
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    seeded = seed(int(number))(Placed) if number is not None else Placed
    run_state_machine_as_test(seeded, settings=chosen)
