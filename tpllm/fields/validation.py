"""Validation of a dataclass of settings by pydantic, from the types and ranges of its fields."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, get_type_hints

from tpllm.checks import short

# Pydantic's problems with a value, by kind, in our words.
PROBLEMS = {
    "bool_type": "must be True or False",
    "dataclass_exact_type": "must be a {class_name}",
    "dict_type": "must be a dict{of}",
    "finite_number": "must be finite",
    "float_type": "must be a number",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "must": "{words}",
    "string_type": "must be a string",
    "string_unicode": "is not valid Unicode",
    "tuple_type": "must be a list of {items}",
}
PLAIN = frozenset((bool, int, float, str, type(None)))


@dataclass(frozen=True)
class Must:
    """A condition on a value of the right type, as in `Annotated[str, Must(len, "is empty")]`.

    Attributes:
        holds: whether a value meets the condition
        words: the end of the error's sentence where it does not
    """

    holds: Callable[[Any], object]
    words: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import PydanticCustomError, core_schema

        def check(value: object) -> object:
            if not self.holds(value):
                raise PydanticCustomError("must", "{words}", {"words": self.words})
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))


def above(low: float, high: float) -> Must:
    """Return the condition `low < value <= high`."""
    return Must(lambda x: low < x <= high, f"must be more than {low:g} and at most {high:g}")


def between(low: float, high: float) -> Must:
    """Return the condition `low <= value <= high`."""
    return Must(lambda x: low <= x <= high, f"must be between {low:g} and {high:g}")


def check_fields(settings: Any) -> None:
    """Check every field of a frozen dataclass, and keep the values as plain Python objects.

    Numbers may be of any library. Any iterable is taken for a list, and kept as a tuple. Defaults
    are not checked: the SamplingParams of a request mostly have two or three other values.

    Raises:
        ValueError: a value is not of its field's type, or out of its range. The message leaves out
            the value of a field with `repr=False`, which is a secret.
    """
    kind: type = type(settings)
    for name, default in _defaults(kind):
        value = getattr(settings, name)
        if value is not default:
            object.__setattr__(settings, name, _check(kind, name, value))


@cache
def _defaults(settings: type) -> list[tuple[str, object]]:
    return [(field.name, field.default) for field in fields(settings)]


def _check(settings: type, name: str, value: object) -> object:
    try:
        return _validator(settings, name).validate_python(_plain(value))
    except ValueError as error:
        problems: list[dict[str, Any]] = error.errors()  # type: ignore[attr-defined]
    # of a union's alternatives take the list, and the item in it
    problem = max(problems, key=lambda each: (len(each["loc"]), each["type"] == "tuple_type"))
    path = problem["loc"]
    where = "".join(f"[{each}]" for each in path if isinstance(each, int))
    if path[-1:] == ("[key]",):
        where = " key"
    wrong = problem["input"]
    if isinstance(wrong, tuple) and not where:
        wrong = value  # as it was given
    items = "whole numbers" if "int, ..." in str(path) else "strings"
    hint = get_type_hints(settings)[name]
    of = " from token ids to numbers" if "int" in str(hint) else ""
    context = {"of": of, "items": items, **problem.get("ctx", {})}
    words = PROBLEMS.get(problem["type"], "is not of its type").format(**context)
    is_secret = not next(each.repr for each in fields(settings) if each.name == name)
    shown = "" if is_secret else f"={short(wrong)}"
    raise ValueError(f"{name}{where}{shown} {words}".replace("' or '", "', '"))


@cache
def _validator(settings: type, name: str) -> Any:
    # imported here: a worker gets settings that have been checked, and starts 0.1 s sooner
    from pydantic import ConfigDict, TypeAdapter

    hint = get_type_hints(settings, include_extras=True)[name]
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False)).validator


def _plain(value: object) -> object:
    """Return a number of any library as Python's, a path as text, and an iterable as a tuple."""
    if type(value) in PLAIN or isinstance(value, str | bytes):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        with suppress(TypeError):  # an array without dimensions only looks iterable
            return tuple(map(_plain, value))
    return value
