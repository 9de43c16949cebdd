"""Load datasets of canteen-tray photos into Supabase, in batches, exactly once.

dataset -> discover -> upload shards -> bulk COPY -> transform -> public tables: each step leaves a marker row in
ingest.batch_state, and a step whose marker is there is skipped. `luigi --module pipeline LoadBatch` runs the graph,
LoadQwen adds the annotations of a vision model, ResetBatch takes a batch out again.
"""

from pipeline.graph.tasks import CopyShard as CopyShard
from pipeline.graph.tasks import DiscoverBatch as DiscoverBatch
from pipeline.graph.tasks import DiscoverQwen as DiscoverQwen
from pipeline.graph.tasks import LoadBatch as LoadBatch
from pipeline.graph.tasks import LoadQwen as LoadQwen
from pipeline.graph.tasks import ResetBatch as ResetBatch
from pipeline.graph.tasks import TransformBatch as TransformBatch
from pipeline.graph.tasks import TransformQwen as TransformQwen
from pipeline.graph.tasks import UploadShard as UploadShard
