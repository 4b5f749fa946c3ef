"""Checks of single values from callers and files. Each returns the value in its plain Python type.

Every function takes the name for its message (a keyword, or `config.json: field`) and raises
ValueError. A bool does not count as a number; numpy's numbers do.
"""

import json
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

MAX_INT32 = 2**31 - 1
MAX_JSON_BYTES = 64 << 20  # the weight index of a large model takes some megabytes
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1  # 64 bits, signed or unsigned


def check_int(name: str, value: object, minimum: int, maximum: int = MAX_INT32) -> int:
    """Return `value` as an int; it must be within `minimum` and `maximum`, both included."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}={value!r} must be a whole number")
    number = int(value)
    if number < minimum:
        raise ValueError(f"{name}={number} must be at least {minimum}")
    if number > maximum:
        raise ValueError(f"{name}={number} must be at most {maximum}")
    return number


def check_number(name: str, value: object) -> float:
    """Return `value` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}={number} must be finite")
    return number


def check_bool(name: str, value: object) -> bool:
    """Return `value`, which must be True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return `value`, which must be one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something other than one JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {size} bytes; more than {MAX_JSON_BYTES} are not read as JSON"
        )
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, endless nesting
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def are_ints(values: Iterable[object]) -> bool:
    """Whether all values are Python's own ints. A loop over 140,000 values takes 100 ms."""
    return set(map(type, values)) <= {int}  # a bool has the type bool


def is_unicode(text: str) -> bool:
    """Whether a string has no lone surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(value: object) -> str:
    """Return a value's repr for a message, shortened to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
