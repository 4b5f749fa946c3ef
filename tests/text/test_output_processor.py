"""The outputs that callers read of the tokens of a simulated engine."""

import pickle
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpllm.config.checkpoint import resolve_model
from tpllm.engine.request import PackedLogprobs, RequestUpdate, TokenLogprobs
from tpllm.outputs import CompletionOutput, Logprob, RequestOutput
from tpllm.sampling_params import RequestOutputKind, SamplingParams
from tpllm.text.output_processor import OutputProcessor, Request
from tpllm.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(resolve_model(None))
DELTA, CUMULATIVE, FINAL_ONLY = (
    RequestOutputKind.DELTA,
    RequestOutputKind.CUMULATIVE,
    RequestOutputKind.FINAL_ONLY,
)
END = 4095
KINDS = [DELTA, CUMULATIVE, FINAL_ONLY]


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode_batch([text], add_special_tokens=False)[0]


class Engine:
    """One request, and a simulation of its engine."""

    def __init__(self, tokenizer: Tokenizer | None = TOKENIZER, **params: Any) -> None:
        self.processor = OutputProcessor(tokenizer)
        self.request = self.processor.add("hi", [1, 2], SamplingParams(**params))
        self.aborted: list[str] = []
        self.outputs: list[RequestOutput] = []

    def update(self, *new_ids: int, child: int = 0, end: str | None = None, **more: Any) -> None:
        engine_id = self.request.engine_requests[child].request_id
        stop_reason = more.pop("stop_reason", None)
        update = RequestUpdate(engine_id, list(new_ids), end, stop_reason, 0, **more)
        processed = self.processor.process([update])
        self.aborted += processed.to_abort
        for request in processed.changed:
            self.outputs.append(request.take())

    def run(self, ids: Sequence[int], end: str = "length", stop_reason: int | None = None) -> None:
        for token_id in ids[:-1]:
            self.update(token_id)
        self.update(ids[-1], end=end, stop_reason=stop_reason)

    @property
    def last(self) -> CompletionOutput:
        return self.outputs[-1].outputs[0]

    def joined(self) -> tuple[str, list[int]]:
        """The deltas joined."""
        each = [output.outputs[0] for output in self.outputs]
        return "".join(o.text for o in each), [id_ for o in each for id_ in o.token_ids]


# ---- kinds of output -----------------------------------------------------------------------------


def test_cumulative_outputs_grow_and_earlier_ones_stay_as_they_were():
    engine = Engine(output_kind=CUMULATIVE)
    ids = ids_of("I shall not want")
    engine.run(ids)
    for n, output in enumerate(engine.outputs, start=1):
        assert output.outputs[0].token_ids == ids[:n]
        assert output.outputs[0].text == TOKENIZER.decode(ids[:n])
        assert output.finished == (n == len(ids))
    assert engine.outputs[0].prompt == "hi" and engine.outputs[0].prompt_token_ids == [1, 2]


def test_deltas_are_what_is_new():
    engine = Engine(output_kind=DELTA)
    ids = ids_of("naïve — 日本 🙂")
    engine.run(ids)
    assert len(engine.outputs) == len(ids)
    assert engine.joined() == (TOKENIZER.decode(ids), ids)
    assert all("\ufffd" not in output.outputs[0].text for output in engine.outputs)


def test_final_only_comes_once():
    engine = Engine(output_kind=FINAL_ONLY)
    ids = ids_of("I shall not want")
    engine.run(ids)
    (output,) = engine.outputs
    assert output.finished and engine.last.text == "I shall not want"
    assert engine.last.token_ids == ids and engine.last.finish_reason == "length"


def test_a_delta_taken_late_holds_all_steps_since():
    processor = OutputProcessor(TOKENIZER)
    request = processor.add(None, [1], SamplingParams(output_kind=DELTA))
    ids = ids_of("I shall not want")
    for token_id in ids:
        processor.process(
            [RequestUpdate(request.engine_requests[0].request_id, [token_id], None, None, 0)]
        )
    assert request.has_new_output
    assert request.take().outputs[0].token_ids == ids
    assert not request.has_new_output


