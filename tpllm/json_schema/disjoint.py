"""Check that the branches of a oneOf exclude each other, so that anyOf means the same."""

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import combinations
from typing import Any
from urllib.parse import unquote

_TYPES = frozenset({"null", "boolean", "number", "string", "array", "object"})
_MAX_DEPTH = 16  # levels of references and nested schemas that are followed
_MAX_COMPARISONS = 20_000  # some 0.1 s


def refuse_overlapping(branches: Sequence[Any], root: dict[str, Any], at: str) -> None:
    """Check that no two branches of a oneOf can match the same value.

    Raises:
        ValueError: two branches may match the same value; the message begins with `at`.
    """
    comparison = _Comparison(root)
    for (i, one), (k, other) in combinations(enumerate(branches), 2):
        if not comparison.exclude(one, other, _MAX_DEPTH):
            raise ValueError(
                f"{at}oneOf: its schemas {i} and {k} may match the same value, or there are too "
                "many schemas to compare; use anyOf, or give each its own type, or a required "
                "property with its own const or enum"
            )


def target(root: dict[str, Any], reference: Any) -> Any:
    """Return the part of `root` that a $ref points to; None if there is none."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: Any = root
    for step in unquote(reference[2:]).split("/"):
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            found = found.get(step) if isinstance(found, dict) else None
    return found


class _Comparison:
    """Compares schemas of one document, with a limit on the number of comparisons."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._num_left = _MAX_COMPARISONS

    def exclude(self, one: Any, other: Any, depth: int) -> bool:
        """Whether it is certain that no value matches both schemas."""
        self._num_left -= 1
        if one is False or other is False:
            return True
        if depth == 0 or self._num_left < 0:
            return False
        ones, others = list(self._parts(one, depth)), list(self._parts(other, depth))
        if any(self._differ(a, b, depth) for a in ones for b in others):
            return True
        sides = ((ones, other), (others, one))
        return any(self._choice_excludes(part, them, depth) for us, them in sides for part in us)

    def _choice_excludes(self, schema: dict[str, Any], other: Any, depth: int) -> bool:
        """Whether `schema` has an anyOf or oneOf whose branches all exclude `other`."""
        choices = [schema.get("anyOf"), schema.get("oneOf")]
        return any(
            all(self.exclude(each, other, depth - 1) for each in branches)
            for branches in choices
            if branches
        )

    def _parts(self, schema: Any, depth: int) -> Iterator[dict[str, Any]]:
        """Yield the schemas that a value must all match: this one, its reference and its allOf."""
        self._num_left -= 1
        if not isinstance(schema, dict) or depth == 0 or self._num_left < 0:
            return
        yield schema
        yield from self._parts(target(self._root, schema.get("$ref")), depth - 1)
        for each in schema.get("allOf") or ():
            yield from self._parts(each, depth - 1)

    def _differ(self, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        """Whether the keywords of the two schemas exclude each other."""
        types = _types(one) & _types(other)
        values, other_values = _values(one), _values(other)
        if not types or (values and other_values and values.isdisjoint(other_values)):
            return True
        required = (*(one.get("required") or ()), *(other.get("required") or ()))
        return types == {"object"} and any(
            self.exclude(_property(one, name), _property(other, name), depth - 1)
            for name in dict.fromkeys(required)
        )


def _types(schema: dict[str, Any]) -> frozenset[str]:
    kinds = schema.get("type")
    if kinds is None:
        values = _listed(schema)
        return _TYPES if values is None else frozenset(map(_type_of, values))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return frozenset("number" if kind == "integer" else kind for kind in kinds)


def _type_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    for kind, name in ((str, "string"), (list, "array"), (dict, "object")):
        if isinstance(value, kind):
            return name
    return "number"


def _listed(schema: dict[str, Any]) -> list[Any] | None:
    """Return the values that const or enum allows; None if neither is set."""
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _values(schema: dict[str, Any]) -> set[str] | None:
    """Return these values as strings, which are equal for equal values."""
    values = _listed(schema)
    if values is None:
        return None
    return {json.dumps(each, sort_keys=True, default=_number) for each in values}


def _number(value: Decimal) -> int | float:
    number = float(value)
    return int(number) if number.is_integer() else number


def _property(schema: dict[str, Any], name: str) -> Any:
    """Return the schema of a property; True if it may be anything."""
    properties = schema.get("properties") or {}
    if name in properties or schema.get("patternProperties"):
        return properties.get(name, True)
    return schema.get("additionalProperties") is not False
