"""Texts of a chart: how wide they are, and where there is room for them. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

#: Width of the SVG in user units, of which a narrow window has fewer pixels.
WIDTH = 640
#: Font size in a narrow window (page.css), and letters by their width in DejaVu Sans, a wide font.
_EM = 19
_NARROW, _WIDE = " ,.:;|/()[]-ijlrtfI", "mwMW%@"
#: From a text to the right edge: letters are drawn a little wider than their font says.
_EDGE = 2


@dataclass(frozen=True)
class Text:
    """A text at its baseline; `anchor` is SVG's text-anchor."""

    x: float
    y: float
    text: str
    anchor: str = "middle"

    @property
    def ends(self) -> tuple[float, float]:
        """Return the x of its left and of its right end, in a narrow window."""
        width = width_of(self.text)
        left = self.x - {"start": 0, "middle": width / 2, "end": width}[self.anchor]
        return left, left + width


def width_of(text: str) -> float:
    """Return the width of a text in a narrow window, rounded up."""
    return _EM * sum(map(_em_of, text))


def _em_of(letter: str) -> float:
    """Return the width of a letter in em."""
    if letter in _WIDE or not letter.isascii():
        return 1.1
    if letter in _NARROW:
        return 0.42
    return 0.65 if letter.islower() or letter.isdigit() else 0.85


def fit(texts: Iterable[Text], least: float = 0) -> list[Text]:
    """Move the texts of a row between `least` and the right edge, and leave out each that would lie on one before."""
    fitting: list[Text] = []
    for text in texts:
        left, right = text.ends
        moved = replace(text, x=round(text.x - min(left - least, 0) - max(right - WIDTH + _EDGE, 0), 2))
        left, right = moved.ends
        if all(right < start or end < left for start, end in (one.ends for one in fitting)):
            fitting.append(moved)
    return fitting
