"""Whether the value of each keyword is what JSON Schema wants there, so that a message names it."""

from collections.abc import Callable
from typing import Any

from tpllm.checks import short
from tpllm.json_schema.disjoint import target

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_OBJECT = (_is_object, "must be an object")
_TEXT = (_is_text, "must be a text")
_SCHEMAS = (_is_list, "must be a list of at least one schema")
_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, f"must be one of {', '.join(TYPES)}, or a list of these"),
    "required": (_is_list_of_texts, "must be a list of property names"),
    "enum": (_is_list, "must be a list of at least one value"),
    "pattern": _TEXT,
    "$ref": _TEXT,
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), _OBJECT),
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), _SCHEMAS),
}


def check_shape(keyword: str, value: Any, place: str, root: dict[str, Any]) -> None:
    """Check one keyword of a schema.

    Args:
        place: the path of the keyword, for the message
        root: the whole schema, into which references point

    Raises:
        ValueError: the value is not of its kind, or is a reference that leads nowhere.
    """
    if keyword in _WANTED:
        fits, words = _WANTED[keyword]
        if not fits(value):
            raise ValueError(f"{place}={short(value)} {words}")
    if keyword == "$ref" and value.startswith("#/") and target(root, value) is None:
        raise ValueError(f"{place}={short(value)} leads nowhere in the schema; define it there")


def refuse_wrapper(schema: dict[str, Any]) -> None:
    """Refuse the object that OpenAI's response_format has around a schema.

    Raises:
        ValueError: it is that; without any keyword of its own it would let any JSON pass.
    """
    if schema.get("type") == "json_schema" or (
        isinstance(schema.get("schema"), dict) and schema.keys() <= {"name", "strict", "schema"}
    ):
        raise ValueError("this is response_format's object around a schema; give the schema itself")
