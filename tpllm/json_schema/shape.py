"""Check that the value of each keyword of a JSON schema has the right type."""

from collections.abc import Callable
from typing import Any

from tpllm.checks import short
from tpllm.json_schema.disjoint import target

MAPS = ("properties", "patternProperties", "$defs", "definitions")  # of schemas, by name
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_OBJECT = (lambda value: isinstance(value, dict), "must be an object")
_STRING = (lambda value: isinstance(value, str), "must be a string")
_SCHEMAS = (_is_list, "must be a list of at least one schema")
_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, f"must be one of {', '.join(TYPES)}, or a list of these"),
    "required": (_is_list_of_strings, "must be a list of property names"),
    "enum": (_is_list, "must be a list of at least one value"),
    "pattern": _STRING,
    "$ref": _STRING,
    **dict.fromkeys(MAPS, _OBJECT),
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), _SCHEMAS),
}


def check_shape(keyword: str, value: Any, place: str, root: dict[str, Any]) -> None:
    """Check one keyword of a schema.

    Args:
        place: the path of the keyword, for the message
        root: the whole schema, into which references point

    Raises:
        ValueError: the value has the wrong type, or is a reference to nothing.
    """
    if keyword in _WANTED:
        fits, words = _WANTED[keyword]
        if not fits(value):
            raise ValueError(f"{place}={short(value)} {words}")
    if keyword == "$ref" and value.startswith("#/") and target(root, value) is None:
        raise ValueError(f"{place}={short(value)} refers to nothing in the schema; define it there")


def refuse_wrapper(schema: dict[str, Any]) -> None:
    """Refuse the object that wraps a schema in OpenAI's response_format.

    Raises:
        ValueError: it is that object, which as a schema would allow any JSON.
    """
    if schema.get("type") == "json_schema" or (
        isinstance(schema.get("schema"), dict) and schema.keys() <= {"name", "strict", "schema"}
    ):
        raise ValueError("this is response_format's wrapper of a schema; give the schema itself")
