"""A small server of the Supabase Storage API, for one machine: HTTP in front of an `ObjectStore`.

It answers what the pipeline and an ordinary client ask: buckets; uploads raw, multipart and by signed address;
downloads, HEAD and info; both lists; delete, move, copy and signed addresses, below `/storage/v1` or without it.
Resumable uploads (TUS), S3, image rendering and X-Robots-Tag are not in it. Statuses and bodies follow
https://github.com/supabase/storage; where the official server has a defect (a chunked body gets around the size
limit, lists skip keys), this one does not. What is no HTTP is answered by Tornado: 400 without a body.

    python -m embedded_supabase.storage.server --root DIR --secret-file FILE [--port N] [--latency MS] [--capacity N]

A running server holds the lock on `DIR/server.lock` and writes its pid and port into `DIR/server.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import tornado.httpserver
import tornado.httputil
import tornado.iostream
import tornado.netutil
import tornado.web

from embedded_supabase.storage.faults import FaultInjector
from embedded_supabase.storage.handler import HEADER_LIMIT
from embedded_supabase.storage.routes import application
from embedded_supabase.storage.sending import CHUNK
from embedded_supabase.storage.store import ObjectStore

HOST = "127.0.0.1"
_IDLE_SECONDS = 61


async def serve(
    root: Path, secret: str, port: int, strain: FaultInjector, started: Callable[[int], Awaitable[None] | None]
) -> None:
    """Serve a folder on 127.0.0.1 until SIGTERM or SIGINT, and call `started` with the port once it listens."""
    store = ObjectStore(root)
    try:
        sockets = tornado.netutil.bind_sockets(port, HOST)
        server = tornado.httpserver.HTTPServer(
            application(store, secret, strain),
            idle_connection_timeout=_IDLE_SECONDS,
            # The limits that count are checked by the handlers, which have answers for them.
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
    """Run the server of a folder; a second one ends with exit code 1."""
    parser = argparse.ArgumentParser(description="Serve the Supabase Storage API from a folder, on 127.0.0.1.")
    parser.add_argument("--root", type=Path, required=True, help="the folder of the objects, made when it is missing")
    parser.add_argument("--secret-file", type=Path, required=True, help="the secret that keys are signed with")
    parser.add_argument("--port", type=int, default=0, help="0, the default, for any that is free")
    parser.add_argument("--latency", type=float, default=0, metavar="MS", help="milliseconds of an upload at least (0)")
    parser.add_argument("--capacity", type=int, metavar="N", help="refuse more object requests at once (any number)")
    options = parser.parse_args()
    secret = options.secret_file.read_text(encoding="ascii").strip()
    strain = FaultInjector(options.latency / 1000, options.capacity)
    options.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(options.root / "server.lock", "a", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"error: another server works on {options.root}", file=sys.stderr)
            return 1
        record = options.root / "server.json"
        record.unlink(missing_ok=True)  # of a server that was killed: its pid is nobody's, or somebody else's

        def started(port: int) -> None:
            fresh = record.with_suffix(".new")
            fresh.write_text(json.dumps({"pid": os.getpid(), "port": port}), encoding="ascii")
            fresh.replace(record)

        try:
            asyncio.run(serve(options.root, secret, options.port, strain, started))
        except OSError as exc:
            print(f"error: {exc.strerror or exc}", file=sys.stderr)
            return 1
        finally:
            record.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
