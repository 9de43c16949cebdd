"""The commands of an array engine: shards in any order, repeated, killed, and beside a load of the same batch."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.model.machine import KINDS, NAMES, OPTIONS, Machine


class Array(Machine):
    """The same with the commands of an array engine."""

    @rule(kind=KINDS, dataset=NAMES, option=OPTIONS, kill_after=st.one_of(st.none(), st.integers(0, 20)))
    def discover(self, kind: str, dataset: str, option: str, kill_after: int | None) -> None:
        name, codes = self._begin_batch(kind, dataset, option)
        ended = self.runner(*self._command(name, "discover"), kill_after=kill_after)
        assert ended.code in ({0, *codes - {6}} if kill_after is None else {0, 3, -9}), ended
        self._settle(name)

    @precondition(lambda self: self.model.unfinished())
    @rule(data=st.data(), of=st.integers(1, 3), kill_after=st.one_of(st.none(), st.none(), st.integers(0, 16)))
    def shards(self, data: st.DataObject, of: int, kill_after: int | None) -> None:
        name = self._draw_unfinished(data)
        indices = data.draw(st.lists(st.integers(0, of - 1), min_size=1, max_size=of))
        ended = self.runner(*self._shard(name, of, *indices), kill_after=kill_after)
        assert ended.code in (0, 0 if kill_after is None else -9), ended
        self._settle(name)

    def _shard(self, name: str, of: int, *indices: int) -> list[str]:
        return ["shard", "--batch-id", name, "--of", str(of), "--index", *map(str, indices)]

    @precondition(lambda self: self.model.unfinished())
    @rule(data=st.data(), kill_after=st.one_of(st.none(), st.none(), st.integers(0, 14)))
    def finish(self, data: st.DataObject, kill_after: int | None) -> None:
        name = self._draw_unfinished(data)
        if self._lacks_shards(name):
            self._changes_nothing({3}, "finish", "--batch-id", name, kill_after=kill_after)
            return
        if kill_after is not None:
            first = self.runner("finish", "--batch-id", name, kill_after=kill_after)
            assert first.code in (self._code(name), -9), first
        self._check_resumed(name, self.runner("finish", "--batch-id", name))

    def _lacks_shards(self, name: str) -> bool:
        batch, wanted = self.model.batches[name], "SELECT shards FROM ingest.batches WHERE id = %s"
        done = "SELECT count(*) FROM ingest.batch_state WHERE batch_id = %s AND step = 'copy'"
        return not batch.is_held and self._sql(done, name) != self._sql(wanted, name)

    @precondition(lambda self: self.model.unfinished())
    @rule(data=st.data())
    def shards_beside_a_load(self, data: st.DataObject) -> None:
        name = self._draw_unfinished(data)
        commands = [self._shard(name, 2, 0), self._command(name), ["finish", "--batch-id", name]]
        started = [self.runner.start(*command) for command in data.draw(st.permutations(commands))]
        ended = [one.finish() for one in started]
        code = self._code(name)
        # The load may hold the batch before a shard begins, and finish may come before the shards are done.
        codes = sorted(one.code for one in ended)
        assert codes in [sorted([shard, code, finish]) for shard in (0, code) for finish in (3, code)], ended
        self._settle(name)
        assert name not in self.model.batches or (self.model.batches[name].version is None) == (code == 6)
