"""The parts of JSON Schema that work or are refused, as listed in docs/structured-outputs.md."""

import json
from typing import Any

import jsonschema
import pytest

from tests.grammar_texts import fits, shipped_grammars
from tests.scripts import ROOT
from tpllm import StructuredOutputsParams
from tpllm.json_schema.formats import FORMATS
from tpllm.json_schema.rewrite import SUPPORTED, UNSUPPORTED

PAGE = (ROOT / "docs" / "structured-outputs.md").read_text()

A, B = (
    {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]}
    for kind in "ab"
)
TREE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/t"}}, "required": ["next"]}
# keyword, schema, an instance that fits, one that does not
WORKS: list[tuple[str, dict[str, Any], Any, Any]] = [
    ("type", {"type": ["string", "null"]}, None, 1),
    ("const", {"const": {"a": [1, None]}}, {"a": [1, None]}, {"a": [1]}),
    ("enum", {"enum": ["a", 2]}, 2, "b"),
    ("anyOf", {"anyOf": [{"type": "null"}, {"const": 3}]}, 3, 4),
    ("oneOf", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, 4, None),
    ("allOf", {"allOf": [{"type": "integer"}, {"minimum": 3}]}, 3, 2),
    ("$ref", {"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, None, 1),
    ("$defs", {"$ref": "#/$defs/a", "$defs": {"a": {"const": 1}}}, 1, 2),
    ("definitions", {"$ref": "#/definitions/a", "definitions": {"a": {"const": 1}}}, 1, 2),
    ("$anchor", {"$ref": "#here", "$defs": {"a": {"$anchor": "here", "const": 1}}}, 1, 2),
    ("$id", {"$id": "http://a/b", "$ref": "#/$defs/a", "$defs": {"a": {"const": 1}}}, 1, 2),
    ("minimum", {"type": "integer", "minimum": -5}, -5, -6),
    ("maximum", {"type": "number", "maximum": 0.5}, 0.5, 0.75),
    ("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 0}, 0.25, 0),
    ("exclusiveMaximum", {"type": "integer", "exclusiveMaximum": 9}, 8, 9),
    ("multipleOf", {"type": "number", "multipleOf": 0.01}, 0.25, 0.125),
    ("minLength", {"type": "string", "minLength": 2}, "éé", "é"),
    ("maxLength", {"type": "string", "maxLength": 2}, "éé", "ééé"),
    ("pattern", {"type": "string", "pattern": "^a+$"}, "aa", "ab"),
    ("format", {"type": "string", "format": "date"}, "2024-02-29", "2024-02-30"),
    ("items", {"type": "array", "items": {"type": "null"}}, [None, None], [1]),
    ("prefixItems", {"type": "array", "prefixItems": [{"const": 1}]}, [1, "x"], [2]),
    (
        "additionalItems",
        {"type": "array", "items": [{"const": 1}], "additionalItems": False},
        [1],
        [1, 2],
    ),
    ("minItems", {"type": "array", "minItems": 1}, [0], []),
    ("maxItems", {"type": "array", "maxItems": 1}, [0], [0, 0]),
    ("properties", {"type": "object", "properties": {"a": {"const": 1}}}, {"a": 1}, {"a": 2}),
    ("required", {"type": "object", "required": ["a"]}, {"a": 0}, {"b": 0}),
    (
        "additionalProperties",
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
        {"a": 1},
        {"b": 1},
    ),
    (
        "patternProperties",
        {"type": "object", "patternProperties": {"^a": {"const": 1}}},
        {"ab": 1, "b": 2},
        {"ab": 2},
    ),
    ("minProperties", {"type": "object", "minProperties": 1}, {"a": 0}, {}),
    ("maxProperties", {"type": "object", "maxProperties": 1}, {"a": 0}, {"a": 0, "b": 0}),
]
ZOD_EMAIL = (
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@"
    r"([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
)
MORE_THAT_WORKS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "a oneOf of objects with their own const": (
        {"oneOf": [A, B]},
        {"kind": "a"},
        {"kind": "c"},
    ),
    "the same behind references, as pydantic writes it": (
        {
            "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
            "discriminator": {"propertyName": "kind"},
            "$defs": {"A": A, "B": B},
        },
        {"kind": "b"},
        {"kind": "c"},
    ),
    "a oneOf of numbers": ({"oneOf": [{"const": 1}, {"const": 2}, {"enum": [3, 4]}]}, 4, 5),
    "a oneOf beside an anyOf": (
        {
            "anyOf": [{"const": 1}, {"const": 2}],
            "oneOf": [{"type": "string"}, {"type": "integer"}],
        },
        2,
        3,
    ),
    "a schema that holds itself": (
        {"$ref": "#/$defs/t", "$defs": {"t": {"anyOf": [{"type": "null"}, TREE]}}},
        {"next": {"next": None}},
        {"next": {"next": 1}},
    ),
    "a keyword as the name of a property": (
        {"type": "object", "properties": {"not": {"type": "null"}, "minlength": {"const": 1}}},
        {"not": None, "minlength": 1},
        {"not": 1},
    ),
    "an empty unsupported keyword": (
        {"type": "array", "uniqueItems": False, "unevaluatedItems": True},
        [1, 1],
        {},
    ),
    "a format of numbers": ({"type": "integer", "format": "int64"}, 5, "5"),
    "a format of any text": ({"type": "string", "format": "password"}, "x", 1),
    "a draft 4 schema": (
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "type": "integer",
            "minimum": 1,
            "exclusiveMinimum": True,
        },
        2,
        1,
    ),
    "an enum of the names of properties, as pydantic writes dict[Enum, int]": (
        {
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "propertyNames": {"$ref": "#/$defs/N"},
            "$defs": {"N": {"enum": ["a", "b"], "type": "string"}},
        },
        {"b": 1},
        {"c": 1},
    ),
    "a format of the names of properties": (
        {
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "propertyNames": {"format": "uuid4"},
        },
        {"12345678-1234-4234-9234-123456789abc": 1},
        {"a": "x"},
    ),
    "pydantic's Decimal": (
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
        "-12.50",
        "-.",
    ),
    "zod's email": (
        {"type": "string", "format": "email", "pattern": ZOD_EMAIL},
        "a.b@c.de",
        "a..b@c.de",
    ),
    "an unknown format beside a pattern": (
        {"type": "string", "format": "e164", "pattern": r"^\+[0-9]{6,14}$"},
        "+4912345678",
        "12",
    ),
    "hundreds of optional properties": (
        {
            "type": "object",
            "properties": {f"p{i}": {"type": "integer"} for i in range(800)},
            "additionalProperties": True,
        },
        {"p3": 1, "p700": 2, "other": 3},
        {"p3": 1, "p700": "x"},
    ),
}
ANNOTATIONS = {
    **{"title": "t", "description": "d", "default": 1e400, "examples": [2**70], "$comment": "c"},
    **{"deprecated": True, "readOnly": True, "writeOnly": False, "contentEncoding": "base64"},
    **{"contentMediaType": "image/png", "discriminator": {"propertyName": "a"}, "nullable": True},
    **{"example": {"not": 1}, "x-order": 3, "enumNames": ["a"], "$schema": "https://example.org/x"},
    **{"x-guidance": {"lenient": True, "item_separator": ";"}},
}


def params_of(table: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*row, id=name) for name, row in table.items()]


