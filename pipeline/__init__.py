"""Load datasets of canteen-tray photos into Supabase, in batches, exactly once.

dataset -> discover -> upload shards -> bulk COPY -> transform -> public tables: each step leaves a marker row in
ingest.batch_state, and a step whose marker is there is skipped. `luigi --module pipeline LoadBatch` runs the graph.
"""

from pipeline.tasks import CopyShard, DiscoverBatch, LoadBatch, TransformBatch, UploadShard
from pipeline.worker import install

install()

__all__ = ["CopyShard", "DiscoverBatch", "LoadBatch", "TransformBatch", "UploadShard"]
