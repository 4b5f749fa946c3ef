"""Numbers in JSON schemas, put so that llguidance gets them right with its doubles and int64.

A bound becomes an inclusive one: a double on the inner side of what the caller wrote, within the
range in which llguidance writes decimal digits right. No answer lies outside the caller's bounds;
beyond 2**53 some between them, next to a bound that is no double, cannot be given.
"""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

_MAX_COUNT = 2**31 - 1  # of letters or items, more than any answer has
MAX_EXPONENT = 400  # of ten; doubles end at 308
_SAFE = 2**53  # up to here every whole number is a double
# The largest double below 2**63: llguidance reads the digits of a bound into an int64.
_LIMIT = 2**63 - 1024
# A whole number's bound is cast to an int64, which makes 2**63 - 1 of this double.
_INT_LIMIT = 2**63
# Below it a one-sided bound works; from here on llguidance fails to find the next power of ten.
_ONE_SIDED = 10**18
# Digits nest as parentheses in a regular expression, whose depth is limited.
_TINY = Decimal("1e-20")
# Exclusive bounds become inclusive ones this many doubles further in: the compiler's JSON parser
# may be one off. From 2**49 on that would pass whole numbers over.
_STEPS = 4
_COARSE = 2**49


def rewrite_bounds(schema: dict[str, Any], at: str) -> None:
    """Make inclusive doubles of the bounds of numbers in `schema`, in place.

    Raises:
        ValueError: a bound is no number, or leaves no number that could be written; begins with
            `at`.
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
    leaves_some = low is None or high is None or low > high  # which the compiler refuses
    if not leaves_some and schema["minimum"] > schema["maximum"]:
        raise ValueError(f"{at}no number that could be written lies between its bounds")
    if (step := schema.get("multipleOf")) is not None:
        _check_step(step, at)


_AS_TEXT = "larger numbers cannot be followed: describe a text of digits by type string and pattern"


def _bound(
    schema: dict[str, Any], inclusive: str, exclusive: str, inward: int, at: str
) -> Decimal | None:
    """Both keywords, which are taken out, as one inclusive bound; `inward` is 1 or -1."""
    number, strict = schema.pop(inclusive, None), schema.pop(exclusive, None)
    if isinstance(strict, bool):  # as draft 4 has it
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
    """What lies inward of `number`, and outward of every whole number that does."""
    if number == 0:
        return inward * _TINY
    if abs(number) >= _COARSE:
        return (number * inward + 1).to_integral_value(ROUND_FLOOR) * inward
    double = _rounded(number, inward)
    for _ in range(_STEPS):
        double = math.nextafter(double, inward * math.inf)
    return Decimal(repr(double))


def _rounded(number: Decimal, inward: int) -> float:
    """The nearest double that lies inward of `number`, or is equal, also as it is written.

    llguidance writes whole numbers either exactly or, like other numbers, in as few digits as tell
    the double from others.
    """
    double = float(number)
    while (Decimal(repr(double)) - number) * inward < 0 or (
        double.is_integer() and (Decimal(double) - number) * inward < 0
    ):
        double = math.nextafter(double, inward * math.inf)
    return double


def _plain(number: float) -> int | float:
    """Whole numbers as int: the compiler's JSON parser reads those without rounding."""
    return int(number) if number == math.floor(number) else number


def _decimal(value: Any, name: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(f"{name}={value!r} must be a number")
    number = Decimal(value)
    if number.is_nan():
        raise ValueError(f"{name}={value} must be a number")
    # beyond doubles, as infinity is; Decimal's own arithmetic would overflow
    if not number.is_finite() or number.adjusted() > MAX_EXPONENT:
        return Decimal((number.is_signed(), (1,), MAX_EXPONENT))
    return number if number.adjusted() > -MAX_EXPONENT else number * 0


def _check_step(step: Any, at: str) -> None:
    """Whether llguidance can make a whole number of it, as it does: tenfold, in doubles."""
    if step == 0:
        raise ValueError(f"{at}multipleOf=0 must be more than 0")
    number = abs(float(_decimal(step, f"{at}multipleOf")))
    while number < 2**32 and number != math.floor(number):
        number *= 10
    if number >= 2**32 or number == 0:
        raise ValueError(
            f"{at}multipleOf={step} cannot be followed; use a power of ten, such as 0.01, or whole "
            "numbers of a smaller unit"
        )


def count(keyword: str, value: Any, place: str) -> int:
    """The value of a keyword that bounds how many letters, items or properties there are.

    Raises:
        ValueError: it is no whole number from 0 on, or no answer has so many.
    """
    number = _decimal(value, place)
    if number < 0 or number != number.to_integral_value():
        raise ValueError(f"{place}={value} must be a whole number, and not negative")
    if number > _MAX_COUNT and keyword.startswith("min"):
        raise ValueError(f"{place}={value} is more than any answer has; lower it")
    return int(min(number, Decimal(_MAX_COUNT)))


def constant(value: Any, place: str) -> Any:
    """A value of const or enum, with numbers that llguidance takes for what they are.

    Raises:
        ValueError: a number in it is no double, or is beyond 64 bits.
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
            f"{place}: {value} cannot be given exactly, as whole numbers beyond {_SAFE} may not; "
            "use the digits as a text"
        )
    return _plain(double)
