"""Objects in an answer have the properties that their schema names, and no others.

By JSON Schema an object may have any others unless `additionalProperties` says no. A weak model
makes them up until `max_tokens`, and what reads the answer seldom wants them: OpenAI's strict mode
asks for `"additionalProperties": false`, and xgrammar, under vLLM, supposes it.
"""

from collections.abc import Iterator
from typing import Any

_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items", "additionalProperties")
_STANDS_FOR_ANOTHER = {"$ref", "anyOf", "oneOf", "allOf"}
_ABOUT_OBJECTS = {
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "minProperties",
}
_ABOUT_OTHER_SCHEMAS = {"not", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"}


def close_objects(schema: dict[str, Any]) -> None:
    """Add `"additionalProperties": false`, in place, where a schema leaves it open.

    A schema whose parts have a say about the same object, as the branches of `allOf`, stays as it
    is: what one of them names, another would forbid.
    """
    parts = list(_parts(schema))
    if not any(_joins_others(part) for part in parts):
        for part in parts:
            if _names_all(part):
                part["additionalProperties"] = False


def _parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema, and those within it."""
    left: list[Any] = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
            for name in _MAPS_OF_SCHEMAS:
                if isinstance(schemas := part.get(name), dict):
                    left += schemas.values()
            left += (part.get(name) for name in _SCHEMAS)
        elif isinstance(part, list):
            left += part


def _joins_others(part: dict[str, Any]) -> bool:
    elsewhere = part.keys() & _STANDS_FOR_ANOTHER
    return bool(
        part.keys() & _ABOUT_OTHER_SCHEMAS
        or len(elsewhere) > 1
        or (elsewhere and part.keys() & _ABOUT_OBJECTS)
        or ("allOf" in part and part["allOf"][1:])
    )


def _names_all(part: dict[str, Any]) -> bool:
    """Whether an object could be made of the properties that are named."""
    properties, required = part.get("properties"), part.get("required", [])
    if not isinstance(properties, dict) or not properties or not isinstance(required, list):
        return False
    return part.keys() & _ABOUT_OBJECTS <= {"properties", "required"} and all(
        isinstance(name, str) and name in properties for name in required
    )
