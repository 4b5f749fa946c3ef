"""Validation of a dataclass of settings by pydantic, from the types and ranges of its fields."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any, get_type_hints

from annotated_types import Interval

from tpllm.checks import short

# Pydantic's problems with a value, by kind, in our words.
PROBLEMS = {
    "bool_type": "must be True or False",
    "finite_number": "must be finite",
    "float_type": "must be a number",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "string_type": "must be a string",
    "string_unicode": "is not valid Unicode",
}


def check_fields(settings: Any) -> None:
    """Check every field of a frozen dataclass, and keep the values as plain Python objects.

    Raises:
        ValueError: a value is not of its field's type, or out of its range.
    """
    # imported here: a worker gets settings that have been checked, and starts 0.1 s sooner
    from pydantic import ValidationError

    kind: type = type(settings)
    model = _pydantic_model(kind)
    given = {name: _plain(getattr(settings, name)) for name in model.model_fields}
    try:
        checked = model(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        words = _words(problem, model.model_fields[name].metadata)
        raise ValueError(f"{name}={short(given[name])} {words}") from None
    for name, value in checked:
        object.__setattr__(settings, name, value)


@cache
def _pydantic_model(settings: type) -> Any:
    from pydantic import ConfigDict, create_model

    hints: Any = get_type_hints(settings, include_extras=True)
    required: Any = {field.name: (hints[field.name], ...) for field in fields(settings)}
    config = ConfigDict(strict=True, allow_inf_nan=False)
    return create_model(settings.__name__, __config__=config, **required)


def _plain(value: object) -> object:
    """A number of any library as Python's, and a path as text."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _words(problem: Mapping[str, Any], metadata: Iterable[object]) -> str:
    ranges = [each for each in metadata if isinstance(each, Interval) and each.gt is not None]
    if ranges and problem["type"] in ("greater_than", "less_than_equal"):
        return f"must be more than {ranges[0].gt} and at most {ranges[0].le:g}"
    words = PROBLEMS.get(problem["type"], "is not of its type")
    return words.format(**problem.get("ctx", {})).replace("' or '", "', '")
