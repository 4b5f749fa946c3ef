"""Numbers in JSON schemas: no answer is outside of its bounds, and none crashes the process."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from tests.grammar_texts import fits
from tpllm import StructuredOutputsParams
from tpllm.structured_outputs import compilable_schema

INT64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
FIT = [
    (INT64, [0, -1, 2**63 - 1, 2**53 + 1, 1024 - 2**63], [2**63, -(2**63) - 1]),
    ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, [0, 2**63 - 1], [-1, 2**64]),
    ({"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}, [-(2**31)], [2**31]),
    (
        {"type": "integer", "minimum": 1 - 2**53, "maximum": 2**53 - 1},
        [1 - 2**53, 2**53 - 1],
        [-(2**53), 2**53],
    ),
    ({"type": "integer", "minimum": -(2**70), "maximum": 2**70}, [0, -5, 10**18], []),
    ({"type": "integer", "minimum": 2**63 - 1}, [2**63 - 1], [2**63 - 2, 0]),
    ({"type": "integer", "minimum": 10**18}, [10**18], [10**18 - 1]),
    ({"type": "integer", "maximum": -(10**18)}, [-(10**18)], [1 - 10**18]),
    ({"type": "integer", "exclusiveMaximum": 2**63}, [2**63 - 1], [2**63]),
    ({"type": "integer", "exclusiveMaximum": 2**63 - 1}, [0], [2**63 - 1]),
    ({"type": "integer", "exclusiveMinimum": 2**53}, [2**53 + 2], [2**53]),
    ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, [1], [0]),
    ({"type": "integer", "maximum": 10, "exclusiveMaximum": False}, [10], [11]),
    ({"type": "integer", "minimum": 10**400 * -1, "maximum": 3}, [3], [4]),
    ({"type": "number", "minimum": -1.7e308, "maximum": 1.7e308}, [0, 1.5, -2], []),
    ({"type": "number", "minimum": 0.3, "maximum": 0.7}, [0.3, 0.7], [0.29, 0.71]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, [0.01, 0.5], [0]),
    ({"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, [1.25], [1, 1.5]),
    ({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}, [-1.5], [-1]),
    ({"type": "number", "minimum": -0.0, "maximum": 0}, [0], [1]),
    ({"type": "number", "minimum": 1e-300, "maximum": 1}, [1], [0]),
    ({"type": "number", "maximum": 2**60 + 1}, [0, 2**59], [2**60 + 2, 1152921504606847000]),
    ({"allOf": [INT64, {"minimum": 2**62}]}, [2**62], [0]),
    ({"allOf": [{"type": "integer"}, {"minimum": -(2**63), "maximum": -(2**62)}]}, [], [0]),
    ({"type": "integer", "minimum": -(2**63), "multipleOf": 1000}, [-(10**6)], [1]),
    ({"type": "array", "items": INT64, "maxItems": 2**64}, [[1, 2**63 - 1]], [[2**63]]),
    ({"enum": [2**53, 2**60, -(2**62)]}, [2**60, -(2**62)], [2**53 - 1]),
    ({"type": "string", "maxLength": 2**63}, ["a"], []),
    ({"type": "string", "maxLength": 1.0}, ["a"], ["ab"]),
]


@pytest.mark.parametrize("schema, fitting, others", FIT)
def test_bounds_of_any_size_are_kept(schema, fitting, others):
    form = StructuredOutputsParams(json=schema)
    assert [each for each in fitting if not fits(form, json.dumps(each))] == []
    assert [each for each in others if fits(form, json.dumps(each))] == []


REFUSED: dict[str, dict[str, Any]] = {
    "json: minimum=10000000000000000000 is more than 9223372036854775807": {
        "type": "integer",
        "minimum": 10**19,
        "maximum": 10**19 + 5,
    },
    "json: properties.a: maximum=-9223372036854775803 is less than": {
        "properties": {"a": {"maximum": -(2**63) + 5}}
    },
    "json: no number that can be generated": {"minimum": 2**53 + 1, "maximum": 2**53 + 1},
    "json: items: minimum='5' must be a number": {"items": {"minimum": "5"}},
    "json: const: 9007199254740993 cannot be represented exactly": {"const": 2**53 + 1},
    "json: const: -9223372036854775808 cannot": {"const": -(2**63)},
    r"json: enum: 18446744073709551615 cannot": {"enum": [{"a": [2**64 - 1]}]},
    "json: maxLength=-1 must be a whole number": {"maxLength": -1},
    "json: minItems=1.5 must be a whole number": {"minItems": 1.5},
    "json: minLength=1099511627776 is more than any answer has": {"minLength": 2**40},
    "json: multipleOf=0.07 is not supported; use a power of ten": {"multipleOf": 0.07},
    "multipleOf 50000, 100000; their least common": {
        "allOf": [{"multipleOf": 50000}, {"multipleOf": 100000}]
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_numbers_that_cannot_be_generated_are_refused_by_path(message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(json=REFUSED[message])


def test_schemas_in_a_grammar_are_rewritten_too():
    form = StructuredOutputsParams(grammar=f'start: "<" %json {json.dumps(INT64)} ">"')
    assert fits(form, "<9223372036854775807>") and not fits(form, "<9223372036854775808>")
    with pytest.raises(ValueError, match="%json in grammar: const: 9007199254740993 cannot"):
        StructuredOutputsParams(grammar='start: %json {"const": 9007199254740993}')


numbers = st.one_of(
    st.integers(-20, 20),
    st.integers(-(2**66), 2**66),
    st.sampled_from([s * 2**k + d for s in (1, -1) for k in (53, 62, 63) for d in (-1, 0, 1)]),
    st.decimals(-3, 3, places=3).map(float),
)
bounds = st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])


def is_within(value: Decimal, schema: dict) -> bool:
    low, high = Decimal("-Infinity"), Decimal("Infinity")
    return (
        Decimal(str(schema.get("minimum", low)))
        <= value
        <= Decimal(str(schema.get("maximum", high)))
        and Decimal(str(schema.get("exclusiveMinimum", "-1e999"))) < value
        and value < Decimal(str(schema.get("exclusiveMaximum", "1e999")))
    )


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    kind=st.sampled_from(["integer", "number"]), limits=st.dictionaries(bounds, numbers, max_size=3)
)
def test_no_number_outside_a_bound_is_accepted(kind, limits):
    schema = {"type": kind, **limits}
    try:
        form = StructuredOutputsParams(json=schema)
        near = {
            Decimal(str(b)) + Decimal(d) for b in limits.values() for d in ("0", "1", "-1", ".5")
        }
        for value in near:
            text = f"{value.normalize():f}" if value else "0"
            if not is_within(value, schema):
                assert not fits(form, text)
            elif abs(value) < (2**49 if "." in text else 2**53) and not (
                kind == "integer" and "." in text
            ):
                assert fits(form, text)
    except ValueError as error:  # nothing lies between, or nothing that could be written
        assert any(
            word in str(error) for word in ("nothing satisfies", "more than", "less than", "lies")
        )


def test_schemas_without_bounds_are_unchanged():
    text = '{"type": "object", "properties": {"minimum": {"type": "integer"}}}'
    assert json.loads(compilable_schema(text)) == json.loads(text)
    assert LLMatcher.grammar_from_json_schema(compilable_schema(text))
