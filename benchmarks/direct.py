"""A load without Luigi: the functions of its steps, called one after another.

    python -m benchmarks.direct DATASET --batch-id ID [--workers N]

With several workers, as many processes take the shards in turn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import cache

from pipeline.batches.resolve import LoadRequest, resolve_batch
from pipeline.batches.state import KIND_LOAD
from pipeline.batches.summary import summarise
from pipeline.config import Settings, load_settings
from pipeline.database import Database
from pipeline.observe.metrics import Metrics
from pipeline.steps.copy import copy_shard
from pipeline.steps.discover import Request, discover
from pipeline.steps.transform import transform_batch
from pipeline.steps.upload import Uploader
from pipeline.storage import Storage


@cache
def _settings() -> Settings:
    return load_settings()


@cache
def _database() -> Database:
    return Database(_settings())


def work(batch_id: str, shard: int) -> None:
    """Upload and copy a shard."""
    with closing(Storage(_settings())) as storage, closing(Uploader(_database(), storage)) as uploader:
        uploader.upload(batch_id, shard)
    copy_shard(_database(), _settings(), batch_id, shard)


def main() -> None:
    """Load a dataset."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.direct", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dataset")
    parser.add_argument("--batch-id", required=True)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    settings, database, batch_id = _settings(), _database(), options.batch_id
    with closing(Storage(settings)) as storage:
        storage.ensure_bucket()
    begun = resolve_batch(settings, database, LoadRequest(batch_id, options.dataset))
    request = Request.of(settings, batch_id, begun.source, kind=KIND_LOAD, limit=None, force=False, strict=False)
    found = discover(database, request)
    assert found is not None
    shards = range(1, found.shards + 1)
    if options.workers == 1:
        for shard in shards:
            work(batch_id, shard)
    else:
        database.close()
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("fork")) as executor:
            list(executor.map(work, [batch_id] * found.shards, shards))
    with closing(Storage(settings)) as storage:
        transform_batch(database, storage, batch_id, Metrics())
    print(json.dumps(database.run(lambda connection: summarise(connection, batch_id))))


if __name__ == "__main__":
    main()
