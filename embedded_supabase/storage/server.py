"""A server of the Supabase Storage API for one machine: HTTP in front of an `ObjectStore`.

It implements buckets; raw, multipart and signed uploads; downloads, HEAD and info; both lists; delete, move, copy and
signed URLs, below `/storage/v1` and without it. It does not implement resumable uploads (TUS), S3 and image rendering.
Statuses and bodies follow https://github.com/supabase/storage, without its defects: there, a chunked body is not
subject to the size limit, and lists skip keys. Tornado responds to malformed HTTP: 400 without a body.

    python -m embedded_supabase.storage --root DIR --secret-file FILE [--port N] [--no-sync] …

A running server holds the lock on `DIR/server.lock` and records its pid and port in `DIR/server.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import tornado.httpserver
import tornado.httputil
import tornado.iostream
import tornado.netutil
import tornado.web

from embedded_supabase.disk import Disk
from embedded_supabase.files import make_parents
from embedded_supabase.storage.faults import FaultInjector
from embedded_supabase.storage.handler import HEADER_LIMIT
from embedded_supabase.storage.routes import application
from embedded_supabase.storage.sending import CHUNK
from embedded_supabase.storage.store import ObjectStore

HOST = "127.0.0.1"
_IDLE_SECONDS = 61


async def serve(
    store: ObjectStore, secret: str, port: int, faults: FaultInjector, started: Callable[[int], None]
) -> None:
    """Serve a store until SIGTERM or SIGINT; call `started` with the port when the server listens."""
    try:
        sockets = tornado.netutil.bind_sockets(port, HOST)
        server = tornado.httpserver.HTTPServer(
            application(store, secret, faults),
            idle_connection_timeout=_IDLE_SECONDS,
            # The handlers check the actual limits and send the API's error responses.
            max_header_size=4 * HEADER_LIMIT,
            max_body_size=1 << 40,
            chunk_size=CHUNK,
        )
        server.add_sockets(sockets)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        started(sockets[0].getsockname()[1])
        await stop.wait()
        server.stop()
        await server.close_all_connections()
    finally:
        store.close()


def main() -> int:
    """Run the server of a folder; return 1 if another server uses it."""
    parser = argparse.ArgumentParser(description="Serve the Supabase Storage API from a folder, on 127.0.0.1.")
    parser.add_argument("--root", type=Path, required=True, help="the folder of the objects; created if missing")
    parser.add_argument("--secret-file", type=Path, required=True, help="the file with the secret that signs the keys")
    parser.add_argument("--port", type=int, default=0, help="the TCP port; 0, the default, selects a free one")
    parser.add_argument(
        "--latency", type=float, default=0, metavar="MS", help="milliseconds of an upload, on average (0)"
    )
    parser.add_argument("--capacity", type=int, metavar="N", help="most concurrent object requests (no limit)")
    parser.add_argument("--no-sync", action="store_true", help="do not sync the disk; a power failure may lose objects")
    options = parser.parse_args()
    secret = options.secret_file.read_text(encoding="ascii").strip()
    faults = FaultInjector(options.latency / 1000, options.capacity)
    disk = Disk(durable=not options.no_sync)
    make_parents(options.root.absolute(), disk)
    disk.make_folder(options.root)
    with open(options.root / "server.lock", "a", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"error: another server uses {options.root}", file=sys.stderr)
            return 1
        record = options.root / "server.json"
        record.unlink(missing_ok=True)  # left by a killed server, whose pid may have been reused

        def started(port: int) -> None:
            fresh = record.with_suffix(".new")
            fresh.write_text(json.dumps({"pid": os.getpid(), "port": port}), encoding="ascii")
            fresh.replace(record)

        try:
            store = ObjectStore(options.root, disk)
            asyncio.run(serve(store, secret, options.port, faults, started))
        except OSError as exc:
            print(f"error: {exc.strerror or exc}", file=sys.stderr)
            return 1
        finally:
            record.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
