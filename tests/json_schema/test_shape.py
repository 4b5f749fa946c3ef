"""A keyword whose value has the wrong type is refused by its path."""

import pytest

from tpllm import StructuredOutputsParams


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "strin"}, "json: type='strin' must be one of object, array"),
        ({"type": ["string", "foo"]}, r"type=\['string', 'foo'\] must be one of"),
        ({"type": []}, r"type=\[\] must be one of"),
        ({"items": {"type": 5}}, "items.type=5 must be one of"),
        ({"required": "a"}, "required='a' must be a list of property names"),
        ({"required": [1]}, r"required=\[1\] must be a list of property names"),
        ({"enum": "x"}, "enum='x' must be a list of at least one value"),
        ({"enum": []}, r"enum=\[\] must be a list of at least one value"),
        ({"properties": []}, r"properties=\[\] must be an object"),
        ({"properties": {"a": {"pattern": 5}}}, "properties.a.pattern=5 must be a string"),
        ({"anyOf": []}, r"anyOf=\[\] must be a list of at least one schema"),
        ({"allOf": {}}, "allOf={} must be a list of at least one schema"),
        ({"$ref": 5}, "ref=5 must be a string"),
        ({"$ref": "#/$defs/Y"}, r"ref='#/\$defs/Y' refers to nothing in the schema"),
        ({"anyOf": [{"$ref": "#/$defs/Y"}], "$defs": {"Z": {}}}, r"anyOf\[0\].*refers to nothing"),
        ({"name": "n", "strict": True, "schema": {"type": "object"}}, "give the schema itself"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "give the schema itself"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_path(schema, message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(json=schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"type": "null"}, {"items": {"$ref": "#/anyOf/0"}}]},
        {"$ref": "#/$defs/a%20b", "$defs": {"a b": {"type": "string"}}},
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": False, "c": True}},
        {"required": [], "type": ["string", "null"]},
        {"properties": {"name": {}, "schema": {}, "strict": {}}, "schema": {}},
    ],
)
def test_references_of_every_spelling_and_odd_names_pass(schema):
    assert StructuredOutputsParams(json=schema).json
