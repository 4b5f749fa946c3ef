"""Rewrite JSON schemas so that llguidance compiles them correctly, or refuse them by keyword.

llguidance reads bounds as doubles and casts them to 64-bit integers without a range check: some
end the process, others give wrong numbers. It refuses unknown keywords in some places and ignores
them in others. So each schema is rewritten here first. The caller's schema accepts every answer
that the rewritten one accepts; `docs/structured-outputs.md` lists where the latter accepts less.
"""

import json
from decimal import Decimal
from math import isinf
from typing import Any

from tpllm.checks import short
from tpllm.json_schema.bounds import constant, count, rewrite_bounds
from tpllm.json_schema.disjoint import refuse_overlapping, target
from tpllm.json_schema.formats import rewrite_texts
from tpllm.json_schema.shape import MAPS, check_shape, refuse_wrapper

Schema = dict[str, Any]

_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_PLAIN = ("type", "const", "enum", "required", "pattern", "format", "$ref", "$id", "id", "$anchor")
SUPPORTED = (*_PLAIN, *_NUMBERS, *_COUNTS, *MAPS, *_LISTS, *_SINGLE)

# Unsupported keywords, each with what to write instead.
UNSUPPORTED = {
    "not": "describe the allowed values instead, with enum, type or pattern",
    "if": "write the cases as an anyOf of whole schemas",
    "contains": "describe every item with items or prefixItems",
    "uniqueItems": "leave it out and check the answer, or list the possible arrays as an enum",
    "dependentRequired": "write the cases as an anyOf of objects with their own required",
    "dependentSchemas": "write the cases as an anyOf of whole schemas",
    "dependencies": "write the cases as an anyOf of whole schemas",
    "propertyNames": "use patternProperties beside additionalProperties: false",
    "unevaluatedProperties": "use additionalProperties in each schema that has properties",
    "unevaluatedItems": "use items beside prefixItems",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
}
# Values of unsupported keywords that have no effect.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
}
_DRAFTS = ("http://json-schema.org/", "https://json-schema.org/")
# options by which forced tool calls choose their whitespace
_WHITESPACE_OPTIONS = ("whitespace_pattern", "whitespace_flexible")


def normalized(schema: Schema) -> Schema:
    """Return an equivalent schema that llguidance compiles correctly.

    Numbers that are not integers are Decimal in `schema`, so that they are not rounded before.

    Raises:
        ValueError: a keyword is not supported, or its value is wrong; the message has the path of
            the keyword and the mend.
    """
    refuse_wrapper(schema)
    rewritten: Schema = _Normalizer(schema).schema(schema, "")
    if isinstance(options := schema.get("x-guidance"), dict):
        kept = {name: options[name] for name in _WHITESPACE_OPTIONS if name in options}
        rewritten["x-guidance"] = kept
    if isinstance(draft := schema.get("$schema"), str) and draft.startswith(_DRAFTS):
        rewritten["$schema"] = draft
    return rewritten


def to_text(schema: object) -> str:
    """Return the schema as a JSON string; Decimals become the nearest doubles.

    Raises:
        ValueError: a number is out of the range of doubles.
    """
    return json.dumps(schema, default=_double, allow_nan=False)


def _double(value: object) -> float:
    if not isinstance(value, Decimal):
        raise TypeError(f"{value!r} is not a JSON value")
    number = float(value)
    if isinf(number):
        raise ValueError(f"{value} is out of the range of double-precision numbers")
    return number


