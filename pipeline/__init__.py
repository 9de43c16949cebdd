"""Load datasets of canteen-tray photos into Supabase, in batches, exactly once.

dataset -> discover -> upload shards -> bulk COPY -> transform -> public tables: each step leaves a marker row in
ingest.batch_state, and a step whose marker is there is skipped. `luigi --module pipeline LoadBatch` runs the graph,
LoadQwen adds the annotations of a vision model, ResetBatch takes a batch out again.
"""

from pipeline.graph.tasks import (
    CopyShard,
    DiscoverBatch,
    DiscoverQwen,
    LoadBatch,
    LoadQwen,
    ResetBatch,
    TransformBatch,
    TransformQwen,
    UploadShard,
)

__all__ = [
    "CopyShard",
    "DiscoverBatch",
    "DiscoverQwen",
    "LoadBatch",
    "LoadQwen",
    "ResetBatch",
    "TransformBatch",
    "TransformQwen",
    "UploadShard",
]
