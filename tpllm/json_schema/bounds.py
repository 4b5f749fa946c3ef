"""Rewrite numbers in JSON schemas so that llguidance, with doubles and int64, compiles them right.

Each bound becomes inclusive: the nearest double inside the caller's bound, within the range in
which llguidance generates correct decimal digits. No answer lies outside the caller's bounds.
Beyond 2**53, a few numbers next to a bound that is not a double cannot be generated.
"""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

_MAX_COUNT = 2**31 - 1  # characters or items, more than any answer has
MAX_EXPONENT = 400  # of ten; doubles end at 308
_SAFE = 2**53  # up to here every whole number is a double
# The largest double below 2**63: llguidance reads the digits of a bound into an int64.
_LIMIT = 2**63 - 1024
# llguidance casts an integer's bound to an int64; the cast turns this double into 2**63 - 1.
_INT_LIMIT = 2**63
# From here on llguidance fails on a one-sided bound: it cannot compute the next power of ten.
_ONE_SIDED = 10**18
# Digits are nested groups of a regular expression, whose depth is limited.
_TINY = Decimal("1e-20")
# Exclusive bounds become inclusive ones this many doubles further in, because llguidance's JSON
# parser may round by one double. From 2**49 on, that would skip whole numbers.
_STEPS = 4
_COARSE = 2**49


def rewrite_bounds(schema: dict[str, Any], at: str) -> None:
    """Replace the numeric bounds of `schema` by inclusive doubles, in place.

    Raises:
        ValueError: a bound is not a number, or no number lies between the bounds; the message
            begins with `at`.
    """
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    is_integer = "integer" in kinds and "number" not in kinds
    highest = _INT_LIMIT if is_integer else _LIMIT
    low = _bound(schema, "minimum", "exclusiveMinimum", 1, at)
    high = _bound(schema, "maximum", "exclusiveMaximum", -1, at)
    if is_integer:
        low = None if low is None else low.to_integral_value(ROUND_CEILING)
        high = None if high is None else high.to_integral_value(ROUND_FLOOR)
    limit = min(highest, _INT_LIMIT - 1)
    if low is not None and low > limit:
        raise ValueError(f"{at}minimum={low:.20g} is more than {limit}; {_AS_TEXT}")
    if high is not None and high < -_LIMIT:
        raise ValueError(f"{at}maximum={high:.20g} is less than {-_LIMIT}; {_AS_TEXT}")
    if low is not None and low >= _ONE_SIDED and high is None:
        high = Decimal(highest)
    if high is not None and high <= -_ONE_SIDED and low is None:
        low = Decimal(-_LIMIT)
    if low is not None:
        schema["minimum"] = _plain(max(_rounded(low, 1), -_LIMIT))
    if high is not None:
        reaches_limit = highest == _INT_LIMIT and high >= _INT_LIMIT - 1
        schema["maximum"] = _INT_LIMIT if reaches_limit else _plain(min(_rounded(high, -1), _LIMIT))
    unchecked = low is None or high is None or low > high  # llguidance refuses the last
    if not unchecked and schema["minimum"] > schema["maximum"]:
        raise ValueError(f"{at}no number that can be generated lies between its bounds; widen them")
    if (step := schema.get("multipleOf")) is not None:
        _check_step(step, at)


_AS_TEXT = "larger numbers are not supported; use type string and a pattern of digits"


def _bound(
    schema: dict[str, Any], inclusive: str, exclusive: str, inward: int, at: str
) -> Decimal | None:
    """Remove both keywords, and return them as one inclusive bound; `inward` is 1 or -1."""
    number, strict = schema.pop(inclusive, None), schema.pop(exclusive, None)
    if isinstance(strict, bool):  # draft 4
        number, strict = (None, number) if strict else (number, None)
    bounds = []
    if number is not None:
        bounds.append(_decimal(number, f"{at}{inclusive}"))
    if strict is not None:
        bounds.append(_beyond(_decimal(strict, f"{at}{exclusive}"), inward))
    if not bounds:
        return None
    bound = max(bounds) if inward > 0 else min(bounds)
    if 0 < abs(bound) < _TINY:
        return inward * _TINY if bound * inward > 0 else Decimal(0)
    return bound


