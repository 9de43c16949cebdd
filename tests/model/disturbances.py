"""Damage, which `verify` finds and repairs, keys that are wrong, and migrations that are applied again."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from embedded_supabase.storage.auth import mint_key
from pipeline.config import Settings
from pipeline.storage import Storage
from tests import world
from tests.model.machine import Machine

STRANGER = "zz/recognitions/9/camera1.jpg"
#: Damage to a row that readers see, by the part of it that is wrong.
_ROWS = ("sha256 = repeat('0', 64)", "byte_size = byte_size + 1", "storage_path = storage_path || '.old'")
_SOURCE = """
    SELECT b.source || '/' || m.photo_paths[camera] FROM ingest.manifest m JOIN ingest.batches b ON b.id = m.batch_id
    CROSS JOIN generate_series(1, 2) camera WHERE m.object_keys[camera] = %s
"""


class Neighbour:
    """Another project on the same servers, of which nothing is to change."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._then = self._now()

    def _now(self) -> object:
        dsn = self._settings.database_url.reveal()
        return world.dump(dsn), world.counts(dsn), world.objects(self._settings)

    def check(self) -> None:
        assert self._now() == self._then


class Disturbances(Machine):
    """The same where bucket, rows and settings are damaged in between, beside another project."""

    neighbour: ClassVar[Neighbour]

    def teardown(self) -> None:
        """Besides, the other project is as it was."""
        super().teardown()
        self.neighbour.check()

    @precondition(lambda self: self._objects())
    @rule(
        data=st.data(),
        what=st.sampled_from(["nothing", "missing", "missing", "damaged", "orphan", *_ROWS]),
        deep=st.booleans(),
    )
    def verify(self, data: st.DataObject, what: str, deep: bool) -> None:
        sound = self._objects()
        key = data.draw(st.sampled_from(sorted(sound)))
        content = self._read(key)
        visible = "SELECT storage_path FROM public.images WHERE storage_path = %s"
        if what in _ROWS and (not self._sql(visible, key) or key.startswith("recognitions/")):
            what = "nothing"
        rows = world.dump(self.settings.database_url.reveal())
        self._damage(what, key, content)
        code = 0 if what == "nothing" else 5
        options = ["--deep"] if deep else []
        self._changes_nothing({code}, "verify", "--quiet", *options)
        code = 0 if what not in _ROWS and (what == "orphan" or self._has_source(key, sound[key])) else code
        ended = self.runner("verify", "--quiet", "--repair", *options)
        assert ended.code == code, ended
        if code == 5:
            self._mend(what, key, content)
        assert world.dump(self.settings.database_url.reveal()) == rows
        assert world.objects(self.settings).items() >= sound.items()

    def _read(self, key: str) -> bytes:
        with closing(Storage(self.settings)) as storage:
            return storage.read(key, 1 << 20)

    def _has_source(self, key: str, digest: str) -> bool:
        """Say whether the photo that was sent is still in its dataset."""
        [(path,)] = self._sql(_SOURCE, key) or [(None,)]
        return (
            path is not None and Path(path).exists() and hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
        )

    def _damage(self, what: str, key: str, content: bytes) -> None:
        with closing(Storage(self.settings)) as storage:
            if what == "missing":
                assert storage.remove([key]) == []
            elif what == "damaged":
                storage.upload(key, content[:-1] + bytes([content[-1] ^ 1]))
            elif what == "orphan":
                storage.upload(STRANGER, content)
            elif what in _ROWS:
                self._sql("CREATE TABLE public.sound AS SELECT * FROM public.images WHERE storage_path = %s", key)
                self._sql(f"UPDATE public.images SET {what} WHERE storage_path = %s", key)

    def _mend(self, what: str, key: str, content: bytes) -> None:
        if what in _ROWS:
            self._sql(
                "UPDATE public.images i SET sha256 = s.sha256, byte_size = s.byte_size, storage_path = s.storage_path"
                " FROM public.sound s WHERE s.id = i.id"
            )
            self._sql("DROP TABLE public.sound")
        else:
            with closing(Storage(self.settings)) as storage:
                storage.upload(key, content)

    @precondition(lambda self: self._objects(unfinished=True))
    @rule(data=st.data())
    def the_bucket_loses_an_object_of_an_unfinished_batch(self, data: st.DataObject) -> None:
        if there := sorted(self._objects(unfinished=True).keys() & world.objects(self.settings).keys()):
            with closing(Storage(self.settings)) as storage:
                assert storage.remove([data.draw(st.sampled_from(there))]) == []

    @precondition(lambda self: self._ours() or self.model.unfinished())
    @rule(
        data=st.data(),
        program=st.sampled_from(["load", "discover", "publish", "reset", "verify"]),
        wrong=st.sampled_from(["key", "role", "user"]),
    )
    def a_command_with_a_wrong_key(self, data: st.DataObject, program: str, wrong: str) -> None:
        name = data.draw(st.sampled_from(sorted([*self._ours(), *self.model.unfinished()])))
        batch = self.model.batches[name]
        if batch.kind == "qwen" and wrong != "user":  # once discovered, it asks Storage for nothing
            program = "verify"
        command = {
            "publish": ["publish", "--batch-id", name],
            "reset": ["reset", "--batch-id", name, "--confirm"],
            "verify": ["verify", "--repair"],
        }.get(program) or self._command(name, program if program == "discover" else "")
        env = {
            "key": {"SUPABASE_SERVICE_ROLE_KEY": mint_key("the secret of another project, which is as long")},
            "role": {"SUPABASE_SERVICE_ROLE_KEY": mint_key("a secret for tests, at least 32 bytes long", "anon")},
            "user": {"DATABASE_URL": self.settings.database_url.reveal().replace("postgres@", "nobody:wrong@")},
        }[wrong]
        codes = {2}
        if wrong != "user" and program in ("load", "discover", "publish"):  # where Storage is not asked
            codes |= (
                {0} if batch.version is not None else {6} if batch.is_held else {4} if program == "publish" else set()
            )
        self._changes_nothing(codes, *command, env=env)

    @rule()
    def migrate_again(self) -> None:
        self._changes_nothing({0}, "migrate")