# ---- the end of a text ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop_reason", [None, END])
def test_an_end_token_is_among_the_ids_and_not_in_the_text(kind, stop_reason):
    engine = Engine(output_kind=kind, skip_special_tokens=False)
    ids = [*ids_of("Amen."), END]
    engine.run(ids, "stop", stop_reason)
    text, token_ids = (
        engine.joined() if kind is DELTA else (engine.last.text, engine.last.token_ids)
    )
    assert (text, token_ids) == ("Amen.", ids)
    assert (engine.last.finish_reason, engine.last.stop_reason) == ("stop", stop_reason)


def test_an_end_token_is_in_the_text_where_that_is_asked_for():
    engine = Engine(skip_special_tokens=False, include_stop_str_in_output=True)
    engine.run([*ids_of("Amen."), END], "stop")
    assert engine.last.text == "Amen.<|im_end|>"


def test_an_incomplete_character_is_returned_at_the_end():
    engine = Engine(output_kind=DELTA)
    half = ids_of("🙂")[:-1]
    assert half
    engine.run(half)
    assert engine.joined() == (TOKENIZER.decode(half), half)


def test_without_detokenizing_there_is_no_text():
    for engine in (Engine(detokenize=False), Engine(None)):
        engine.run(ids_of("Amen."))
        assert engine.last.text == ""
        assert engine.last.token_ids == ids_of("Amen.")


def test_updates_after_the_end_are_ignored():
    engine = Engine(stop="shall")
    engine.run(ids_of(" I shall"))
    num_outputs = len(engine.outputs)
    engine.update(5)
    engine.update(end="abort")
    assert len(engine.outputs) == num_outputs


# ---- stop strings --------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(data=st.data(), kind=st.sampled_from(KINDS), includes=st.booleans())
def test_a_stop_string_ends_the_text_at_any_token_boundary(data, kind, includes):
    text = "I shall not want. He maketh me — 日本 🙂 — to lie down"
    begin = data.draw(st.integers(0, len(text) - 1))
    stop = text[begin : data.draw(st.integers(begin + 1, min(len(text), begin + 12)))]
    end = text.index(stop) + len(stop)
    engine = Engine(output_kind=kind, stop=["nowhere", stop], include_stop_str_in_output=includes)
    ids = ids_of(text)
    position = 0
    while not engine.aborted and position < len(ids):
        num_new = data.draw(st.integers(1, 3))
        engine.update(*ids[position : position + num_new])
        position += num_new
    got, token_ids = engine.joined() if kind is DELTA else (engine.last.text, engine.last.token_ids)
    assert got == text[: end if includes else end - len(stop)]
    assert token_ids == ids[: len(token_ids)]
    assert stop in TOKENIZER.decode(token_ids)  # no token too few, and none too many
    assert stop not in TOKENIZER.decode(token_ids[:-1]).replace("\ufffd", "")
    assert (engine.last.finish_reason, engine.last.stop_reason) == ("stop", stop)
    assert engine.aborted == [engine.request.engine_requests[0].request_id]


def test_a_possible_beginning_of_a_stop_string_is_held_back():
    engine = Engine(output_kind=DELTA, stop="not here")
    engine.run(ids_of("I shall not want"))
    texts = [output.outputs[0].text for output in engine.outputs]
    assert "".join(texts) == "I shall not want"
    held = next(
        i for i, id_ in enumerate(ids_of("I shall not want")) if "not" in TOKENIZER.decode([id_])
    )
    assert "not" not in "".join(texts[: held + 1]) and texts[-1].startswith("not")


def test_text_that_is_held_back_is_returned_at_the_end():
    engine = Engine(output_kind=DELTA, stop="not here")
    engine.run(ids_of("I shall not"))
    assert engine.joined()[0] == "I shall not"


def test_a_stop_string_before_min_tokens_is_ignored():
    ids = ids_of("a b a b a b")
    engine = Engine(stop="b", min_tokens=3, max_tokens=30)
    engine.run(ids)
    num_tokens = len(engine.last.token_ids)
    assert 3 < num_tokens <= len(ids)
    assert engine.last.text == TOKENIZER.decode(ids[:num_tokens]).removesuffix("b")
    assert "b" in engine.last.text and engine.last.stop_reason == "b"


