"""Load datasets of canteen-tray photos into Supabase, in batches, exactly once.

dataset -> discover -> upload shards -> bulk COPY -> transform -> public tables: each step leaves a marker row in
ingest.batch_state, and a step whose marker is there is skipped. `luigi --module pipeline LoadBatch` runs the graph,
LoadQwen adds the annotations of a vision model, ResetBatch takes a batch out again.
"""

import configparser
import sys
from pathlib import Path

_FILE = "Luigi's configuration (luigi.cfg, luigi.toml or LUIGI_CONFIG_PATH)"
_SAVE = "Correct it: UTF-8 without a byte order mark, each section once, its header in brackets, then `name = value`."
_FREE = "Free space there, raise the limit of `ulimit -f`, or set TMPDIR to another folder."

try:
    # It reads its configuration and looks for TMPDIR at its import. The errors of a luigi.toml are of many classes.
    import luigi as luigi
except (configparser.Error, ValueError, TypeError, AttributeError, LookupError, FileNotFoundError) as exc:
    # In a program of others, the error is theirs.
    if Path(sys.argv[0]).name not in ("-m", "pipeline"):
        raise
    what, hint, code = f"{_FILE} cannot be read: {' '.join(str(exc).split())}", _SAVE, 2
    if isinstance(exc, FileNotFoundError):
        what, hint, code = f"{exc.strerror}.", _FREE, 3
    sys.stderr.write(f"Error: {what}\nHint: {hint}\n")
    raise SystemExit(code) from exc
else:
    from pipeline.graph.tasks import CopyShard as CopyShard
    from pipeline.graph.tasks import DiscoverBatch as DiscoverBatch
    from pipeline.graph.tasks import DiscoverQwen as DiscoverQwen
    from pipeline.graph.tasks import LoadBatch as LoadBatch
    from pipeline.graph.tasks import LoadNight as LoadNight
    from pipeline.graph.tasks import LoadQwen as LoadQwen
    from pipeline.graph.tasks import ResetBatch as ResetBatch
    from pipeline.graph.tasks import TransformBatch as TransformBatch
    from pipeline.graph.tasks import TransformQwen as TransformQwen
    from pipeline.graph.tasks import UploadShard as UploadShard
