"""The commands that load and remove, with the model beside them, and what must hold after each command.

Commands are really run, and some are really killed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.config import Settings
from pipeline.units import counted
from tests import world
from tests.model.batches import Batch, Batches
from tests.model.dataset import DATASETS, FIRST, Boxes, Dataset, Editions, Tray
from tests.runner import Ended, Runner

KINDS = st.sampled_from(["load", "load", "qwen"])
OPTIONS = st.sampled_from(["", "--force", "--changed"])
NAMES = st.sampled_from(sorted(DATASETS))
EDITION = st.sampled_from([0, 1])


class Machine(RuleBasedStateMachine):
    """The commands, the model beside them, and what must hold after each."""

    editions: ClassVar[Editions]
    #: Gives every sequence a database, a bucket and a working directory of its own.
    place: ClassVar[Callable[[], AbstractContextManager[tuple[Settings, Runner]]]]

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self.settings, self.runner = self._stack.enter_context(type(self).place())
        self.datasets = {
            name: Dataset(self.editions, self.runner.folder / name, edition, [FIRST + number for number in numbers])
            for name, (edition, numbers) in DATASETS.items()
        }
        self.model = Batches()
        self.notes: set[int] = set()
        #: Recognitions that another tool loaded and that are not on record, and those whose photos no rule changes.
        self.unadopted: set[int] = set()
        self.kept_photos: set[int] = set()
        self._names = 0

    @initialize()
    def an_app_has_a_table_that_references_ours(self) -> None:
        self._sql(
            "CREATE TABLE public.notes (recognition_id bigint PRIMARY KEY REFERENCES public.recognitions (id),"
            " item_id bigint REFERENCES public.initial_tray_items (id))"
        )

    def _sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return world.query(self.settings.database_url.reveal(), statement, values)

    # What there is to load

    @rule(
        data=st.data(),
        name=NAMES,
        files=st.tuples(EDITION, EDITION, st.sampled_from([0, 1, None]), st.sampled_from([0, 1, None])),
        how=st.sampled_from(["change", "change", "export again", "remove", "lose a photo"]),
    )
    def files_change(self, data: st.DataObject, name: str, files: tuple[Any, ...], how: str) -> None:
        dataset = self.datasets[name]
        unfinished = [self.model.batches[one] for one in self.model.unfinished()]
        under_way = {number for one in unfinished if one.dataset == name for number in one.trays}
        if free := sorted(dataset.trays.keys() - under_way):
            number, tray = data.draw(st.sampled_from(free)), Tray(*files)
            if number in self.kept_photos:
                tray = tray._replace(main=0, qualifying=0)
            if how == "export again":
                dataset.export_again(number, tray)
            elif how == "remove":
                dataset.remove(number)
            else:
                dataset.change(number, tray if how == "change" else tray._replace(main=None))

    @rule(data=st.data(), name=NAMES, boxes=st.tuples(*[st.sampled_from([0, 1, None])] * 2))
    def boxes_change(self, data: st.DataObject, name: str, boxes: Boxes) -> None:
        dataset = self.datasets[name]
        dataset.change_boxes(data.draw(st.sampled_from(sorted(dataset.boxes))), boxes)

    def _discovered(self, kind: str, dataset: str, option: str) -> Batch:
        """Return the batch that a discovery would make now."""
        batch, loaded, found = Batch(kind, dataset, option), self.model.loaded(), self.datasets[dataset]
        if kind == "load":
            chosen = {
                number: tray
                for number, tray in found.trays.items()
                if number not in self.unadopted
                if option == "--force"
                or number not in loaded
                or (option == "--changed" and tray.differs(loaded[number]))
            }
            batch.trays = {number: tray for number, tray in chosen.items() if tray.is_usable}
            batch.rejects = dict.fromkeys(chosen.keys() - batch.trays.keys(), "")
        else:
            batch.trays = loaded
            chosen_boxes = {n: self._chosen_boxes(n, boxes, option) for n, boxes in found.boxes.items() if n in loaded}
            batch.boxes = {number: boxes for number, boxes in chosen_boxes.items() if boxes != (None, None)}
            rejected = found.boxes.keys() - loaded.keys() - self.unadopted
            batch.rejects = {n: self.model.holding(n) for n in rejected if found.boxes[n] != (None, None)}
        return batch

    def _chosen_boxes(self, number: int, boxes: Boxes, option: str) -> Boxes:
        shown = self.model.annotated()[number]

        def chosen(camera: int) -> int | None:
            edition = boxes[camera]
            is_new = shown[camera] is None or (option == "--changed" and shown[camera] != edition)
            is_other = self.model.were_for_another(number, camera, edition)
            return edition if option == "--force" or (is_new and not is_other) else None

        return chosen(0), chosen(1)

    def _ours(self) -> list[str]:
        """Return the finished batches that a load made."""
        return [name for name, batch in self.model.done("load") if batch.dataset]

    def _command(self, name: str, program: str = "") -> list[str]:
        batch = self.model.batches[name]
        dataset = self.datasets[batch.dataset]
        what = ["--source", str(dataset.folder)] if batch.kind == "load" else ["--file", str(dataset.file)]
        program = program or ("load" if batch.kind == "load" else "load-qwen")
        local = [] if program == "discover" else ["--local-scheduler"]
        return [program, *what, "--batch-id", name, *local, *filter(None, [batch.option])]

    # Commands

    def _begin_batch(self, kind: str, dataset: str, option: str) -> tuple[str, set[int]]:
        """Begin a batch in the model; return its name, and the codes with which its load may end."""
        self._let_go(option)
        batch = self._discovered(kind, dataset, option)
        chosen = batch.numbers
        for other in self.model.unfinished():  # what an unfinished batch holds is not for another
            if self.model.batches[other].kind == kind:
                aside = self.model.batches[other].aside & self._claimed(other)  # at its commit, not by discovery
                for number in self.model.batches[other].numbers | aside:
                    (batch.trays if kind == "load" else batch.boxes).pop(number, None)
        self._names += 1
        name = f"{kind}{self._names}"
        self.model.batches[name] = batch
        rest_is_in_use = all(self._is_in_use(number, batch) for number in batch.numbers)
        if chosen - batch.numbers and rest_is_in_use and not self.model.fresh(name):
            return name, {3}
        # A reject of a recognition is known where another source had the same.
        # Of annotations, what is not adopted could have been used.
        is_open = kind == "load" or self.unadopted & self.datasets[dataset].boxes.keys()
        may_be_known = {0, 3} if is_open and batch.rejects and not batch.numbers else set()
        return name, {self._code(name), *may_be_known}

    def _let_go(self, option: str) -> None:
        """Let the app let go of items: a new version whose receipts lack one would be refused."""
        if option:
            self._sql("UPDATE public.notes SET item_id = NULL")

    @rule(
        kind=KINDS,
        dataset=NAMES,
        option=OPTIONS,
        kill_after=st.one_of(st.none(), st.integers(0, 70)),
    )
    def load(self, kind: str, dataset: str, option: str, kill_after: int | None) -> None:
        name, codes = self._begin_batch(kind, dataset, option)
        ended = self.runner(*self._command(name), kill_after=kill_after)
        assert ended.code in (codes if kill_after is None else {*codes, -9}), ended
        self._settle(name)

    def _settle(self, name: str) -> None:
        """Take over what became of a killed command: not begun, begun, or finished; nothing else may be."""
        states = dict(self._sql("SELECT id, state FROM ingest.batches WHERE id = %s", name))
        state = states.get(name)
        if state is None:
            del self.model.batches[name]
        elif state == "done":
            self._leave_aside(name)
            self.model.finish(name)
        else:
            assert state in ("loading", "held")
            self.model.batches[name].is_held = state == "held"
            self._leave_aside(name, self._listed(name))

    def _claimed(self, name: str) -> set[int]:
        return {number for (number,) in self._sql("SELECT recognition_id FROM ingest.claims WHERE batch_id = %s", name)}

    def _listed(self, name: str) -> set[int]:
        found = self._sql("SELECT recognition_id FROM ingest.manifest WHERE batch_id = %s AND NOT rejected", name)
        return {number for (number,) in found}

    def _leave_aside(self, name: str, listed: set[int] | None = None) -> None:
        """Take out of a batch what is in use: all of it, or what a killed command got to."""
        batch = self.model.batches[name]
        used = {number for number in batch.numbers if self._is_in_use(number, batch)}
        if listed is not None:
            assert batch.numbers - used <= listed <= batch.numbers
            used = batch.numbers - listed
        for number in used:
            batch.leave(number)

    def _is_in_use(self, number: int, batch: Batch) -> bool:
        """Say whether a batch that is finished now would delete rows on which people work."""
        return False

    def _is_refused(self, without: Batches) -> bool:
        """Say whether a reset that leaves these batches would."""
        return False

    def _code(self, name: str) -> int:
        """The exit code of a load that runs to its end."""
        batch = self.model.batches[name]
        is_usable = batch.numbers or batch.aside
        is_unusable = not is_usable and self.model.fresh(name)
        return 6 if batch.is_held or batch.is_doubted or is_unusable else 0

    def _draw_unfinished(self, data: st.DataObject) -> str:
        name = data.draw(st.sampled_from(self.model.unfinished()))
        self._let_go(self.model.batches[name].option)
        return name

    @precondition(lambda self: self.model.unfinished())
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        name = self._draw_unfinished(data)
        self._check_resumed(name, self.runner(*self._command(name)))

    def _check_resumed(self, name: str, ended: Ended) -> None:
        assert ended.code == self._code(name), ended
        self._settle(name)
        assert name not in self.model.batches or (self.model.batches[name].version is None) == (ended.code == 6)

    @precondition(lambda self: self.model.unfinished())
    @rule(data=st.data())
    def a_check_speaks_against_a_batch(self, data: st.DataObject) -> None:
        name = self._draw_unfinished(data)
        self._sql("UPDATE ingest.batches SET held_reason = 'It is doubted.' WHERE id = %s AND state = 'loading'", name)
        self.model.batches[name].is_doubted = True

    @precondition(lambda self: self.model.unfinished())
    @rule(data=st.data(), kill_after=st.one_of(st.none(), st.integers(0, 14)))
    def publish(self, data: st.DataObject, kill_after: int | None) -> None:
        name = self._draw_unfinished(data)
        command = ["publish", "--batch-id", name]
        if not self.model.batches[name].is_held:
            self._changes_nothing({4}, *command)
            return
        self._to_its_end(kill_after, *command)
        self._leave_aside(name)
        self.model.finish(name)

    def _to_its_end(self, kill_after: int | None, *command: str) -> None:
        """Run a command, killed or not, and once more where it may have been killed."""
        if kill_after is not None:
            first = self.runner(*command, kill_after=kill_after)
            assert first.code in (0, -9), first
        ended = self.runner(*command)
        assert ended.code == 0, ended

    @precondition(lambda self: self.model.batches)
    @rule(data=st.data(), kill_after=st.one_of(st.none(), st.none(), st.integers(0, 14)))
    def reset(self, data: st.DataObject, kill_after: int | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.batches)))
        command = ["reset", "--batch-id", name, "--confirm"]
        without = self.model.without(name)
        referenced = (self.model.shown().keys() - without.shown().keys()) & self.notes
        if referenced:
            ended = self._changes_nothing({4}, *command)
            assert f"public.notes ({counted(len(referenced), 'row')}, to public.recognitions)" in ended.stderr
            return
        self._let_go("items that go with a change of version, too")
        if self._is_refused(without):
            self._changes_nothing({4}, *command, kill_after=kill_after)
            return
        self._to_its_end(kill_after, *command)
        del self.model.batches[name]

    def _changes_nothing(
        self, codes: set[int], *command: str, kill_after: int | None = None, env: dict[str, str] | None = None
    ) -> Ended:
        """Run a command that ends with one of the codes, if it is not killed, and changes nothing but proofs."""
        before = self._before()
        ended = self.runner(*command, kill_after=kill_after, env=env)
        assert ended.code in (codes if kill_after is None else {*codes, -9}), ended
        assert self._before() == before
        return ended

    def _before(self) -> object:
        dsn = self.settings.database_url.reveal()
        return world.dump(dsn), {**world.counts(dsn), "ingest.proofs": 0}, world.objects(self.settings)

    @precondition(lambda self: self._ours())
    @rule(data=st.data())
    def run_a_finished_batch_again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self._ours()))
        marker = "SELECT FROM ingest.batch_state WHERE batch_id = %s AND step = 'load'"
        if not self._sql(marker, name):  # it was killed after its commit
            assert self.runner(*self._command(name)).code == 0
        self._changes_nothing({0}, *self._command(name))

    # The app

    @precondition(lambda self: set(self.model.shown()) - self.notes)
    @rule(data=st.data())
    def the_app_writes_a_note(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(set(self.model.shown()) - self.notes)))
        self._sql(
            "INSERT INTO public.notes SELECT %s, (SELECT min(id) FROM public.initial_tray_items"
            " WHERE recognition_id = %s)",
            number,
            number,
        )
        self.notes.add(number)

    @precondition(lambda self: self.notes)
    @rule()
    def the_app_removes_its_notes(self) -> None:
        self._sql("DELETE FROM public.notes")
        self.notes.clear()

    # What holds after each

    @invariant()
    def readers_see_the_newest_versions(self) -> None:
        parts = [self._part(number, *tray) for number, tray in sorted(self._trays().items())]
        found = self._found()
        for name in vars(found):
            assert getattr(found, name) == [row for part in parts for row in getattr(part, name)], name

    def _trays(self) -> dict[int, tuple[Tray, str, Boxes]]:
        """Recognition -> what readers see of it: its files, its batch and its boxes."""
        shown, annotated = self.model.shown(), self.model.annotated()
        return {number: (tray, shown[number], annotated[number]) for number, tray in self.model.loaded().items()}

    def _part(self, number: int, tray: Tray, name: str, boxes: Boxes) -> world.Domain:
        return self.editions.expected(number, tray, name, boxes)

    def _found(self) -> world.Domain:
        """What readers see, without what people changed."""
        return world.domain(self.settings.database_url.reveal())

    @invariant()
    def the_bucket_holds_the_finished_batches_and_at_most_the_unfinished_ones(self) -> None:
        stored, sure, perhaps = self._stored(), self._objects(), self._objects(unfinished=True)
        assert {key: digest for key, digest in stored.items() if key not in perhaps} == sure
        assert {key: digest for key, digest in stored.items() if key in perhaps}.items() <= perhaps.items()

    def _stored(self) -> dict[str, str]:
        """Return key -> SHA-256 of the objects in the bucket that are for batches."""
        return world.objects(self.settings)

    def _objects(self, *, unfinished: bool = False) -> dict[str, str]:
        """Return key -> SHA-256 of what finished batches, or unfinished ones, have in the bucket."""
        return {
            key: digest
            for name, batch in self.model.batches.items()
            if batch.kind == "load" and batch.dataset and (batch.version is None) == unfinished
            for number, tray in batch.trays.items()
            for key, digest in self.editions.objects(number, tray, name).items()
        }

    @invariant()
    def the_database_does_not_contradict_itself(self) -> None:
        assert world.inconsistencies(self.settings) == []

    def teardown(self) -> None:
        """At the end all is finished, then all is reset, and nothing is left."""
        with self._stack:
            self._sql("DROP TABLE IF EXISTS public.notes")
            self._end_all_work()
            for name in self.model.batches:
                ended = self.runner("reset", "--batch-id", name, "--confirm")
                assert ended.code == 0, ended
            world.nothing(self.settings)

    def _end_all_work(self) -> None:
        """Let people end what they do."""