def test_the_last_token_may_complete_a_stop_string():
    engine = Engine(stop="want")
    engine.run(ids_of("I shall not want"), "length")
    assert (engine.last.text, engine.last.finish_reason) == ("I shall not ", "stop")
    assert engine.aborted == []  # the engine has ended it too


@pytest.mark.parametrize("params", [{"stop": "x"}, {"bad_words": ["x"]}])
def test_stop_strings_and_bad_words_need_a_tokenizer(params):
    with pytest.raises(ValueError, match=r"=\['x'\] needs a tokenizer, and this engine has none"):
        Engine(None, **params)


# ---- several continuations -----------------------------------------------------------------------


def test_each_continuation_is_an_engine_request_with_its_own_seed():
    engine = Engine(n=3, seed=7)
    requests = engine.request.engine_requests
    assert len({each.request_id for each in requests}) == 3
    assert requests[0].sampling_params.seed == 7
    assert len({each.sampling_params.seed for each in requests}) == 3
    again = Engine(n=3, seed=7).request.engine_requests
    assert [each.sampling_params for each in again] == [each.sampling_params for each in requests]
    assert {each.sampling_params.seed for each in Engine(n=2).request.engine_requests} == {None}


def test_continuations_are_joined_and_the_last_end_is_the_request_s():
    engine = Engine(n=2)
    engine.update(*ids_of("first"), child=0)
    engine.update(*ids_of("second"), child=1, end="length")
    engine.update(END, child=0, end="stop")
    assert [output.finished for output in engine.outputs] == [False, False, True]
    texts = [(each.index, each.text, each.finish_reason) for each in engine.outputs[-1].outputs]
    assert texts == [(0, "first", "stop"), (1, "second", "length")]


def test_a_delta_holds_the_continuations_with_new_tokens():
    engine = Engine(n=3, output_kind=DELTA)
    engine.update(*ids_of("second"), child=1)
    engine.update(*ids_of("third"), child=2, end="length")
    assert [[each.index for each in output.outputs] for output in engine.outputs] == [[1], [2]]


def test_final_only_waits_for_all_continuations():
    engine = Engine(n=2, output_kind=FINAL_ONLY)
    engine.update(5, child=1, end="length")
    assert engine.outputs == []
    engine.update(5, child=0, end="length")
    assert [each.index for each in engine.outputs[0].outputs] == [0, 1]


def test_an_abort_ends_running_continuations():
    engine = Engine(n=2, output_kind=DELTA)
    engine.update(5, child=1, end="length")
    aborted = engine.processor.abort(engine.request.request_id)
    assert aborted == (engine.request, [engine.request.engine_requests[0].request_id])
    output = engine.request.take()
    assert output.finished and [each.finish_reason for each in output.outputs] == ["abort"]
    assert engine.processor.abort(engine.request.request_id) is None


def test_an_id_may_be_used_again_after_its_end():
    processor = OutputProcessor(TOKENIZER)

    def add() -> Request:
        return processor.add(None, [1], SamplingParams(), request_id="mine")

    first = add()
    with pytest.raises(ValueError, match="request_id='mine' is still running"):
        add()
    assert processor.drop([first.engine_requests[0].request_id]) is first
    assert add().engine_requests[0].request_id != first.engine_requests[0].request_id
    assert processor.add(None, [1], SamplingParams()).request_id != "mine"


# ---- log-probabilities ---------------------------------------------------------------------------


def test_log_probabilities_have_the_token_itself_first_and_once():
    engine = Engine(logprobs=2, output_kind=DELTA)
    hi, end = ids_of("hi")[0], END
    engine.update(hi, logprobs=[TokenLogprobs([hi, end, 7], [-2.5, -0.5, -1.0], [3, 1, 2])])
    engine.update(
        end, end="stop", logprobs=[TokenLogprobs([end, end, 7], [-0.25, -0.25, -3.0], [1, 1, 2])]
    )
    first, second = (output.outputs[0] for output in engine.outputs)
    assert first.logprobs is not None and second.logprobs is not None
    assert [list(each) for each in first.logprobs] == [[hi, end, 7]]
    assert first.logprobs[0][hi] == Logprob(-2.5, 3, TOKENIZER.decode([hi]))
    assert first.logprobs[0][end] == Logprob(-0.5, 1, "<|im_end|>")
    assert second.logprobs == [{end: Logprob(-0.25, 1, "<|im_end|>"), 7: second.logprobs[0][7]}]
    assert (first.cumulative_logprob, second.cumulative_logprob) == (-2.5, -2.75)


