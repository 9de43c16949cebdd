"""Load datasets of canteen-tray photos into Supabase, in batches, exactly once.

dataset -> discover -> upload shards -> bulk COPY -> transform -> public tables: each step leaves a marker row in
ingest.batch_state, and a step whose marker is there is skipped. `luigi --module pipeline LoadBatch` runs the graph,
LoadQwen adds the annotations of a vision model, ResetBatch takes a batch out again.
"""

import configparser
import os
import signal
import sys
from pathlib import Path
from types import FrameType

_FILE = "Luigi's configuration (luigi.cfg, luigi.toml or LUIGI_CONFIG_PATH)"
_SAVE = "Correct it: UTF-8 without a byte order mark, each section once, its header in brackets, then `name = value`."
_INTERRUPTED = b"Interrupted. Run the same command again.\n"
_FREE = "Free space there, raise the limit of `ulimit -f`, or set TMPDIR to another folder."
_IS_COMMAND = Path(sys.argv[0]).name in ("-m", "pipeline")  # else a program of others imports this


def _end(number: int, frame: FrameType | None) -> None:
    """End a process that has not begun its command; an exception could be lost in the middle of an import."""
    try:
        os.write(2, _INTERRUPTED)
    finally:
        os._exit(130)


if _IS_COMMAND:  # the imports below take longer than some commands
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(_number, _end)

try:
    # It reads its configuration and looks for TMPDIR at its import. The errors of a luigi.toml are of many classes.
    import luigi as luigi
except (configparser.Error, ValueError, TypeError, AttributeError, LookupError, FileNotFoundError) as exc:
    if not _IS_COMMAND:
        raise  # the error is theirs
    if isinstance(exc, FileNotFoundError):  # an alarm needs a temporary file, too
        sys.stderr.write(f"Error: {exc.strerror}.\nHint: {_FREE}\n")
        raise SystemExit(3) from exc
    from pipeline.batches.alarm import WATCHED, Alarm
    from pipeline.errors import SettingsError
    from pipeline.observe.logger import configure_logging, say_error

    error = SettingsError(f"{_FILE} cannot be read: {' '.join(str(exc).split())}", _SAVE)
    configure_logging()
    say_error(error)
    name = next(iter(sys.argv[1:]), "")
    if name in WATCHED and "--dry-run" not in sys.argv:
        Alarm(name, "--production" in sys.argv, lambda: None).finish(2, error)
    raise SystemExit(2) from exc
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
