"""Tests of compiled grammars: what they allow and refuse, and that outputs are independent."""

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.engine.simulation import EOS, GRAMMARS, VOCAB_SIZE, ids_of_mask
from tpllm.config.engine_config import EngineConfig
from tpllm.engine import grammars
from tpllm.engine.compiling import CompilingRequests
from tpllm.engine.grammars import Grammar, Grammars, Matcher, fill_masks
from tpllm.engine.request import AddRequest
from tpllm.sampling_params import SamplingParams
from tpllm.structured_outputs import StructuredOutputsParams
from tpllm.supervision.start import engine_grammars


@pytest.fixture(scope="module")
def shipped() -> Iterator[Grammars]:
    grammars = engine_grammars(EngineConfig.resolve(device="cpu"))
    grammars.compile(StructuredOutputsParams(regex="a"))  # starts the process that tries grammars
    yield grammars
    grammars.close()


def grammar_of(**spec) -> Grammar:
    return GRAMMARS.compile(StructuredOutputsParams(**spec))


def next_ids(matcher: Matcher, held_back=()) -> set[int]:
    (row,) = fill_masks([matcher], [held_back], 1)
    return ids_of_mask(row)


def accepts(compiled: Grammar, text: str) -> bool:
    """Whether an output may be `text`, whose characters are tokens of single bytes."""
    matcher = compiled.start()
    for letter in text:
        id_ = ord(letter) - ord("a") + 1
        if id_ not in next_ids(matcher) or not matcher.advance(id_):
            return False
    return EOS in next_ids(matcher)


INDENTED = "\n" + 7 * " "


def fits(compiled: Grammar, text: str) -> bool:
    """Whether an output may begin with `text`, character by character."""
    ids = [id_ for letter in text for id_ in compiled._tokenizer.tokenize_str(letter)]
    matcher = compiled.start()
    return all([matcher.advance(id_) for id_ in ids])


def test_a_mask_holds_what_may_come_next_and_the_end_where_it_may_be():
    matcher = grammar_of(regex="a[bc]*").start()
    assert next_ids(matcher) == {1}
    assert matcher.advance(1)
    assert next_ids(matcher) == {2, 3, EOS}


def test_tokens_are_held_back_only_where_there_are_others():
    matcher = grammar_of(regex="ab?").start()
    assert matcher.advance(1)
    assert next_ids(matcher, {EOS}) == {2}
    assert next_ids(matcher, {EOS, 2}) == {2, EOS}
    assert matcher.advance(2)
    assert next_ids(matcher, {EOS}) == {EOS}


def test_masks_of_many_answers_are_those_of_each():
    matchers = [grammar_of(regex=regex).start() for regex in ("a+", "bc", "[a-g]", "(d|e)f")]
    words = fill_masks(matchers, [()] * 4, 1)
    assert [ids_of_mask(row) for row in words] == [{1}, {2}, set(range(1, VOCAB_SIZE)), {4, 5}]
    assert fill_masks([], [], 1).shape == (0, 1)


@pytest.mark.parametrize("regex", ["^ab$", "ab", "^(a)(b)$"])
def test_a_regex_matches_the_whole_answer_with_and_without_anchors(regex):
    compiled = grammar_of(regex=regex)
    assert [text for text in ("a", "b", "ab", "abb") if accepts(compiled, text)] == ["ab"]


@pytest.mark.parametrize("grammar", ['root ::= "a" root "b" | "c"', 'start: "a" start "b" | "c"'])
def test_a_grammar_may_be_gbnf_or_lark(grammar):
    compiled = grammar_of(grammar=grammar)
    assert [accepts(compiled, text) for text in ("c", "aacbb", "aacb", "ab")] == [
        True,
        True,
        False,
        False,
    ]


