"""Keys and values of an annotations file, and what reading them comes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, settings

from pipeline.errors import BadInput, UsageError

Result = TypeVar("Result")

#: On a busy machine as well.
STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
KEY = "RRS_Dataset/export_1/recognition_{}/photos/recognition_{}_2025-10-11_{}.jpg"


def attempt(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """Return what the work came to, or its error."""
    try:
        return work(), None
    except (UsageError, BadInput) as exc:
        return None, exc


def key_of(number: int, camera: str = "Main") -> str:
    return KEY.format(number, number, camera)


def box(label: object = "dish_0", corners: object = (1, 2, 30, 40)) -> dict[str, object]:
    return {"bbox_2d": list(corners) if isinstance(corners, tuple) else corners, "label": label}


def value_of(*dishes: object, plates: tuple[object, ...] = ()) -> dict[str, object]:
    return {"dishes": {"qwen_detections": list(dishes)}, "plates": {"qwen_detections": list(plates)}}
