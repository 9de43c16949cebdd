"""What counts as a price. The transform has the same rule in SQL, `ingest.price_of`, and a test compares the two."""

from __future__ import annotations

import re
from decimal import Decimal

#: An app's column has ten digits, two of them after the point.
MAXIMUM_PRICE = 10_000_000

_SPACE = r"[ \u00a0\u2009\u202f]"
_CURRENCY = r"(?:₽|€|[$]|£|₸|₴|₺|rub|eur|usd|gbp|kzt|[рР](?:[уУ][бБ])?[.]?)"
#: A decimal point or comma, but not before three digits that may be a group; groups only where they are no decimals.
_AMOUNT = (
    r"[+-]?(?:[0-9]{1,100}(?:[.](?:[0-9]{1,2}|[0-9]{4,100}))?"
    r"|(?:0|[0-9]{4,100})[.][0-9]{3}|[0-9]{1,100},[0-9]{1,2}|0,[0-9]{1,100}"
    rf"|[0-9]{{1,3}}(?:(?:{_SPACE}|['’])[0-9]{{3}})+(?:[.,][0-9]{{1,2}})?"
    r"|[0-9]{1,3}(?:,[0-9]{3})+[.][0-9]{1,2}|[0-9]{1,3}(?:[.][0-9]{3})+,[0-9]{1,2})"
)
_PRICE = re.compile(
    rf"{_SPACE}*(?:{_CURRENCY}{_SPACE}*)?({_AMOUNT})(?:{_SPACE}*{_CURRENCY})?{_SPACE}*", re.IGNORECASE | re.ASCII
)
_GROUPING = re.compile(rf"{_SPACE}|['’]|[.,](?=.*[.,])")


def is_price(value: object) -> bool:
    """Return whether a value of JSON is a price of at most two decimals: a number, or a text such as "1 234,50 ₽"."""
    if isinstance(value, str):
        found = _PRICE.fullmatch(value)
        value = float(_GROUPING.sub("", found[1]).replace(",", ".")) if found else None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) >= MAXIMUM_PRICE:
        return False
    amount = Decimal(f"{value:.15g}")
    return amount == round(amount, 2)