CHOICES = {
    "few": ["yes", "no"],
    "odd": ['say "x"\\', "line\nbreak\t", "é😀", "%json {}", "a|b", "\x00\x7f\u2028"],
    "prefixes of each other": ["y", "yes", "yes, sir", "yes, sir!"],
    "2500": [f"K{i}" for i in range(2500)],
    "15000": [f"K{i}" for i in range(15_000)],
    "long": [f"{i} " + "abc é\n" * 400 for i in range(40)],
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_choices_are_taken_word_for_word(shipped, choice):
    compiled = shipped.compile(StructuredOutputsParams(choice=choice))
    tokenizer = compiled._tokenizer
    for text in choice[:: len(choice) // 50 + 1]:
        matcher = compiled.start()
        assert all(matcher.advance(id_) for id_ in tokenizer.tokenize_str(text))
        (row,) = fill_masks([matcher], [()], 128)
        assert ids_of_mask(row) >= compiled.end_token_ids
        is_beginning = any(other != text and other.startswith(text) for other in choice)
        assert is_beginning or ids_of_mask(row) == compiled.end_token_ids
    for text in ("K", "yes,", "x"):
        matcher = compiled.start()
        fits = all([matcher.advance(id_) for id_ in tokenizer.tokenize_str(text)])
        assert not (fits and matcher.inner.is_accepting())


def test_a_choice_that_spells_an_end_token_is_a_text(shipped):
    text = "<|im_end|>"
    compiled = shipped.compile(StructuredOutputsParams(choice=[text]))
    matcher = compiled.start()
    for letter in text:
        (row,) = fill_masks([matcher], [()], 128)
        assert not ids_of_mask(row) & compiled.end_token_ids
        assert matcher.advance(compiled._tokenizer.tokenize_str(letter)[0])
    assert matcher.inner.is_accepting()


@pytest.mark.parametrize(
    "whitespace, fitting, others",
    [
        (
            {},
            ['{"a":1}', '{\n    "a" : 1\n}', "{" + INDENTED + '"a" :\n\t1' + INDENTED + "}"],
            ["{" + INDENTED + " ", '{"a"  ', '{"a"\n\n', '{"a":1 2', ' {"a":1}', '{"a":1} '],
        ),
        ({"disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}']),
        ({"whitespace_pattern": " ?"}, ['{"a":1}', '{"a": 1}'], ['{"a":  1}', '{"a":\n1}']),
    ],
)
def test_whitespace_between_the_parts_of_json_is_bounded(shipped, whitespace, fitting, others):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    compiled = shipped.compile(StructuredOutputsParams(json=schema, **whitespace))
    assert [text for text in fitting if not fits(compiled, text)] == []
    assert [text for text in others if fits(compiled, text)] == []


@pytest.mark.parametrize(
    "grammar, fitting, others",
    [
        ('start: "x" %json {} "y"', ["x{}y", "x[" + INDENTED + "]y"], ["x[" + INDENTED + " ]y"]),
        (
            'start: tag %json {\n"type": "object"}\ntag: /[^"]/ // %json {}\n',
            ["a{" + INDENTED + "}"],
            ["a{" + INDENTED + " }"],
        ),
        (
            'start: "%json {}" %json {"x-guidance": {"whitespace_pattern": " {1,9}"}}',
            ["%json {}{" + 9 * " " + "}"],
            ["%json {}{" + 10 * " " + "}"],
        ),
    ],
)
def test_whitespace_in_a_schema_of_a_grammar_is_bounded(shipped, grammar, fitting, others):
    compiled = shipped.compile(StructuredOutputsParams(grammar=grammar))
    assert [text for text in fitting if not fits(compiled, text)] == []
    assert [text for text in others if fits(compiled, text)] == []


@pytest.mark.parametrize(
    "spec",
    [
        {"json": {"properties": {"a": {"type": "integer"}}}},
        {"grammar": 'start: %json {"properties": {"a": {"type": "integer"}}}'},
    ],
)
def test_an_object_has_no_properties_that_its_schema_does_not_name(shipped, spec):
    compiled = shipped.compile(StructuredOutputsParams(**spec))
    assert fits(compiled, '{"a":1}') and not fits(compiled, '{"a":1,')


@pytest.mark.parametrize("depth", [900, 950, 970, 980, 990])
def test_a_schema_that_is_nested_too_deeply_is_refused(shipped, depth):
    text = '{"items":' * depth + "{}" + "}" * depth
    specs: list[dict[str, Any]] = [{"json": text}, {"grammar": f"start: %json {text}"}]
    for spec in specs:
        with pytest.raises(ValueError, match=r"cannot be used|nested too deeply"):
            shipped.compile(StructuredOutputsParams(**spec))


def test_a_token_that_does_not_fit_ends_the_answer():
    matcher = grammar_of(regex="ab").start()
    assert matcher.advance(1)
    assert not matcher.advance(1)
    assert matcher.failure == "the request's other settings leave no token that fits"
    assert not matcher.advance(2)


def test_an_output_that_meets_the_limit_of_the_shared_lexer_continues_with_its_own(monkeypatch):
    def limits():
        from llguidance import LLParserLimits

        return LLParserLimits(max_lexer_states=30, verbose_errors=False)

    monkeypatch.setattr(grammars, "_limits", limits)
    numbers = np.random.default_rng(0)
    compiled = Grammars(GRAMMARS._load_tokenizer).compile(
        StructuredOutputsParams(regex="([a-c]{1,9}d.*e){1,9}")
    )

    def follow() -> tuple[bool, bool]:
        """Return whether a new output continued, and whether it met the limit."""
        matcher = compiled.start()
        shared = matcher.inner
        for _ in range(12):
            ids = sorted(next_ids(matcher, {EOS}))
            if matcher.failure or not matcher.advance(int(numbers.choice(ids))):
                return False, True
        return True, matcher.inner is not shared

    outcomes = [follow() for _ in range(40)]
    assert all(goes_on for goes_on, _ in outcomes)
    assert outcomes[-1][1]  # the states that other outputs used are not missing


REFUSED: dict[str, dict[str, Any]] = {
    "regex='\\(a' cannot be used": {"regex": "(a"},
    "look-around": {"regex": "(?=a)b"},
    "json cannot be used: regex parse error": {"json": {"type": "string", "pattern": "("}},
    "but an empty answer or an end token": {"regex": r"<\|im_end\|>"},
    "cannot be used: nothing satisfies it but an empty": {"grammar": 'root ::= ""'},
    "nothing satisfies it: minimum": {"json": {"type": "integer", "minimum": 5, "maximum": 3}},
    "Failed to convert the grammar": {"grammar": "root ::= ("},
    'unknown name: "foo"': {"grammar": "start: foo"},
    "nothing satisfies it": {"regex": "[^\\x00-\\x{10FFFF}]"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_compile_is_refused_with_the_reason(shipped, message):
    spec = StructuredOutputsParams(**REFUSED[message])
    for _ in range(2):  # the second time the error is cached
        with pytest.raises(ValueError, match=message):
            shipped.compile(spec)


def halves(i: int) -> dict:
    one, other = {f"a{i}": {"type": "string"}}, {f"b{i}": {"type": "integer"}}
    return {"anyOf": [{"properties": one}, {"properties": other}]}


def doubled(depth: int) -> str:
    """Return a grammar of a terminal that has 2 ** depth characters."""
    rules = [f"{'B' * i}: {'B' * (i + 1)} {'B' * (i + 1)}" for i in range(1, depth)]
    return "\n".join([*rules, f"{'B' * depth}: /z/", "start: B"])


EXPLOSIVE: dict[str, dict[str, Any]] = {
    "a regex": {"regex": "(((.{1,50}){1,50}){1,50}.*a){50}"},
    "a schema": {"json": {"allOf": [halves(i) for i in range(40)]}},
    "a grammar": {"grammar": doubled(40)},
}


@pytest.mark.parametrize("what", EXPLOSIVE)
def test_what_would_explode_is_refused_in_bounded_time(shipped, what):
    shipped.load()
    begin = time.process_time()
    with pytest.raises(ValueError, match="cannot be used.*too"):
        shipped.compile(StructuredOutputsParams(**EXPLOSIVE[what]))
    assert time.process_time() - begin < 20


def test_a_grammar_that_a_request_has_is_not_compiled_again(shipped, monkeypatch):
    monkeypatch.setattr(grammars, "_MAX_CACHED", 2)
    specs = [StructuredOutputsParams(regex=f"ab{i}") for i in range(4)]
    first, *_ = [shipped.compile(spec) for spec in specs]
    assert specs[0] not in shipped._compiled
    assert shipped.compile(specs[0]) is first


def test_a_compiled_grammar_waits_for_its_request_however_many_come_after(shipped, monkeypatch):
    """Otherwise the check between two steps would compile it again and delay all requests."""
    monkeypatch.setattr(grammars, "_MAX_CACHED", 1)
    compiling = CompilingRequests(shipped)
    specs = [StructuredOutputsParams(regex=f"cd{i}") for i in range(3)]
    for i, spec in enumerate(specs):
        compiling.add([AddRequest(str(i), [1], SamplingParams(structured_outputs=spec))], spec)
    compiling._pool.shutdown()
    monkeypatch.delattr(Grammar, "compile")
    taken: list[str] = []
    for (request,), error in compiling.take():
        assert error is None
        taken.append(request.request_id)
        shipped.compile(specs[int(request.request_id)])
    assert taken == ["0", "1", "2"]
    os.close(compiling.fileno())


def test_requests_wait_for_their_grammars_in_a_thread_and_can_be_aborted_there():
    compiling = CompilingRequests(GRAMMARS)
    specs = [StructuredOutputsParams(regex=regex) for regex in ("a{3}", "(a", "b{3}")]
    for i, spec in enumerate(specs):
        params = SamplingParams(structured_outputs=spec)
        compiling.add([AddRequest(f"{i}{c}", [1], params) for c in "xy"], spec)
    compiling.abort(["0x", "2x", "2y", "unknown"])
    taken: list[tuple[list[AddRequest], str | None]] = []
    while compiling._waiting:
        taken += compiling.take()
    ids = [[each.request_id for each in requests] for requests, _ in taken]
    assert ids == [["0y"], ["1x", "1y"]]
    assert [error is None for _, error in taken] == [True, False]
    compiling._pool.shutdown()
    os.close(compiling.fileno())


def test_an_engine_without_a_tokenizer_or_its_file_says_what_to_do(tmp_path):
    spec = StructuredOutputsParams(json_object=True)
    config = EngineConfig.resolve(device="cpu", skip_tokenizer_init=True)
    with pytest.raises(ValueError, match="needs a tokenizer, and this engine has none"):
        engine_grammars(config).compile(spec)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    config = EngineConfig.resolve(device="cpu", tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="needs tokenizer.json, and .* has none"):
        engine_grammars(config).compile(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": None}))
    with pytest.raises(ValueError, match="llguidance cannot read .*tokenizer.json"):
        engine_grammars(config).compile(spec)


def test_without_llguidance_the_error_names_the_extra(shipped, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fresh = engine_grammars(EngineConfig.resolve(device="cpu"))
    with pytest.raises(ValueError, match=r"pip install 'tpllm\[structured\]'"):
        fresh.compile(StructuredOutputsParams(regex="a"))
