"""Recognitions that are there already: made with SQL, as finished batches would have left them, without photos."""

from __future__ import annotations

from pathlib import Path

from benchmarks.bench import World

#: Copies of the template in one batch.
_COPIES = 25

_BATCH = """
INSERT INTO ingest.batches (id, kind, state, source, bucket, shards, recognitions, photos, bytes, found)
SELECT %(batch)s, kind, 'loading', source, bucket, shards * %(copies)s, recognitions * %(copies)s,
    photos * %(copies)s, bytes * %(copies)s, found * %(copies)s
FROM ingest.batches WHERE id = %(template)s
"""
_MANIFEST = """
INSERT INTO ingest.manifest (batch_id, recognition_id, shard, captured_on, photo_paths, photo_sizes, photo_mtimes,
    object_keys, menu_path, menu_size, menu_mtime, receipt_path, receipt_size, receipt_mtime, widths, heights,
    orientations, sha256s, md5s, menu_sha256, receipt_sha256)
SELECT %(batch)s, m.recognition_id + n * %(count)s, m.shard + (n - %(first)s) * %(shards)s, m.captured_on,
    m.photo_paths, m.photo_sizes, m.photo_mtimes,
    ARRAY[format('%%s/recognitions/%%s/camera1.jpg', %(batch)s, m.recognition_id + n * %(count)s),
          format('%%s/recognitions/%%s/camera2.jpg', %(batch)s, m.recognition_id + n * %(count)s)],
    m.menu_path, m.menu_size, m.menu_mtime, m.receipt_path, m.receipt_size, m.receipt_mtime, m.widths, m.heights,
    m.orientations, m.sha256s, m.md5s, encode(sha256(convert_to(m.menu_sha256 || n, 'UTF8')), 'hex'), m.receipt_sha256
FROM generate_series(%(first)s, %(last)s) n
JOIN ingest.manifest m ON m.batch_id = %(template)s
ORDER BY 2
"""
_FILES = """
INSERT INTO raw.photos
SELECT f.batch_id, f.recognition_id, t.camera_number, f.captured_on, t.source_path, f.object_keys[t.camera_number],
    t.width, t.height, t.orientation, t.byte_size, t.sha256
FROM generate_series(%(first)s, %(last)s) n
JOIN raw.photos t ON t.batch_id = %(template)s
JOIN ingest.manifest f ON f.batch_id = %(batch)s AND f.recognition_id = t.recognition_id + n * %(count)s
ORDER BY 2, 3
"""
_RECIPES = """
INSERT INTO raw.receipts
SELECT f.batch_id, f.recognition_id, t.receipt, f.menu_sha256
FROM generate_series(%(first)s, %(last)s) n
JOIN raw.receipts t ON t.batch_id = %(template)s
JOIN ingest.manifest f ON f.batch_id = %(batch)s AND f.recognition_id = t.recognition_id + n * %(count)s
ORDER BY 2
"""
# Another day has another menu.
_MENUS = """
INSERT INTO raw.menus
SELECT %(batch)s, t.shard + (n - %(first)s) * %(shards)s, encode(sha256(convert_to(t.sha256 || n, 'UTF8')), 'hex'),
    jsonb_insert(t.content, '{0,Day}', to_jsonb(n))
FROM generate_series(%(first)s, %(last)s) n
JOIN raw.menus t ON t.batch_id = %(template)s
"""
_MARKERS = """
INSERT INTO ingest.batch_state
SELECT %(batch)s, t.step, CASE WHEN t.shard = 0 THEN 0 ELSE t.shard + (n - %(first)s) * %(shards)s END,
    t.started_at, t.finished_at, t.worker, t.metrics
FROM generate_series(%(first)s, %(last)s) n
JOIN ingest.batch_state t ON t.batch_id = %(template)s AND (t.shard > 0 OR n = %(first)s)
"""
_PLAN = "SELECT count(*) FROM ingest.plan_batch(%(batch)s)"
_PUBLISH = "SELECT count(*) FROM ingest.transform_batch(%(batch)s)"
_FINISH = """
UPDATE ingest.batches
SET state = 'done', version = (SELECT max(version) + 1 FROM ingest.batches), finished_at = clock_timestamp()
WHERE id = %(batch)s
"""


def seed(world: World, template: Path, copies: int) -> int:
    """Load a dataset, then make as many copies of its recognitions, their ids following on; return their number.

    Statistics are as autovacuum would have left them.
    """
    loaded = world.load(template).result
    count, shards = loaded["recognitions_processed"], loaded["shards"]
    for first in range(1, copies + 1, _COPIES):
        last = min(first + _COPIES - 1, copies)
        values = {"batch": f"seed-{first}", "template": template.name, "first": first, "last": last}
        values |= {"count": count, "shards": shards, "copies": last - first + 1}
        world.transact((_BATCH, _MANIFEST), values)
        world.maintain("ANALYZE ingest.manifest")
        world.transact((_FILES, _RECIPES, _MENUS, _MARKERS, _PLAN, _PUBLISH, _FINISH), values)
    world.maintain("VACUUM (ANALYZE)")
    return int(count * (copies + 1))