def _beyond(number: Decimal, inward: int) -> Decimal:
    """Return a number just inward of `number`, before the next whole number in that direction."""
    if number == 0:
        return inward * _TINY
    if abs(number) >= _COARSE:
        return (number * inward + 1).to_integral_value(ROUND_FLOOR) * inward
    double = _rounded(number, inward)
    for _ in range(_STEPS):
        double = math.nextafter(double, inward * math.inf)
    return Decimal(repr(double))


def _rounded(number: Decimal, inward: int) -> float:
    """Return the nearest double that is equal to `number` or inward of it, also when printed.

    llguidance prints whole numbers either exactly or, like other numbers, in the fewest digits
    that identify the double.
    """
    double = float(number)
    while (Decimal(repr(double)) - number) * inward < 0 or (
        double.is_integer() and (Decimal(double) - number) * inward < 0
    ):
        double = math.nextafter(double, inward * math.inf)
    return double


def _plain(number: float) -> int | float:
    """Return whole numbers as int, which llguidance's JSON parser reads without rounding."""
    return int(number) if number == math.floor(number) else number


def _decimal(value: Any, name: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(f"{name}={value!r} must be a number")
    number = Decimal(value)
    if number.is_nan():
        raise ValueError(f"{name}={value} must be a number")
    # infinity, or beyond doubles, where Decimal's arithmetic would overflow
    if not number.is_finite() or number.adjusted() > MAX_EXPONENT:
        return Decimal((number.is_signed(), (1,), MAX_EXPONENT))
    return number if number.adjusted() > -MAX_EXPONENT else number * 0


def _check_step(step: Any, at: str) -> None:
    """Check that llguidance can scale a multipleOf to a whole number, by factors of 10 in doubles.

    Raises:
        ValueError: it cannot.
    """
    if step == 0:
        raise ValueError(f"{at}multipleOf=0 must be more than 0")
    number = abs(float(_decimal(step, f"{at}multipleOf")))
    while number < 2**32 and number != math.floor(number):
        number *= 10
    if number >= 2**32 or number == 0:
        raise ValueError(
            f"{at}multipleOf={step} is not supported; use a power of ten, such as 0.01, or whole "
            "numbers of a smaller unit"
        )


def count(keyword: str, value: Any, place: str) -> int:
    """Return the value of a keyword that limits the number of characters, items or properties.

    Raises:
        ValueError: the value is not a whole number from 0 on, or no answer can be so long.
    """
    number = _decimal(value, place)
    if number < 0 or number != number.to_integral_value():
        raise ValueError(f"{place}={value} must be a whole number, and not negative")
    if number > _MAX_COUNT and keyword.startswith("min"):
        raise ValueError(f"{place}={value} is more than any answer has; lower it")
    return int(min(number, Decimal(_MAX_COUNT)))


def constant(value: Any, place: str) -> Any:
    """Return a value of const or enum whose numbers llguidance reads exactly.

    Raises:
        ValueError: a number in it is not a double, or needs more than 64 bits.
    """
    if isinstance(value, list):
        return [constant(each, place) for each in value]
    if isinstance(value, dict):
        return {name: constant(each, place) for name, each in value.items()}
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    number = _decimal(value, place)
    double = float(number)
    is_whole = abs(double) >= _SAFE
    if abs(double) >= 2**63 or (is_whole and Decimal(double) != number):
        raise ValueError(
            f"{place}: {value} cannot be represented exactly, like many whole numbers beyond "
            f"{_SAFE}; use a string of digits"
        )
    return _plain(double)
