"""Restrict objects in an answer to the properties that their schema names.

JSON Schema allows further properties unless `additionalProperties` forbids them. A weak model
invents such properties until `max_tokens`, and programs seldom want them. OpenAI's strict mode
requires `"additionalProperties": false`, and xgrammar, which vLLM uses, assumes it.
"""

from collections.abc import Iterator
from typing import Any

from tpllm.json_schema.shape import MAPS

_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items", "additionalProperties")
_COMBINING = {"$ref", "anyOf", "oneOf", "allOf"}
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
    """Add `"additionalProperties": false`, in place, where a schema does not set it.

    If several subschemas describe the same object, as the branches of `allOf` do, the whole schema
    stays as it is: one branch would forbid the properties that another names.
    """
    subschemas = list(_subschemas(schema))
    if not any(_shares_its_object(each) for each in subschemas):
        for each in subschemas:
            if _names_all(each):
                each["additionalProperties"] = False


def _subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the schema and every schema within it."""
    pending: list[Any] = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            for name in MAPS:
                if isinstance(schemas := node.get(name), dict):
                    pending += schemas.values()
            pending += (node.get(name) for name in _SCHEMAS)
        elif isinstance(node, list):
            pending += node


def _shares_its_object(schema: dict[str, Any]) -> bool:
    """Whether the schema and another one may describe the same object."""
    combining = schema.keys() & _COMBINING
    return bool(
        schema.keys() & _ABOUT_OTHER_SCHEMAS
        or len(combining) > 1
        or (combining and schema.keys() & _ABOUT_OBJECTS)
        or ("allOf" in schema and schema["allOf"][1:])
    )


def _names_all(schema: dict[str, Any]) -> bool:
    """Whether the named properties, including all required ones, suffice for an object."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not properties or not isinstance(required, list):
        return False
    return schema.keys() & _ABOUT_OBJECTS <= {"properties", "required"} and all(
        isinstance(name, str) and name in properties for name in required
    )