@pytest.mark.parametrize(
    "schema, valid, invalid",
    params_of({row[0]: row[1:] for row in WORKS}) + params_of(MORE_THAT_WORKS),
)
def test_an_answer_fits_where_the_instance_is_valid(schema, valid, invalid):
    form = StructuredOutputsParams(json=schema)
    assert fits(form, json.dumps(valid, ensure_ascii=False))
    assert not fits(form, json.dumps(invalid, ensure_ascii=False))
    if "$schema" not in schema and "additionalItems" not in schema:  # of older drafts
        kind = jsonschema.Draft202012Validator
        checker = kind(schema, format_checker=kind.FORMAT_CHECKER)
        assert checker.is_valid(valid) and not checker.is_valid(invalid)


def test_every_keyword_of_the_table_works_or_is_refused():
    tested = {row[0] for row in WORKS}
    assert tested == set(SUPPORTED) - {"id"}
    assert not tested & set(UNSUPPORTED)


def in_code(value: object) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")


def test_the_page_has_these_tables():
    works = [
        f"| `{name}` | {in_code(schema)} | {in_code(valid)} | {in_code(invalid)} |"
        for name, schema, valid, invalid in WORKS
    ]
    refused = [f"| `{name}` | {mend} |" for name, mend in UNSUPPORTED.items()]
    for rows in (works, refused):
        assert "\n".join(rows) in PAGE, "the page must have:\n" + "\n".join(rows)
    assert ", ".join(f"`{name}`" for name in FORMATS) in " ".join(PAGE.split())


SOME_VALUES = {"uniqueItems": True, "$dynamicRef": "#a", "$recursiveRef": "#"}


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_an_unsupported_keyword_is_refused_by_name_and_path(keyword):
    part = {keyword: SOME_VALUES.get(keyword, {"a": False})}
    schema = {"type": "object", "properties": {"b": {"items": part}}}
    with pytest.raises(ValueError) as caught:
        StructuredOutputsParams(json=schema)
    assert f"json: properties.b.items: {keyword} is not supported; {UNSUPPORTED[keyword]}" == str(
        caught.value
    )


