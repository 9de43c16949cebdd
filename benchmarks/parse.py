"""A plain pass over an annotations file, from which nothing is made: the whole of it at once, or our parser's stream.

python -m benchmarks.parse FILE [--stream]    {"seconds"}
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque

from pipeline.dataset.annotations import read_entries


def main() -> None:
    """Pass over a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parse", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--stream", action="store_true")
    options = parser.parse_args()
    begin = time.perf_counter()
    with open(options.file, "rb") as stream:
        if options.stream:
            deque(read_entries(stream, set()), maxlen=0)
        else:
            json.load(stream)
    print(json.dumps({"seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main()
