"""Tests that long numbers in JSON end where their schema allows it."""

import json

import pytest

from tests.grammar_texts import shipped_grammars
from tpllm.engine.grammars import Grammar, Grammars, fill_masks
from tpllm.engine.long_numbers import MAX_CHARS
from tpllm.structured_outputs import StructuredOutputsParams


@pytest.fixture(scope="module")
def shipped() -> Grammars:
    return shipped_grammars()


def num_fitting(compiled: Grammar, text: str) -> int:
    """Return how many characters of `text` an output may begin with."""
    matcher = compiled.start()
    tokenize = compiled._tokenizer.tokenize_str
    for i, id_ in enumerate(id_ for letter in text for id_ in tokenize(letter)):
        (row,) = fill_masks([matcher], [()], 128)
        if not (row[id_ >> 5] >> (id_ & 31)) & 1 or not matcher.advance(id_):
            return i
    return len(text)


NUMBERS = ["1" * 99, "-" + "1" * 99, "0." + "3" * 99, "1.5e+" + "0" * 99, "1e-" + "7" * 99]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "spec, before",
    [
        ({"json": {"type": "number"}}, ""),
        ({"json": {"additionalProperties": {"type": "number"}}}, '{"12": '),
        ({"json_object": True}, '{"12": '),
        ({"grammar": 'start: "x" %json {"items": {"type": "number"}}'}, "x[12, "),
    ],
)
def test_a_number_ends_after_32_characters(shipped, spec, before, number):
    compiled = shipped.compile(StructuredOutputsParams(**spec))
    assert num_fitting(compiled, before + number) == len(before) + MAX_CHARS


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([2**64 - 1, -(2**63), 2.2250738585072014e-308, -1.7976931348623157e308]),
        json.dumps({"pi": "3." + "1" * 99, "1" * 99: '\\"' + "1" * 99}),
        json.dumps([[10**31], 10**31, "", 10**31]),
    ],
)
def test_all_that_a_double_or_64_bits_hold_and_digits_in_strings_go_on(shipped, text):
    assert num_fitting(shipped.compile(StructuredOutputsParams(json={})), text) == len(text)


def test_a_number_that_must_be_longer_goes_on(shipped):
    compiled = shipped.compile(StructuredOutputsParams(grammar='start: %json {"const": 1} /1{50}/'))
    assert num_fitting(compiled, "1" * 51) == 51


@pytest.mark.parametrize("spec", [{"regex": "[0-9]+"}, {"grammar": "start: /[0-9]+/"}])
def test_digits_that_are_no_json_have_no_limit(shipped, spec):
    compiled = shipped.compile(StructuredOutputsParams(**spec))
    assert num_fitting(compiled, "1" * 99) == 99
