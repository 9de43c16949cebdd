"""What the canteen of a sample dataset serves: a catalogue, out of it a menu a day, out of that a receipt a tray."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from random import Random

from pipeline.sample.photo import BAKERY, DESSERT, DRINK, GARNISH, MAIN, SALAD, SOUP, TINTS, Look, Style

FIRST_DAY = date(2025, 10, 11)
MENU_ENTRIES = 200

# Category, its style, its share of the receipts, prices in roubles, dishes, and what they come with.
_CATEGORIES: tuple[tuple[str, Style, int, tuple[int, int], str, str], ...] = (
    (
        "Супы",
        SOUP,
        20,
        (95, 240),
        "Борщ|Щи из свежей капусты|Солянка мясная|Рассольник|Суп гороховый|Суп-лапша куриная|Харчо|Уха|Суп-пюре",
        "|со сметаной|с гренками|с зеленью|с говядиной|0,5 порции|по-домашнему",
    ),
    (
        "Горячие блюда",
        MAIN,
        24,
        (150, 420),
        "Котлета домашняя|Гуляш|Биточки куриные|Плов|Рыба запечённая|Бефстроганов|Тефтели|Печень тушёная|Голубцы",
        "|в томатном соусе|в сметанном соусе|с грибами|с сыром|с луком|на пару",
    ),
    (
        "Гарниры",
        GARNISH,
        20,
        (60, 130),
        "Рис отварной|Гречка рассыпчатая|Пюре картофельное|Макароны|Капуста тушёная|Картофель жареный|Булгур|Кускус",
        "|с маслом|с овощами|с укропом|с сыром|с морковью|150 г",
    ),
    (
        "Салаты",
        SALAD,
        18,
        (80, 210),
        "Винегрет|Оливье|Салат из капусты|Салат греческий|Сельдь под шубой|Салат из свёклы|Цезарь|Морковь по-корейски",
        "|с курицей|с чесноком|с брынзой|с кунжутом|с оливковым маслом|100 г",
    ),
    (
        "Выпечка и хлеб",
        BAKERY,
        14,
        (6, 95),
        "Хлеб ржаной|Хлеб пшеничный|Булочка|Пирожок|Ватрушка|Сочник|Самса|Слойка",
        "|с маком|с капустой|с творогом|с яблоком|с мясом|с корицей",
    ),
    (
        "Напитки",
        DRINK,
        14,
        (35, 160),
        "Компот|Морс|Чай чёрный|Чай зелёный|Кофе|Кисель|Какао|Сок",
        "|из смородины|с лимоном|с молоком|без сахара|200 мл|300 мл",
    ),
    (
        "Десерты",
        DESSERT,
        8,
        (70, 190),
        "Торт «Наполеон»|Чизкейк|Желе|Запеканка творожная|Пирожное «Картошка»|Медовик|Панакота|Шарлотка",
        "|с ягодами|с шоколадом|со сгущёнкой|с орехами|с карамелью|с мёдом",
    ),
)


@dataclass(frozen=True)
class Dish:
    """A dish of the catalogue: as the menu knows it, and as it looks on a tray."""

    external_id: str
    name: str
    category: int
    price: float
    look: Look

    def entry(self, day: date) -> dict[str, object]:
        """Return the dish as an entry of AM.json."""
        number = int(self.external_id)
        return {
            "ExternalId": self.external_id,
            "Name": self.name,
            "Category": _CATEGORIES[self.category][0],
            "Price": self.price,
            "Unit": "порц",
            "WeightGrams": 50 + number * 37 % 300,
            "Calories": 40 + number * 53 % 420,
            "Barcode": f"46{number:011d}",
            "Allergens": ["глютен", "молоко", "яйцо"][: number % 4],
            "IsActive": True,
            "ImageUrl": None,
            "UpdatedAt": f"{day.isoformat()}T06:30:00+03:00",
        }


@dataclass(frozen=True)
class Line:
    """A line of a receipt; more than one dish means that the till could not tell them apart."""

    count: int
    dishes: tuple[Dish, ...]


@dataclass(frozen=True)
class Menu:
    """The menu of a day, with the bytes of its AM.json."""

    day: date
    categories: tuple[tuple[Dish, ...], ...]
    content: bytes

    def receipt(self, random: Random) -> list[Line]:
        """Return what one guest took: one to five lines."""
        weights = [category[2] for category in _CATEGORIES]
        taken: set[str] = set()
        lines = []
        for _ in range(random.choices((1, 2, 3, 4, 5), (22, 33, 28, 12, 5))[0]):
            offered = random.choices(self.categories, weights)[0]
            options = random.choices((1, 2, 3), (88, 9, 3))[0]
            dishes = tuple(dish for dish in random.sample(offered, options) if dish.external_id not in taken)
            if dishes:
                taken.update(dish.external_id for dish in dishes)
                lines.append(Line(random.choices((1, 2, 3), (86, 11, 3))[0], dishes))
        return lines

    def any_dish(self, random: Random) -> Dish:
        """Return a dish of the day."""
        return random.choice(random.choice(self.categories))


@lru_cache(maxsize=4)
def menu_of_day(seed: int, number: int) -> Menu:
    """Return the menu of the day of that number, from 0; every fourth day or so its file begins with a BOM."""
    random = Random(f"{seed}:menu:{number}")
    day = FIRST_DAY + timedelta(days=number)
    served = sorted(random.sample(_catalogue(seed), MENU_ENTRIES), key=lambda dish: (dish.category, dish.external_id))
    text = to_json([dish.entry(day) for dish in served])
    content = (b"\xef\xbb\xbf" if random.random() < 0.25 else b"") + text
    categories = (tuple(dish for dish in served if dish.category == index) for index in range(len(_CATEGORIES)))
    return Menu(day, tuple(categories), content)


def receipt_json(lines: list[Line]) -> list[dict[str, object]]:
    """Return the receipt as correct_dishes.json has it."""
    return [
        {
            "Count": line.count,
            "Dishes": [{"Name": dish.name, "ExternalId": dish.external_id} for dish in line.dishes],
        }
        for line in lines
    ]


def to_json(value: object) -> bytes:
    """Return JSON as the till writes it: UTF-8, Cyrillic as it is."""
    return json.dumps(value, ensure_ascii=False).encode()


@lru_cache(maxsize=1)
def _catalogue(seed: int) -> list[Dish]:
    random = Random(f"{seed}:catalogue")
    dishes: list[Dish] = []
    for index, (_, style, _, (low, high), names, additions) in enumerate(_CATEGORIES):
        for name in names.split("|"):
            for addition in additions.split("|"):
                price = random.randrange(low * 2, high * 2) / 2
                external_id = f"{104_500 + 3 * len(dishes)}"
                look = Look(style, random.randrange(TINTS))
                dishes.append(Dish(external_id, f"{name} {addition}".strip(), index, price, look))
    return dishes