class _Normalizer:
    """Rewrites one schema. `root` is the document that its references point into."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._has_id = "$id" in root or "id" in root

    def schema(self, schema: Any, place: str) -> Any:
        """Return a rewritten schema or a boolean; `place` is its path, such as "a.b"."""
        if not isinstance(schema, dict):
            if isinstance(schema, bool):
                return schema
            raise ValueError(f"{_at(place)}{short(schema)} must be a schema, which is an object")
        schema = self._with_named_properties(schema)
        result: Schema = {}
        for keyword, value in schema.items():
            self._check_keyword(keyword, value, place)
            inside = f"{place}.{keyword}" if place else keyword
            check_shape(keyword, value, inside, self._root)
            if keyword in MAPS and isinstance(value, dict):
                result[keyword] = {
                    name: self.schema(each, f"{inside}.{name}") for name, each in value.items()
                }
            elif isinstance(value, list) and keyword in (*_LISTS, "items"):
                result[keyword] = [
                    self.schema(each, f"{inside}[{i}]") for i, each in enumerate(value)
                ]
            elif keyword in _SINGLE:
                result[keyword] = self.schema(value, inside)
            elif keyword in SUPPORTED:
                result[keyword] = self._value(keyword, value, inside)
        rewrite_texts(result, _at(place))
        rewrite_bounds(result, _at(place))
        return self._one_of_as_any_of(result, place)

    def _with_named_properties(self, schema: Schema) -> Schema:
        """Replace propertyNames: a list by properties, a pattern by patternProperties."""
        names = schema.get("propertyNames")
        if isinstance(names, dict) and "$ref" in names:
            names = target(self._root, names["$ref"])
        others = schema.get("properties") or schema.get("patternProperties")
        if not isinstance(names, dict) or others:
            return schema
        names = dict(names)
        rewrite_texts(names, "propertyNames: ")
        value = schema.get("additionalProperties", True)
        listed = [names["const"]] if "const" in names else names.get("enum")
        if listed and all(isinstance(name, str) for name in listed):
            found = {"properties": dict.fromkeys(listed, value)}
        elif "pattern" in names and not names.keys() & set(UNSUPPORTED):
            found = {"patternProperties": {names["pattern"]: value}}
        else:
            return schema
        rest = {name: each for name, each in schema.items() if name != "propertyNames"}
        return {**rest, **found, "additionalProperties": False}

    def _one_of_as_any_of(self, schema: Schema, place: str) -> Schema:
        """Replace a oneOf whose branches exclude each other by an anyOf; keep the keyword order."""
        branches = schema.get("oneOf")
        if not isinstance(branches, list):
            return schema
        refuse_overlapping(branches, self._root, _at(place))
        if "anyOf" in schema:
            both = [{"anyOf": schema.pop("anyOf")}, {"anyOf": schema.pop("oneOf")}]
            return {**schema, "allOf": [*schema.get("allOf", []), *both]}
        return {("anyOf" if name == "oneOf" else name): each for name, each in schema.items()}

    def _check_keyword(self, keyword: str, value: Any, place: str) -> None:
        if keyword in UNSUPPORTED and value not in _NO_EFFECT.get(keyword, ()):
            raise ValueError(f"{_at(place)}{keyword} is not supported; {UNSUPPORTED[keyword]}")
        if keyword in SUPPORTED or keyword in UNSUPPORTED:
            return
        plain = keyword.replace("_", "").replace("-", "").lower()
        for known in (*SUPPORTED, *UNSUPPORTED):
            if plain == known.lower():
                raise ValueError(
                    f"{_at(place)}{keyword} is not a JSON Schema keyword; did you mean {known!r}?"
                )

    def _value(self, keyword: str, value: Any, place: str) -> Any:
        """Return the value of a keyword that holds no schema."""
        if keyword == "const":
            return constant(value, place)
        if keyword == "enum" and isinstance(value, list):
            return [constant(each, place) for each in value]
        if keyword in _COUNTS:
            return count(keyword, value, place)
        if keyword == "$ref" and isinstance(value, str) and value[:1] != "#" and not self._has_id:
            raise ValueError(
                f"{place}={value!r} points out of the schema; move the schema to $defs"
            )
        if keyword == "$ref" and isinstance(value, str) and value.startswith("#/"):
            first = value.split("/")[1]
            if first not in (*MAPS, *_LISTS, *_SINGLE):
                raise ValueError(
                    f"{place}={value!r} points into {first!r}, which holds no schemas; move the "
                    "schema to $defs"
                )
        return value


def _at(place: str) -> str:
    return f"{place}: " if place else ""
