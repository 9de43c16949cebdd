"""A page of what a look goes through reads its own recognitions, however many come before it."""

from __future__ import annotations

from contextlib import closing

import psycopg2
import pytest

from pipeline.database.queries import statement
from tests import annotating
from tests.annotating import Run
from tests.services import MakeDataset

run = annotating.run
dsn = annotating.dsn

#: As many as it takes until reading all of them would be the cheaper plan.
_COUNT, _PAGE = 20_000, 10
_COPIES = f"""
DO $$ BEGIN EXECUTE (
    SELECT format('INSERT INTO ingest.manifest (%s) SELECT %s FROM ingest.manifest, generate_series(1, {_COUNT}) AS n',
        string_agg(quote_ident(attname), ', '),
        string_agg(CASE attname WHEN 'recognition_id' THEN 'recognition_id + n' ELSE quote_ident(attname) END, ', '))
    FROM pg_attribute WHERE attrelid = 'ingest.manifest'::regclass AND attnum > 0 AND NOT attisdropped
); END $$;
INSERT INTO public.recognitions (id, batch_id)
SELECT id + n, batch_id FROM public.recognitions, generate_series(1, {_COUNT}) AS n;
ANALYZE public.recognitions, ingest.manifest
"""
_CANDIDATES = """
CREATE TEMP TABLE candidates ON COMMIT DROP AS
SELECT id AS recognition_id, ARRAY['x'] AS paths, true AS loaded, NULL::text AS holder, false AS of_others
FROM public.recognitions;
CREATE UNIQUE INDEX ON pg_temp.candidates (recognition_id);
ANALYZE pg_temp.candidates
"""
_STAGED = "INSERT INTO pg_temp.staged (recognition_id, changed) SELECT id, true FROM public.recognitions"
_READ = """
SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)) FROM pg_stat_xact_user_tables
WHERE relid IN ('public.recognitions'::regclass, 'ingest.manifest'::regclass)
"""


@pytest.mark.parametrize("name", ["list_left", "list_present"])
def test_a_page_reads_its_own_recognitions(run: Run, small_dataset: MakeDataset, dsn: str, name: str) -> None:
    assert run("load", "--source", small_dataset(1), "--batch-id", "b1").code == 0
    text = statement(name)
    for parameter, value in (("after", "%(after)s"), ("last", "%(after)s"), ("count", str(_PAGE))):
        text = text.replace(f":{parameter}", value)
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(_COPIES)
        connection.commit()
        cursor.execute(statement("prefer_indexes"))
        cursor.execute("SELECT min(id) FROM public.recognitions")
        [(first,)] = cursor.fetchall()
        for made in (_CANDIDATES, statement("create_staged"), _STAGED, "ANALYZE pg_temp.staged", _READ):
            cursor.execute(made)
        [(before,)] = cursor.fetchall()
        cursor.execute(text, {"after": first + _COUNT // 2})
        assert [row[0] for row in cursor.fetchall()] == [first + _COUNT // 2 + n for n in range(1, _PAGE + 1)]
        cursor.execute(_READ)
        [(after,)] = cursor.fetchall()
        assert after - before <= 2 * _PAGE
