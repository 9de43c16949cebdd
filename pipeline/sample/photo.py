"""Photos of canteen trays: trays and dishes are drawn once, then pasted together and encoded for each photo."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageChops, ImageDraw

#: Pixels of a cell, the unit in which places on a tray are given.
CELL = 16
CAMERAS = ("Main", "Qualifying")
TINTS = 4

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]

_QUALITY = 75
# Luminance noise of +-10: what makes a photo of 1280 x 720 weigh about 125 KB, as those of a real till do.
_NOISE = 0.078
_BACKGROUNDS = 4


@dataclass(frozen=True)
class Style:
    """How dishes of a category look: on a plate or not, its colours (one a tint), its pieces and their size."""

    plate: bool
    colours: tuple[Colour, Colour, Colour, Colour]
    pieces: int
    piece: float


SOUP = Style(True, ((168, 44, 38), (206, 158, 70), (150, 138, 60), (214, 120, 44)), 18, 0.07)
MAIN = Style(True, ((122, 70, 40), (176, 112, 58), (150, 60, 48), (204, 150, 96)), 9, 0.24)
GARNISH = Style(True, ((226, 202, 120), (168, 128, 84), (236, 214, 160), (200, 142, 60)), 64, 0.07)
SALAD = Style(True, ((92, 138, 58), (150, 52, 92), (184, 188, 110), (206, 96, 52)), 40, 0.13)
BAKERY = Style(False, ((196, 134, 66), (166, 100, 48), (214, 164, 98), (142, 84, 44)), 7, 0.05)
DRINK = Style(False, ((150, 50, 54), (196, 110, 36), (236, 232, 222), (104, 62, 36)), 3, 0.09)
DESSERT = Style(True, ((112, 66, 48), (238, 214, 200), (208, 110, 128), (232, 196, 96)), 14, 0.14)


@dataclass(frozen=True)
class Look:
    """What a dish looks like; equal looks are drawn alike within a dataset."""

    style: Style
    tint: int


@dataclass(frozen=True)
class Place:
    """Where a dish stands, in cells: the left upper corner of a square of `side`."""

    x: int
    y: int
    side: int


@dataclass(frozen=True)
class Photo:
    """A JPEG, and where in it the dishes and plates are: half-open pixel boxes, one a dish, `None` without a plate."""

    content: bytes
    dishes: tuple[Box, ...]
    plates: tuple[Box | None, ...]


@dataclass(frozen=True)
class _Sprite:
    """A dish and what of its picture is not tray; boxes are relative to the left upper corner."""

    image: Image.Image
    mask: Image.Image
    dish: Box
    plate: Box | None


class Layout:
    """The places on a tray, for pictures of one size.

    Arguments:
        size: width and height of the pictures in pixels, at least 96 x 48.
    """

    CAPACITY = 18

    def __init__(self, size: tuple[int, int]) -> None:
        self.columns, self.rows = size[0] // CELL, size[1] // CELL
        self.margin_x, self.margin_y = self.columns // 20, self.rows // 15

    def places(self, count: int, random: Random) -> list[Place]:
        """Return as many places that do not touch each other, at most `CAPACITY`, as the first camera sees them."""
        across, down = (4, 2) if count <= 8 and self.columns >= 8 else (6, 3)
        width = (self.columns - 2 * self.margin_x) // across
        height = (self.rows - 2 * self.margin_y) // down
        side = min(width, height)
        places = []
        for slot in random.sample(range(across * down), count):
            x = self.margin_x + slot % across * width + random.randrange(width - side + 1)
            y = self.margin_y + slot // across * height + random.randrange(height - side + 1)
            places.append(Place(x, y, side))
        return places

    def turned(self, place: Place) -> Place:
        """Return the place as the camera on the other side of the tray sees it."""
        return Place(self.columns - place.x - place.side, self.rows - place.y - place.side, place.side)


class Camera:
    """One of the two cameras: its view of the empty tray and of every dish, drawn once.

    Arguments:
        seed: of the dataset.
        size: width and height of the pictures in pixels.
        number: 0 for the first camera, 1 for the one that sees the tray from the other side.
    """

    def __init__(self, seed: int, size: tuple[int, int], number: int) -> None:
        self._seed, self._number = seed, number
        self._tray: Colour = ((176, 158, 132), (158, 150, 138))[number]
        self._scale = (0.94, 0.86)[number]
        tray = _draw_tray(size, self._tray, Layout(size), number)
        self._backgrounds = [_noisy(tray, Random(f"{seed}:tray:{number}:{variant}")) for variant in range(_BACKGROUNDS)]
        self._sprites: dict[tuple[Look, int], _Sprite] = {}

    def photograph(self, dishes: Sequence[tuple[Look, Place]], random: Random, comment: str) -> Photo:
        """Return a photo of the dishes at their places; `comment` goes into the file and makes it unique."""
        image = random.choice(self._backgrounds).copy()
        boxes: list[Box] = []
        plates: list[Box | None] = []
        for look, place in dishes:
            sprite = self._sprite(look, place.side)
            image.paste(sprite.image, (place.x * CELL, place.y * CELL), sprite.mask)
            boxes.append(_moved(sprite.dish, place))
            plates.append(_moved(sprite.plate, place) if sprite.plate else None)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_QUALITY, subsampling="4:2:0", comment=comment.encode())
        return Photo(file.getvalue(), tuple(boxes), tuple(plates))

    def _sprite(self, look: Look, side: int) -> _Sprite:
        sprite = self._sprites.get((look, side))
        if sprite is None:
            name = f"{self._seed}:{self._number}:{look.style.colours}:{look.tint}:{side}"
            sprite = _make_sprite(look, side, self._tray, self._scale, Random(name))
            self._sprites[look, side] = sprite
        return sprite


def without_decodable_data(content: bytes) -> bytes:
    """Return the photo with headers that hold and garbage where its Huffman tables and its picture were."""
    spoilt = bytearray(content)
    at = 2
    while spoilt[at + 1] != 0xDA:
        length = int.from_bytes(spoilt[at + 2 : at + 4], "big")
        if spoilt[at + 1] == 0xC4:
            # 255 codes of every length are more than a Huffman tree has room for: no decoder gets past that.
            spoilt[at + 5 : at + 2 + length] = b"\xff" * (length - 3)
        at += 2 + length
    start = at + 2 + int.from_bytes(spoilt[at + 2 : at + 4], "big")
    garbage = Random("garbage").randbytes(len(spoilt) - start - 2).replace(b"\xff", b"\xfe")
    return bytes(spoilt[:start]) + garbage + b"\xff\xd9"


def as_png(content: bytes) -> bytes:
    """Return the photo as a PNG, an eighth as wide."""
    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", (image.width // 8, image.height // 8))
        file = io.BytesIO()
        image.save(file, "PNG")
    return file.getvalue()


def _moved(box: Box, place: Place) -> Box:
    x, y = place.x * CELL, place.y * CELL
    return (box[0] + x, box[1] + y, box[2] + x, box[3] + y)


def _noisy(image: Image.Image, random: Random) -> Image.Image:
    noise = Image.frombytes("L", image.size, random.randbytes(image.width * image.height))
    noise = noise.point([round(128 + (value - 127.5) * _NOISE) for value in range(256)])
    return ImageChops.add(image, Image.merge("RGB", (noise, noise, noise)), 1, -128)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(value * factor)) for value in colour)
    return (red, green, blue)


def _draw_tray(size: tuple[int, int], colour: Colour, layout: Layout, number: int) -> Image.Image:
    """Return an empty tray on a wooden table; it is of one colour wherever a dish may stand."""
    wood = ((96, 74, 56), (84, 68, 54))[number]
    image = Image.new("RGB", size, wood)
    draw = ImageDraw.Draw(image)
    random = Random(f"wood:{number}")
    for y in range(0, size[1], 6):
        draw.line((0, y, size[0], y), fill=_shade(wood, random.uniform(0.88, 1.1)), width=random.randrange(1, 6))
    left, top = layout.margin_x * CELL, layout.margin_y * CELL
    right, bottom = layout.columns * CELL - left, layout.rows * CELL - top
    for factor, out in ((0.5, 18), (0.86, 14), (1.12, 10), (0.94, 3), (1.0, 0)):
        reach = out if layout.margin_x and layout.margin_y else 0
        outline = (left - reach, top - reach, right + reach - 1, bottom + reach - 1)
        draw.rounded_rectangle(outline, radius=reach * 2, fill=_shade(colour, factor))
    return image


def _make_sprite(look: Look, side: int, tray: Colour, scale: float, random: Random) -> _Sprite:
    """Draw a dish at twice its size, and halve it."""
    pixels = side * CELL
    across = int(pixels * scale)
    left, top = (random.randrange(pixels - across + 1) for _ in range(2))
    plate = (left, top, left + across, top + across)
    width, height = (max(4, round(across * random.uniform(0.56, 0.7))) for _ in range(2))
    if not look.style.plate:
        height = max(4, round(width * random.uniform(0.85, 1.0)))
    left, top = left + (across - width) // 2, top + (across - height) // 2
    dish = (left, top, left + width, top + height)

    canvas = Image.new("RGB", (2 * pixels, 2 * pixels), tray)
    if look.style.plate:
        _draw_plate(canvas, plate)
    _draw_dish(canvas, dish, look, random)
    small = canvas.resize((pixels, pixels), Image.Resampling.BOX)
    shown = ImageChops.difference(small, Image.new("RGB", small.size, tray)).convert("L")
    mask = shown.point([0] + 255 * [255])
    return _Sprite(_noisy(small, random), mask, dish, plate if look.style.plate else None)


def _inner(box: Box, factor: float) -> Box:
    """Return the box of the same centre at twice the scale and `factor` of the size, closed as Pillow draws it."""
    x, y = box[0] + box[2], box[1] + box[3]
    width, height = (box[2] - box[0]) * factor, (box[3] - box[1]) * factor
    return (round(x - width), round(y - height), round(x + width) - 1, round(y + height) - 1)


def _draw_plate(canvas: Image.Image, box: Box) -> None:
    draw = ImageDraw.Draw(canvas)
    for factor, grey in ((1.0, 118), (0.985, 236), (0.95, 226), (0.78, 200), (0.76, 242)):
        draw.ellipse(_inner(box, factor), fill=(grey, grey, grey - 6))


def _draw_dish(canvas: Image.Image, box: Box, look: Look, random: Random) -> None:
    """Draw the dish and its pieces; nothing of it reaches beyond the ellipse that fills the box."""
    colour = look.style.colours[look.tint]
    outline = _inner(box, 1.0)
    width, height = outline[2] - outline[0] + 1, outline[3] - outline[1] + 1
    food = Image.new("RGB", (width, height), _shade(colour, 0.72))
    draw = ImageDraw.Draw(food)
    inset = max(1, width // 24)
    draw.ellipse((inset, inset, width - 1 - inset, height - 1 - inset), fill=colour)
    for _ in range(look.style.pieces):
        reach = max(1, round(width * look.style.piece * random.uniform(0.5, 1.2)))
        x, y = random.randrange(width), random.randrange(height)
        flat = max(1, round(reach * random.uniform(0.5, 1.0)))
        draw.ellipse((x - reach, y - flat, x + reach, y + flat), fill=_shade(colour, random.uniform(0.72, 1.3)))
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).ellipse((0, 0, width - 1, height - 1), fill=255)
    canvas.paste(food, outline[:2], mask)
