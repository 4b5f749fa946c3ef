"""Objects have only the properties that their schema names, if these suffice."""

import copy
from typing import Any

import pytest

from tpllm.json_schema.closed_objects import close_objects

A: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CLOSED = {**A, "additionalProperties": False}


@pytest.mark.parametrize(
    "schema, closed",
    [
        (A, CLOSED),
        ({"properties": {"b": A}}, {"properties": {"b": CLOSED}, "additionalProperties": False}),
        ({"type": "array", "items": A}, {"type": "array", "items": CLOSED}),
        ({"prefixItems": [A, A]}, {"prefixItems": [CLOSED, CLOSED]}),
        ({"additionalProperties": A}, {"additionalProperties": CLOSED}),
        ({"patternProperties": {"x": A}}, {"patternProperties": {"x": CLOSED}}),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"allOf": [A], "default": {}}, {"allOf": [CLOSED], "default": {}}),
        ({"$ref": "#/$defs/a", "$defs": {"a": A}}, {"$ref": "#/$defs/a", "$defs": {"a": CLOSED}}),
        ({"oneOf": [{"$ref": "#"}, A]}, {"oneOf": [{"$ref": "#"}, CLOSED]}),
    ],
)
def test_every_object_that_names_its_properties_is_closed(schema, closed):
    schema = copy.deepcopy(schema)
    close_objects(schema)
    assert schema == closed


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {}},
        {**A, "additionalProperties": True},
        {**A, "additionalProperties": {"type": "string"}},
        {**A, "patternProperties": {"^x": {}}},
        {**A, "required": ["a", "b"]},
        {**A, "minProperties": 2},
        {**A, "required": True},
        {"allOf": [A, {"properties": {"b": {}}}]},
        {"allOf": [{"$ref": "#/$defs/a"}, {"required": ["b"]}], "$defs": {"a": A}},
        {**A, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"$ref": "#/$defs/a", "properties": {"b": {}}, "$defs": {"a": A}},
        {"anyOf": [A], "$ref": "#/$defs/a", "$defs": {"a": A}},
        {"not": A},
        {"if": A, "then": A},
        {"const": A},
        {"enum": [A]},
        {"default": A, "examples": [A]},
        {"items": True, "properties": 3, "$defs": [A], "anyOf": 1, "allOf": {}},
    ],
)
def test_other_objects_are_not_closed(schema):
    before = copy.deepcopy(schema)
    close_objects(schema)
    assert schema == before