def test_log_probabilities_of_tokens_after_a_stop_string_are_dropped():
    engine = Engine(logprobs=0, stop="shall")
    ids = ids_of("I shall not want")
    engine.update(*ids, logprobs=[TokenLogprobs([id_], [-1.0], [1]) for id_ in ids])
    assert engine.last.logprobs is not None
    assert len(engine.last.logprobs) == len(engine.last.token_ids) < len(ids)
    assert engine.last.cumulative_logprob == -len(engine.last.token_ids)


def packed_logprobs(
    ranks: list[int], token_ids: list[list[int]], logprobs: list[list[float]]
) -> PackedLogprobs:
    return PackedLogprobs(
        np.array(ranks, np.int32).tobytes(),
        np.array(token_ids, np.int32).tobytes(),
        np.array(logprobs, np.float32).tobytes(),
    )


def test_prompt_log_probabilities_come_once_in_deltas_and_always_otherwise():
    packed = packed_logprobs([2], [[2, 9]], [[-1.0, -0.5]])
    for kind, num_times in ((DELTA, 1), (CUMULATIVE, 2), (FINAL_ONLY, 1)):
        engine = Engine(prompt_logprobs=1, output_kind=kind)
        engine.update(5, prompt_logprobs=packed)
        engine.update(6, end="length")
        reported = [o.prompt_logprobs for o in engine.outputs if o.prompt_logprobs is not None]
        assert len(reported) == num_times
        assert reported[0][0] is None and reported[0][1] is not None
        assert list(reported[0][1]) == [2, 9]
        assert reported[0][1][9] == Logprob(-0.5, 1, TOKENIZER.decode([9]))


def test_entries_of_a_long_prompt_are_made_when_they_are_read(monkeypatch):
    made = []

    def decode_one(token_id: int) -> str:
        made.append(token_id)
        return str(token_id)

    monkeypatch.setattr(TOKENIZER, "decode_one", decode_one)
    n = 5000
    ids = [[i % 50, 60, 61] for i in range(n - 1)]
    engine = Engine(prompt_logprobs=2)
    engine.update(
        5, prompt_logprobs=packed_logprobs([7] * (n - 1), ids, [[-0.5, -1.0, -2.0]] * (n - 1))
    )
    (output,) = engine.outputs
    reported = output.prompt_logprobs
    assert reported is not None and len(reported) == n and made == []
    assert reported[-1] == {
        48: Logprob(-0.5, 7, "48"),
        60: Logprob(-1.0, 1, "60"),
        61: Logprob(-2.0, 2, "61"),
    }
    assert made == [48, 60, 61]


def test_prompt_log_probabilities_read_like_a_list():
    packed = packed_logprobs([1, 2], [[3, 3], [4, 3]], [[-0.5, -0.5], [-2.0, -0.25]])
    engine = Engine(prompt_logprobs=1, detokenize=False)
    engine.update(5, prompt_logprobs=packed)
    reported = engine.outputs[0].prompt_logprobs
    assert reported is not None
    entries = [None, {3: Logprob(-0.5, 1)}, {4: Logprob(-2.0, 2), 3: Logprob(-0.25, 1)}]
    assert reported == entries and entries == reported and list(reported) == entries
    assert reported != entries[:2] and repr(reported) == repr(entries)
    assert reported[1:] == entries[1:] and reported[::-1] == entries[::-1] and reported[-3] is None
    for index in (3, -4):
        with pytest.raises(IndexError):
            reported[index]
    for copied in (
        pickle.loads(pickle.dumps(reported)),
        asdict(engine.outputs[0])["prompt_logprobs"],
    ):
        assert type(copied) is list and copied == entries
