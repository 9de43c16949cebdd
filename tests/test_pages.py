"""A page of what a look goes through reads its own recognitions, however many come before it."""

from __future__ import annotations

from contextlib import closing

import psycopg2
import pytest

from pipeline.database import Database
from pipeline.database.queries import statements
from pipeline.dataset.records import Folder
from pipeline.steps.staging import copy_found
from tests import annotating
from tests.annotating import Run, ids_of
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
_READ = """
SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)) AS rows FROM pg_stat_xact_user_tables
WHERE relname IN ('recognitions', 'manifest', 'candidates', 'staged', 'found')
"""


@pytest.mark.parametrize("name", ["list_candidates", "list_left", "list_present"])
def test_a_page_reads_its_own_recognitions(
    run: Run, small_dataset: MakeDataset, dsn: str, database: Database, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    dataset = small_dataset(1)
    assert run("load", "--source", dataset, "--batch-id", "b1").code == 0
    [first] = ids_of(dataset)
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(_COPIES)
        connection.commit()
    monkeypatch.setitem(statements(), "count_read", _READ)
    is_new = name == "list_candidates"
    ids = range(first + 1 + is_new * _COUNT, first + 1 + (is_new + 1) * _COUNT)
    parameters = {"after": ids[_COUNT // 2 - 1], "count": _PAGE}
    if name == "list_left":
        parameters["last"] = ids[-1]
    with database.transaction() as pipeline:  # what discovery does before it reads pages
        pipeline.enqueue("prefer_indexes")
        pipeline.execute("create_found")
        copy_found(pipeline, [Folder(one, f"recognition_{one}") for one in ids])
        pipeline.execute("create_candidates", batch_id="b2", force=False)
        pipeline.execute("create_staged")
        pipeline.copy_in("pg_temp.staged", ("recognition_id", "changed"), [(one, True) for one in ids])
        before = pipeline.one("count_read").rows
        page = [row.recognition_id for row in pipeline.execute(name, **parameters)]
        assert page == list(ids[_COUNT // 2 : _COUNT // 2 + _PAGE])
        assert pipeline.one("count_read").rows - before <= 4 * _PAGE
