"""The model: batches, and what readers see of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tests.model.dataset import OLDER, Boxes, Tray


@dataclass
class Batch:
    """A batch of the model: what it holds, and when it was finished; None while it is not."""

    kind: str
    dataset: str
    option: str  # of the load: --force, --changed or none
    trays: dict[int, Tray] = field(default_factory=dict)  # of annotations: those that they are for
    boxes: dict[int, Boxes] = field(default_factory=dict)  # of annotations
    version: int | None = None
    rejects: dict[int, str] = field(default_factory=dict)  # and what their messages say of a load that holds them
    is_doubted: bool = False  # a check recorded a reason to hold it
    is_held: bool = False
    aside: set[int] = field(default_factory=set)  # left as they are, since people work on them

    @property
    def numbers(self) -> set[int]:
        """The recognitions that it holds."""
        return {*(self.trays if self.kind == "load" else self.boxes)}

    def leave(self, number: int) -> None:
        """Leave a recognition as it is."""
        self.aside.add(number)
        del (self.trays if self.kind == "load" else self.boxes)[number]


class Batches:
    """The model.

    Of each recognition readers see the newest finished batch that holds it, and on each photo the newest finished
    annotations that are for this photo.
    """

    def __init__(self) -> None:
        self.batches: dict[str, Batch] = {}
        self._versions = 0

    def done(self, kind: str) -> list[tuple[str, Batch]]:
        found = [(name, one) for name, one in self.batches.items() if one.kind == kind and one.version is not None]
        return sorted(found, key=lambda item: item[1].version or 0)

    def unfinished(self) -> list[str]:
        return [name for name, batch in self.batches.items() if batch.version is None]

    def shown(self) -> dict[int, str]:
        """Recognition -> the batch whose version of it readers see."""
        return {number: name for name, batch in self.done("load") for number in batch.trays}

    def loaded(self) -> dict[int, Tray]:
        """Recognition -> what readers see of it."""
        return {number: self.batches[name].trays[number] for number, name in self.shown().items()}

    def annotated(self) -> dict[int, Boxes]:
        """Recognition -> the boxes of its photos that readers see."""
        loaded = self.loaded()
        found: dict[int, list[int | None]] = {number: [None, None] for number in loaded}
        for _, batch in self.done("qwen"):
            for number, boxes in batch.boxes.items():
                for camera in (0, 1):
                    if number in loaded and boxes[camera] is not None and self._is_for(batch, number, camera, loaded):
                        found[number][camera] = boxes[camera]
        return {number: (first, second) for number, (first, second) in found.items()}

    def _is_for(self, batch: Batch, number: int, camera: int, loaded: dict[int, Tray]) -> bool:
        """Say whether annotations are for the photo that readers see."""
        photos = batch.trays[number][camera], loaded[number][camera]
        return photos[0] == photos[1] or OLDER.main in photos

    def were_for_another(self, number: int, camera: int, edition: int | None) -> bool:
        """Say whether boxes of a photo were loaded, and never for the one that readers see."""
        loaded = self.loaded()
        having = [one for _, one in self.done("qwen") if number in one.boxes and one.boxes[number][camera] == edition]
        return bool(having) and not any(self._is_for(one, number, camera, loaded) for one in having)

    def once_done(self, batch: Batch) -> Batches:
        """Return what there is once a batch is finished."""
        after = Batches()
        after.batches = {name: one for name, one in self.batches.items() if one is not batch}
        after.batches[""] = replace(batch, version=self._versions + 1)
        return after

    def without(self, name: str) -> Batches:
        """Return what there is without a batch."""
        without = Batches()
        without.batches = {other: one for other, one in self.batches.items() if other != name}
        return without

    def adopted(self, name: str) -> set[int]:
        """Return the recognitions of an adopted batch, none where there is no such batch."""
        return self.batches[name].numbers if name in self.batches else set()

    def finish(self, name: str) -> None:
        self._versions += 1
        self.batches[name].version = self._versions

    def holding(self, number: int) -> str:
        """Say which unfinished load has a recognition, and whether it is held; empty if none has it."""
        for name in self.unfinished():
            batch = self.batches[name]
            if batch.kind == "load" and number in batch.trays:
                return f"{name} held" if batch.is_held else name
        return ""

    def fresh(self, name: str) -> set[int]:
        """What a batch rejected, and no batch before it from the same source with the same message."""
        batch, names = self.batches[name], list(self.batches)
        earlier = [self.batches[other] for other in names[: names.index(name)]]
        known = [one.rejects for one in earlier if (one.kind, one.dataset) == (batch.kind, batch.dataset)]
        return {number for number, why in batch.rejects.items() if all(one.get(number) != why for one in known)}