REFUSED: dict[str, dict[str, Any]] = {
    "minlength is not a JSON Schema keyword; did you mean 'minLength'": {"minlength": 3},
    "additional_properties is not a JSON Schema keyword.*did you mean 'additionalProp": {
        "properties": {"a": {"additional_properties": False}}
    },
    "format='iri' is not supported.*pattern": {"type": "string", "format": "iri"},
    "format='datetime' is not supported; did you mean 'date-time'": {"format": "datetime"},
    "its schemas 0 and 1 may match the same value": {"oneOf": [{"minimum": 1}, {"maximum": 3}]},
    "oneOf: its schemas 0 and 2": {"oneOf": [{"const": 1}, {"const": "a"}, {"const": 1.0}]},
    "'components', which holds no schemas; move the schema to \\$defs": {
        "$ref": "#/components/A",
        "components": {"A": {"type": "integer", "minimum": -(2**63), "maximum": -(2**63)}},
    },
    r"\$ref='http://a/b' points out of the schema": {"$ref": "http://a/b"},
    "multipleOf=0 must be more than 0": {"type": "integer", "multipleOf": 0},
    "multipleOf=1E-300 is not supported": {"type": "number", "multipleOf": 1e-300},
    "properties.a: minimum=10000000000000000000 is more": {
        "properties": {"a": {"type": "integer", "minimum": 10**19}}
    },
    "items: 3 must be a schema": {"items": 3},
    "too many schemas to compare": {"oneOf": [{"const": i} for i in range(3000)]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_keywords_that_would_be_ignored_are_refused(message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(json=REFUSED[message])


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_annotations_are_accepted_and_have_no_effect(name):
    value = ANNOTATIONS[name]
    text = json.dumps({"type": "array", "items": {"const": 1}, name: value})
    form = StructuredOutputsParams(json=text.replace("Infinity", "1e400"))
    assert fits(form, "[1,1]") and not fits(form, "[1;1]") and not fits(form, "[2]")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_the_page_compiles(name):
    form = StructuredOutputsParams(json={"type": "string", "format": name})
    assert not fits(form, '"?"')


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("date", ["2024-02-29", "2000-02-29", "0001-01-01"], ["2023-02-29", "1900-02-29"]),
        ("date", ["9999-12-31"], ["0000-01-01", "2024-04-31", "2024-13-01", "0000-02-29"]),
        ("time", ["23:59:59Z", "00:00:00.123456+01:30"], ["23:59:60Z", "24:00:00Z", "00:00:00"]),
        ("date-time", ["2024-02-29T00:00:00.1Z"], ["2024-02-29", "2024-02-29T00:00:00.1234567Z"]),
        (
            "uuid4",
            ["12345678-1234-4234-9234-123456789abc"],
            ["12345678-1234-1234-9234-123456789abc"],
        ),
        ("base64", ["", "YQ==", "YWI="], ["Y", "YQ="]),
    ],
)
def test_formats_are_those_that_programs_read(name, right, wrong):
    form = StructuredOutputsParams(json={"type": "string", "format": name})
    assert all(fits(form, f'"{text}"') for text in right)
    assert not any(fits(form, f'"{text}"') for text in wrong)


@pytest.mark.parametrize("name", ["email", "hostname", "duration", "date-time"])
def test_strings_with_a_format_have_a_maximum_length(name):
    form = {"type": "string", "format": name}
    if name == "date-time":
        form["pattern"] = r"^.*\.1*Z$"
    text = {
        "email": "a" * 300 + "@b.de",
        "hostname": ".".join(["a" * 50] * 6),
        "duration": f"P{'1' * 40}D",
        "date-time": f"2024-01-01T00:00:00.{'1' * 40}Z",
    }[name]
    assert not fits(StructuredOutputsParams(json=form), f'"{text}"')


def test_numbers_of_any_size_have_an_answer_or_a_reason():
    big = ("1e99999999999", "-1e99999999999", "9" * 5000, "Infinity", "1e-99999999999")
    for number in big:
        for keyword in ("minimum", "maximum", "const", "multipleOf"):
            text = f'{{"type": "integer", "{keyword}": {number}}}'
            try:
                StructuredOutputsParams(json=text)
            except ValueError as error:
                assert keyword in str(error) and "class" not in str(error)


@pytest.mark.parametrize(
    "schema, reason",
    [
        (
            {"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 6},
            r"nothing satisfies it: minimum \(6\) is greater than maximum \(5\)",
        ),
        ({"type": "string", "pattern": r"\bfoo"}, "look-around is not supported"),
    ],
)
def test_errors_use_the_words_of_the_schema(schema, reason):
    with pytest.raises(ValueError, match=reason):
        shipped_grammars().compile(StructuredOutputsParams(json=schema))


def test_no_error_names_an_option_that_does_not_exist():
    schemas: list[dict[str, Any]] = [
        {"oneOf": [{}, {}]},
        {"properties": {"a": {}}, "minProperties": 3},
    ]
    for schema in schemas:
        with pytest.raises(ValueError) as caught:
            shipped_grammars().compile(StructuredOutputsParams(json=schema))
        assert "coerce_one_of" not in str(caught.value) and "lenient" not in str(caught.value)
