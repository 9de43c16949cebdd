"""The table of routes. Statuses and bodies are those of https://github.com/supabase/storage."""

from __future__ import annotations

import tornado.web

from embedded_supabase.storage.buckets import Buckets, EmptyBucket, OneBucket
from embedded_supabase.storage.faults import FaultInjector
from embedded_supabase.storage.handler import Handler, Missing, Status
from embedded_supabase.storage.lists import ListFolder, ListObjects
from embedded_supabase.storage.objects import (
    AuthenticatedInfo,
    AuthenticatedObject,
    BulkDelete,
    Copy,
    Info,
    Move,
    OneObject,
    PublicInfo,
    PublicObject,
)
from embedded_supabase.storage.signed import SignedObject, SignedObjects, SignedUpload
from embedded_supabase.storage.store import ObjectStore

_ROUTES: tuple[tuple[str, type[Handler]], ...] = (
    (r"/status", Status),
    (r"/bucket/?", Buckets),
    (r"/bucket/([^/]+)/empty", EmptyBucket),
    (r"/bucket/([^/]+)", OneBucket),
    (r"/object/move", Move),
    (r"/object/copy", Copy),
    (r"/object/list/([^/]+)", ListFolder),
    (r"/object/list-v2/([^/]+)", ListObjects),
    (r"/object/info/public/([^/]+)/(.+)", PublicInfo),
    (r"/object/info/authenticated/([^/]+)/(.+)", AuthenticatedInfo),
    (r"/object/info/([^/]+)/(.+)", Info),
    (r"/object/upload/sign/([^/]+)/(.+)", SignedUpload),
    (r"/object/sign/([^/]+)/(.+)", SignedObject),
    (r"/object/sign/([^/]+)()", SignedObjects),
    (r"/object/public/([^/]+)/(.+)", PublicObject),
    (r"/object/authenticated/([^/]+)/(.+)", AuthenticatedObject),
    (r"/object/([^/]+)/(.+)", OneObject),
    (r"/object/([^/]+)", BulkDelete),
)


def application(store: ObjectStore, secret: str, faults: FaultInjector) -> tornado.web.Application:
    """Return the web application for a store."""
    shared = {"store": store, "secret": secret, "faults": faults}
    return tornado.web.Application(
        [(rf"(?:/storage/v1)?{pattern}", handler, shared) for pattern, handler in _ROUTES],
        default_handler_class=Missing,
        default_handler_args=shared,
        log_function=lambda handler: None,
    )
