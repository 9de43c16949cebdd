"""Random receipts and boxes of a tray, near to what it had before."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tests.annotating import Value, value_of

_NAMES = ["soup", "tea", "juice", "bread", "pie"]
_DISHES = [{"Name": name, "ExternalId": str(at)} for at, name in enumerate(_NAMES, start=1)]
_LABELS = ["dish_0", "dish_1", "dish_2", "dish_7", "plate"]


def random_receipt(chosen: random.Random, former: list[Any]) -> list[Any] | None:
    """Return no receipt, other lines, or others in front of the former ones."""
    if chosen.random() < 0.15:
        return None
    lines = [
        {"Count": chosen.randint(1, 3), "Dishes": chosen.sample(_DISHES, chosen.choice([1, 1, 2]))}
        for _ in range(chosen.randint(1, 4))
    ]
    if chosen.random() < 0.5:
        lines += former
    if chosen.random() < 0.5:
        chosen.shuffle(lines)
    return lines


def random_boxes(chosen: random.Random, former: Sequence[tuple[str, float, float, float, float]]) -> Value:
    """Return boxes of labels that lines have or not, and two former ones (label, x, y, w, h); some twice."""
    value = value_of(*chosen.choices(_LABELS, k=chosen.randint(1, 5)), left=chosen.choice([10, 30]))
    for label, x, y, w, h in chosen.sample(former, 2):
        other = chosen.choice([label, label, label, chosen.choice(_LABELS)])
        kind = "plates" if other == "plate" else "dishes"
        value[kind]["qwen_detections"].append({"bbox_2d": [x, y, x + w, y + h], "label": other})
    for kind_of in value.values():
        chosen.shuffle(kind_of["qwen_detections"])
    return value
