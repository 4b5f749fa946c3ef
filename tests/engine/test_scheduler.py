"""Tests of the scheduler, with examples and random traffic; `simulation` checks every step."""

from collections import Counter
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.engine.simulation import EOS, VOCAB_SIZE, SimulatedEngine, Watched
from tpllm.channel.row_record import have_options, split_lists
from tpllm.channel.step_plan import StepPlan, StepResult
from tpllm.engine.request import RequestUpdate, Status
from tpllm.sampling_params import SamplingParams
from tpllm.structured_outputs import StructuredOutputsParams


def generate(num_tokens: int, **params: Any) -> SamplingParams:
    """Return greedy parameters for exactly `num_tokens` tokens."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **params)


def prompt_of(num_tokens: int, first: int = 1) -> list[int]:
    """Return a prompt that shares no block with a prompt of another `first`."""
    return [first, *(i % VOCAB_SIZE for i in range(num_tokens - 1))]


def send(engine: SimulatedEngine) -> StepPlan:
    plan = engine.send()
    assert plan is not None
    return plan


def rows(plan: StepPlan) -> list[tuple[int, int, int]]:
    """Return row, start and number of tokens of each scheduled row."""
    return list(
        zip(plan.rows.tolist(), plan.starts.tolist(), plan.num_tokens.tolist(), strict=True)
    )


# ---- steps ---------------------------------------------------------------------------------------


def test_without_requests_there_is_nothing_to_schedule():
    engine = SimulatedEngine()
    assert engine.send() is None
    assert engine.step() == []


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks():
    engine = SimulatedEngine(max_num_batched_tokens=16)
    request = engine.add(prompt_of(37))
    plans = [send(engine) for _ in range(3)]
    row = request.seq.row
    assert [rows(plan) for plan in plans] == [[(row, 0, 16)], [(row, 16, 16)], [(row, 32, 5)]]
    assert [plan.samples.tolist() for plan in plans] == [[0], [0], [1]]
    assert np.concatenate([plan.token_ids for plan in plans]).tolist() == prompt_of(37)
    assert engine.scheduler.stats.num_prefill_chunks == 2
    engine.run_to_end()


def test_a_plan_carries_only_what_changed():
    engine = SimulatedEngine(block_size=4)
    engine.add(prompt_of(6))
    plans = [send(engine) for _ in range(4)]  # tokens 0 to 5, then 6, 7 and 8
    assert [len(plan.entering) for plan in plans] == [1, 0, 0, 0]
    assert [len(plan.block_updates) for plan in plans] == [2, 0, 0, 1]
    assert [plan.token_ids.size for plan in plans] == [6, 0, 0, 0]
    engine.run_to_end()


def test_decode_rows_come_first_then_running_prompts_then_new_prompts():
    engine = SimulatedEngine(max_num_batched_tokens=16)
    decoding = engine.add(prompt_of(5, first=1), generate(9))
    begun = engine.add(prompt_of(20, first=2))
    send(engine)
    new = engine.add(prompt_of(10, first=3))
    plan = send(engine)
    assert plan.num_decode == 1
    assert rows(plan) == [
        (decoding.seq.row, 5, 1),
        (begun.seq.row, 11, 9),
        (new.seq.row, 0, 6),
    ]
    engine.run_to_end()
    assert engine.scheduler.stats.num_mixed_steps >= 1


def test_the_next_token_is_scheduled_before_the_last_one_is_known():
    engine = SimulatedEngine()
    request = engine.add(prompt_of(5), generate(3))
    assert [rows(send(engine))[0][1:] for _ in range(3)] == [(0, 5), (5, 1), (6, 1)]
    assert engine.send() is None  # all its tokens are known or in flight
    assert request.token_ids == []
    engine.run_to_end()


def test_a_token_scheduled_after_the_end_is_dropped():
    engine = SimulatedEngine()
    request = engine.add(prompt_of(5), SamplingParams(temperature=0, max_tokens=50))
    engine.run_to_end()
    assert request.finish_reason == "stop"
    assert request.token_ids[-1] == EOS
    assert engine.events["tokens dropped"] == 1


def test_a_row_that_enters_brings_its_sampling_settings():
    engine = SimulatedEngine()
    params = SamplingParams(temperature=0.7, max_tokens=5, min_tokens=2, stop_token_ids=[3, 5])
    request = engine.add(prompt_of(6), params)
    engine.add(prompt_of(6, first=2), SamplingParams(stop_token_ids=[3], max_tokens=1))
    record, unmasked = send(engine).entering
    assert record["row"] == request.seq.row
    assert record["temperature"] == np.float32(0.7)
    assert record["seed"] == request.seq.seed
    assert record["min_position"] == 8  # of the first token that may be an end token
    assert record["stop_ids"].tolist() == [EOS, 3, 5] + [-1] * 13
    assert unmasked["stop_ids"].tolist() == [-1] * 16  # without min_tokens none is masked
    engine.run_to_end()


def test_a_step_never_carries_more_block_updates_than_the_limit():
    # eight sequences, each of one token to compute after 15 blocks that are cached
    engine = SimulatedEngine(block_size=4, max_num_batched_tokens=16, num_blocks=100)
    limit = engine.limits.max_block_updates
    first = engine.add(prompt_of(61), generate(1))
    while first.finish_reason is None:
        engine.step()
    for _ in range(8):
        engine.add(prompt_of(61), generate(1))
    plan = send(engine)
    assert len(plan.block_updates) == limit // 16 * 16 < 8 * 16
    assert len(plan.rows) == limit // 16
    engine.run_to_end()


# ---- ends ----------------------------------------------------------------------------------------


def serve(params: SamplingParams, num_prompt_tokens: int = 5, **limits: Any) -> Watched:
    engine = SimulatedEngine(**limits)
    request = engine.add(prompt_of(num_prompt_tokens), params)
    engine.run_to_end()
    return request


def test_max_tokens_ends_a_request():
    request = serve(generate(7))
    assert (len(request.token_ids), request.finish_reason) == (7, "length")


def test_the_model_length_ends_a_request():
    request = serve(SamplingParams(max_tokens=None, ignore_eos=True), max_model_len=20)
    assert (len(request.token_ids), request.finish_reason) == (15, "length")


def test_the_whole_cache_may_serve_one_request():
    request = serve(generate(1000), num_blocks=5, block_size=4)
    assert (len(request.token_ids), request.finish_reason) == (4 * 4 - 5, "length")


def test_an_end_token_stops_without_a_stop_reason_and_a_stop_token_is_named():
    greedy = serve(generate(50)).token_ids
    assert EOS in greedy
    by_eos = serve(SamplingParams(temperature=0, max_tokens=50))
    assert by_eos.token_ids == greedy[: greedy.index(EOS) + 1]
    assert (by_eos.finish_reason, by_eos.stop_reason) == ("stop", None)
    stop = greedy[0]
    by_id = serve(generate(50, stop_token_ids=[stop]))
    assert (by_id.token_ids, by_id.finish_reason, by_id.stop_reason) == ([stop], "stop", stop)


@pytest.mark.parametrize("min_tokens", [1, 2, 5, 9])
def test_no_end_token_is_sampled_before_min_tokens(min_tokens):
    every_id = list(
        range(1, VOCAB_SIZE)
    )  # with EOS all ids but one: every sampled token would end the request
    params = SamplingParams(max_tokens=9, min_tokens=min_tokens, stop_token_ids=every_id[1:])
    request = serve(params)
    assert request.token_ids[:min_tokens] == [1] * min_tokens
    assert len(request.token_ids) >= min_tokens


def test_updates_hold_the_number_of_prompt_tokens_cached_at_first_admission():
    engine = SimulatedEngine(block_size=4)
    engine.add(prompt_of(16))
    engine.add(prompt_of(18))
    engine.add(prompt_of(16))
    news: dict[str, RequestUpdate] = {}
    while engine.scheduler.num_unfinished:
        news |= {update.request_id: update for update in engine.step()}
    # the last token of a prompt is computed even where its block is cached
    assert [news[each].num_cached_tokens for each in "012"] == [0, 16, 12]
    assert engine.scheduler.stats.num_prompt_tokens == 50
    assert engine.scheduler.stats.num_cached_tokens == 28


def test_an_end_token_before_min_tokens_would_not_end_a_request():
    engine = SimulatedEngine()
    request = engine.add(prompt_of(5), SamplingParams(max_tokens=3, min_tokens=2))
    scheduler = engine.scheduler
    reasons = []
    for step in range(3):
        scheduler.schedule()
        one = np.ones(1, dtype=np.int32)
        reasons += [
            each.finish_reason
            for each in scheduler.finish(StepResult(step, one, EOS * one, one[:0]))
        ]
    assert reasons == [None, None, "stop"]
    assert request.seq.tokens[5:] == [EOS] * 3


# ---- options and log-probabilities ---------------------------------------------------------------


def test_a_row_without_options_carries_none():
    engine = SimulatedEngine()
    engine.add(prompt_of(6), SamplingParams(temperature=0.7, min_tokens=2, stop_token_ids=[3]))
    engine.add(prompt_of(6), SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.5))
    plan = send(engine)
    assert plan.row_lists.size == 0
    assert not have_options(plan.entering).any()
    engine.run_to_end()


def test_a_row_carries_its_options_once_and_again_after_a_preemption():
    engine = SimulatedEngine(num_blocks=7, block_size=4)
    params = generate(6, repetition_penalty=1.5, logprobs=1, prompt_logprobs=2)
    for i in range(3):
        engine.add(prompt_of(6, first=i + 1), params)
    engine.run_to_end()
    assert engine.scheduler.stats.num_preemptions
    for plan in engine.plans:
        assert have_options(plan.entering).all()
        lists = split_lists(plan.entering, plan.row_lists)
        assert all(each["tokens"].size >= 6 for each in lists)


def test_prompt_logprobs_are_computed_from_the_first_token_on_whatever_the_cache_has():
    engine = SimulatedEngine(block_size=4, max_num_batched_tokens=8)
    engine.add(prompt_of(18))
    engine.run_to_end()
    asking = engine.add(prompt_of(18), generate(4, prompt_logprobs=2))
    other = engine.add(prompt_of(18))
    assert rows(send(engine)) == [(asking.seq.row, 0, 8)]
    engine.run_to_end()
    assert (asking.seq.num_cached_tokens, other.seq.num_cached_tokens) == (0, 16)


def test_prompt_logprobs_that_were_returned_are_not_computed_again():
    engine = SimulatedEngine(num_blocks=7, block_size=4)
    for i in range(3):
        engine.add(prompt_of(6, first=i + 1), generate(6, prompt_logprobs=2))
    engine.run_to_end()
    asked = [
        num_likeliest
        for plan in engine.plans
        for num_likeliest in plan.entering["num_prompt_logprobs"].tolist()
    ]
    assert sorted(asked) == [-1, 2, 2, 2]


def test_a_step_never_carries_more_options_than_the_limit():
    engine = SimulatedEngine(
        num_blocks=900, block_size=48, max_num_seqs=200, max_num_batched_tokens=200
    )
    limit = engine.limits.max_row_list_words
    params = generate(1, repetition_penalty=1.5, logit_bias=dict.fromkeys(range(8), 0.0))
    first = engine.add(prompt_of(49), generate(1))
    while first.finish_reason is None:
        engine.step()
    for _ in range(200):  # each of one token to compute
        engine.add(prompt_of(49), params)
    plan = send(engine)
    num_words = plan.row_lists.size // plan.rows.size
    assert limit - num_words < plan.row_lists.size <= limit
    engine.run_to_end()


# ---- admission, preemption -----------------------------------------------------------------------


def test_a_small_request_waits_behind_a_big_one():
    engine = SimulatedEngine(num_blocks=9, block_size=4)
    running = engine.add(prompt_of(12, first=1), generate(8))
    big = engine.add(prompt_of(28, first=2))
    small = engine.add(prompt_of(3, first=3))
    send(engine)
    assert [each.seq.status for each in (running, big, small)] == [
        Status.RUNNING,
        Status.WAITING,
        Status.WAITING,
    ]
    engine.run_to_end()


def test_no_more_sequences_run_than_there_are_rows():
    engine = SimulatedEngine(max_num_seqs=2)
    requests = [engine.add(prompt_of(5, first=i), generate(i + 1)) for i in range(4)]
    send(engine)
    assert [each.seq.status for each in requests] == [Status.RUNNING] * 2 + [Status.WAITING] * 2
    engine.run_to_end()


def crowded() -> tuple[SimulatedEngine, list[Watched]]:
    """Three requests that fill all blocks; the first will need one more at its third token."""
    engine = SimulatedEngine(num_blocks=7, block_size=4)
    requests = [engine.add(prompt_of(6, first=i + 1), generate(6)) for i in range(3)]
    send(engine)
    assert engine.blocks.num_free == 0
    return engine, requests


def test_the_latest_arrival_is_preempted_and_waits_first_in_line():
    engine, (first, second, third) = crowded()
    later = engine.add(prompt_of(3, first=4))
    send(engine)
    send(engine)
    assert engine.send() is None  # its blocks come back with the steps in flight
    statuses = [each.seq.status for each in (first, second, third, later)]
    assert statuses == [Status.RUNNING, Status.RUNNING, Status.WAITING, Status.WAITING]
    assert engine.scheduler.stats.num_preemptions == 1
    engine.run_to_end()
    entering = np.concatenate([plan.entering for plan in engine.plans])
    assert entering["seed"].astype(np.uint32).tolist() == [1, 2, 3, 3, 4]  # numbers the requests


def test_where_several_rows_lack_a_block_as_many_are_freed():
    engine = SimulatedEngine(num_blocks=7, block_size=4)
    lengths = (8, 8, 3, 3)  # the first two need a third block at once; the others have one each
    requests = [engine.add(prompt_of(n, first=i)) for i, n in enumerate(lengths)]
    send(engine)
    assert engine.send() is None
    assert [each.seq.status for each in requests] == [Status.RUNNING] * 2 + [Status.WAITING] * 2
    engine.run_to_end()


def test_blocks_return_only_when_no_step_in_flight_writes_them():
    engine, (_, _, third) = crowded()
    send(engine)
    send(engine)
    engine.send()
    for _ in range(2):
        engine.receive()
        assert engine.blocks.num_free == 0  # the last step still writes a token of it
        assert third.seq.num_steps_in_flight > 0
    engine.receive()
    assert engine.blocks.num_free == 2
    engine.run_to_end()


def test_tokens_in_flight_of_a_preempted_row_are_kept_once():
    engine, (_, _, third) = crowded()
    for _ in range(3):
        engine.send()
    assert (third.seq.status, third.seq.num_steps_in_flight) == (Status.WAITING, 3)
    for _ in range(3):
        engine.receive()
    assert third.token_ids == third.seq.tokens[6:] == third.truth.outcome()[0][:3]
    while third.seq.status is Status.WAITING:
        engine.step()
    assert third.seq.prefill_target == 9  # the three tokens are computed again
    engine.run_to_end()


def test_a_preempted_request_finds_its_work_in_the_cache():
    engine = SimulatedEngine(num_blocks=7, block_size=4)
    first = engine.add(prompt_of(8, first=1))
    second = engine.add(prompt_of(15, first=2))
    send(engine)
    assert engine.send() is None  # the first needs a block, and the second has the last four
    assert first.seq.status is Status.RUNNING and second.seq.status is Status.WAITING
    engine.run_to_end()
    last_to_enter = next(plan for plan in reversed(engine.plans) if len(plan.entering))
    # it has 16 tokens now with the one that was in flight; its fourth block went to the first
    assert rows(last_to_enter) == [(last_to_enter.entering["row"][0], 12, 4)]


def test_a_preempted_request_may_come_back_at_once_to_share_what_it_had_computed_itself():
    engine = SimulatedEngine(num_blocks=8, block_size=1, max_steps_in_flight=1)
    twins = [engine.add(prompt_of(4), generate(6)) for _ in range(2)]
    engine.step()
    engine.step()
    assert engine.blocks.num_free == 0  # three prompt tokens are shared, two of each are not
    plan = send(engine)
    assert engine.scheduler.stats.num_preemptions == 1
    assert rows(plan) == [(twins[0].seq.row, 5, 1), (twins[1].seq.row, 5, 1)]
    assert twins[0].seq.block_table[:5] == twins[1].seq.block_table[:5]
    engine.run_to_end()


def test_a_preempted_request_can_end_by_its_token_in_flight():
    engine = SimulatedEngine(num_blocks=5, block_size=4)
    engine.add(prompt_of(8, first=1))
    second = engine.add(prompt_of(8, first=2), generate(1))
    send(engine)
    assert engine.send() is None
    assert second.seq.status is Status.WAITING
    engine.receive()
    assert (second.finish_reason, len(second.token_ids)) == ("length", 1)
    engine.run_to_end()


# ---- the prefix cache ----------------------------------------------------------------------------


def test_identical_prompts_of_one_step_share_blocks():
    engine = SimulatedEngine(block_size=4)
    requests = [engine.add(prompt_of(10)) for _ in range(3)]
    plan = send(engine)
    assert plan.num_tokens.tolist() == [10, 2, 2]
    tables = [each.seq.block_table for each in requests]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    assert engine.events["prefix hits within a step"] == 2
    engine.run_to_end()


def test_generated_tokens_are_found_as_a_prefix_too():
    engine = SimulatedEngine(block_size=4)
    first = engine.add(prompt_of(6), generate(10))
    engine.run_to_end()
    second = engine.add(prompt_of(6) + first.token_ids[:8])
    assert send(engine).starts.tolist() == [12]
    engine.run_to_end()
    assert second.token_ids[:2] == first.token_ids[8:]


def test_a_token_not_read_back_is_never_part_of_a_prefix():
    engine = SimulatedEngine(block_size=4)
    first = engine.add(prompt_of(6), generate(10))
    plans = [send(engine) for _ in range(3)]  # tokens 6 and 7 are stored by steps in flight
    assert plans[-1].starts.tolist() == [7]
    engine.add([*first.truth.tokens[:8], 1])
    assert send(engine).starts.tolist() == [8, 4]
    engine.run_to_end()


def test_without_prefix_caching_every_prompt_is_computed():
    engine = SimulatedEngine(block_size=4, enable_prefix_caching=False)
    for _ in range(3):
        engine.add(prompt_of(10))
    assert send(engine).num_tokens.tolist() == [10, 10, 10]
    engine.run_to_end()
    assert engine.scheduler.stats.num_cached_tokens == 0


def test_a_reset_of_the_prefix_cache_forgets_prompts_and_keeps_running_requests():
    engine = SimulatedEngine(block_size=4)
    running = engine.add(prompt_of(10), generate(12))
    send(engine)
    engine.blocks.reset_prefix_cache()
    again = engine.add(prompt_of(10))
    assert send(engine).num_tokens.tolist() == [1, 10]
    assert not set(running.seq.block_table) & set(again.seq.block_table)
    engine.run_to_end()


# ---- abort ---------------------------------------------------------------------------------------


def test_a_waiting_request_can_be_aborted():
    engine = SimulatedEngine(max_num_seqs=1)
    engine.add(prompt_of(5))
    waiting = engine.add(prompt_of(5, first=2))
    send(engine)
    engine.abort("1")
    assert (waiting.finish_reason, waiting.token_ids) == ("abort", [])
    engine.run_to_end()


def test_an_aborted_request_holds_its_blocks_until_no_step_writes_them():
    engine = SimulatedEngine()
    running = engine.add(prompt_of(5), generate(20))
    send(engine)
    send(engine)
    engine.abort("0")
    assert running.seq.status is Status.FINISHED
    assert engine.blocks.num_free < engine.blocks.num_usable_blocks
    assert engine.send() is None
    engine.receive()
    assert engine.blocks.num_free < engine.blocks.num_usable_blocks
    engine.receive()
    assert engine.blocks.num_free == engine.blocks.num_usable_blocks
    assert running.token_ids == []
    engine.run_to_end()


def test_a_request_can_be_aborted_in_the_middle_of_its_prompt():
    engine = SimulatedEngine(max_num_batched_tokens=8)
    engine.add(prompt_of(30))
    send(engine)
    engine.abort("0")
    sharer = engine.add(prompt_of(30))
    plan = send(engine)
    assert plan.starts.tolist() == [8]  # another request uses its computed blocks
    engine.run_to_end()
    assert sharer.finish_reason == "length"


def test_a_preempted_request_can_be_aborted_with_tokens_in_flight():
    engine, (_, _, third) = crowded()
    for _ in range(3):
        engine.send()
    assert third.seq.status is Status.WAITING and third.seq.num_steps_in_flight
    engine.abort("2")
    engine.run_to_end()
    assert third.token_ids == []


def test_ids_that_are_unknown_or_ended_are_ignored():
    engine = SimulatedEngine()
    engine.add(prompt_of(5))
    engine.run_to_end()
    engine.abort("0", "no such request")
    engine.add(prompt_of(5))
    engine.abort("1", "1")
    engine.run_to_end()


# ---- structured outputs --------------------------------------------------------------------------


def structured(num_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=num_tokens, structured_outputs=StructuredOutputsParams(**settings)
    )


def test_a_first_token_has_its_mask_at_once_and_later_ones_when_the_token_before_is_known():
    engine = SimulatedEngine()
    request = engine.add(prompt_of(5), structured(20, regex="(ab){20}"))
    send(engine)
    assert engine.events["masks"] == 1
    send(engine)  # the worker runs the forward and has no mask yet
    assert engine.events["masks"] == 1
    assert engine.send() is None
    engine.receive()
    assert (request.token_ids, engine.events["masks"]) == ([1], 2)
    engine.run_to_end()
    assert request.token_ids == [1, 2] * 10


def test_a_chunk_that_samples_nothing_waits_for_no_mask():
    engine = SimulatedEngine(max_num_batched_tokens=4)
    engine.add(prompt_of(10), structured(2, regex="ab"))
    for _ in range(2):
        send(engine)
    assert engine.events["masks"] == 0
    send(engine)  # no earlier token is in flight, though two steps are
    assert engine.events["masks"] == 1
    engine.run_to_end()


def test_rows_without_a_grammar_get_no_mask():
    engine = SimulatedEngine()
    engine.add(prompt_of(5), generate(6))
    engine.add(prompt_of(5, first=2), structured(3, regex="a*"))
    engine.run_to_end()
    assert engine.events["masks"] <= 3


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 9])
def test_where_a_grammar_is_complete_an_end_token_ends_the_request(ignore_eos, min_tokens):
    spec = StructuredOutputsParams(choice=["abc", "abd"])
    request = serve(
        SamplingParams(
            max_tokens=9, structured_outputs=spec, ignore_eos=ignore_eos, min_tokens=min_tokens
        )
    )
    assert request.token_ids in ([1, 2, 3, EOS], [1, 2, 4, EOS])
    assert (request.finish_reason, request.stop_reason) == ("stop", None)


@pytest.mark.parametrize("settings", [{"ignore_eos": True}, {"min_tokens": 12}])
def test_an_end_token_is_held_back_where_the_grammar_can_go_on(settings):
    spec = StructuredOutputsParams(regex="a{1,12}")
    request = serve(SamplingParams(max_tokens=20, structured_outputs=spec, **settings))
    assert request.token_ids == [1] * 12 + [EOS]


def test_a_request_that_has_no_next_token_ends_and_says_why():
    engine = SimulatedEngine()
    request = engine.add(prompt_of(5), structured(9, regex="(ab){9}"))
    send(engine)
    send(engine)
    engine.receive()
    assert request.seq.matcher is not None
    request.seq.matcher.advance(7)  # as if the lexer had met a limit
    (update,) = engine.receive()
    assert (update.new_token_ids, update.finish_reason) == ([], "error")
    assert update.stop_reason == (
        "structured_outputs: the request's other settings leave no token that fits"
    )
    engine.run_to_end()
    assert request.token_ids == [1]


# ---- random traffic ------------------------------------------------------------------------------

FAMILIES = [prompt_of(24, first) for first in (1, 2)]  # prompts share a start with one of these


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    family = draw(st.sampled_from(FAMILIES))
    own = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4))
    return family[: draw(st.integers(1, len(family)))] + own


OPTIONS: list[dict[str, Any]] = [
    {},
    {},
    {"logprobs": 0},
    {"repetition_penalty": 1.5},  # its row reads its tokens
    {"prompt_logprobs": 3},
    {"logprobs": 2, "prompt_logprobs": 0, "top_k": 3},
]

STRUCTURED = [
    StructuredOutputsParams(regex="[ab]{0,9}c|d*"),
    StructuredOutputsParams(choice=["abcd", "abce", "g"]),
    StructuredOutputsParams(grammar='root ::= "a" root "b" | "c"'),
]


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 16))
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1.0])),
        max_tokens=draw(st.sampled_from([max_tokens, max_tokens, None])),
        min_tokens=draw(st.integers(0, max_tokens)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2)),
        **draw(st.sampled_from(OPTIONS)),
        structured_outputs=draw(st.sampled_from([None, None, *STRUCTURED])),
    )


class Traffic(RuleBasedStateMachine):
    """Adds and aborts requests in any order, on engines of any small size.

    `SimulatedEngine.check` must hold after every rule. At the end all requests are served, and each
    is compared with the same request run alone.
    """

    events: ClassVar[Counter[str]] = Counter()  # over all examples

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 32),
        max_model_len=st.integers(8, 40),
        cache_tokens=st.integers(8, 80),
        enable_prefix_caching=st.sampled_from([True, True, True, False]),
        max_steps_in_flight=st.integers(1, 3),
    )
    def start(self, cache_tokens: int, block_size: int, **limits: Any) -> None:
        num_blocks = cache_tokens // block_size + 1
        self.engine = SimulatedEngine(num_blocks=num_blocks, block_size=block_size, **limits)
        self.num_resets = 0

    @rule(requests=st.lists(st.tuples(prompts(), sampling_params()), min_size=1, max_size=4))
    def add(self, requests: list[tuple[list[int], SamplingParams]]) -> None:
        for prompt, params in requests:
            # as the coordinator checks: there is room for one more token
            self.engine.add(prompt[: self.engine.max_total_tokens - 1], params)

    @precondition(lambda self: self.num_in_flight < self.engine.max_steps_in_flight)
    @rule()
    def send(self) -> None:
        self.engine.send()

    @precondition(lambda self: self.num_in_flight > 0)
    @rule()
    def receive(self) -> None:
        self.engine.receive()

    @rule(num_steps=st.integers(1, 8))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step()

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        ids = st.sampled_from(list(self.engine.requests))
        self.engine.abort(*data.draw(st.lists(ids, max_size=2)))

    @precondition(lambda self: self.num_resets < 2)  # more would leave little to find
    @rule()
    def reset_prefix_cache(self) -> None:
        self.num_resets += 1
        self.engine.blocks.reset_prefix_cache()

    @invariant()
    def everything_is_in_order(self) -> None:
        self.engine.check()

    @property
    def num_in_flight(self) -> int:
        return self.engine.scheduler.num_in_flight

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.run_to_end()
            Traffic.events += self.engine.events


@pytest.mark.timeout(900)  # hypothesis may spend five minutes on making a failure small
def test_random_traffic_is_served_as_if_each_request_were_alone(monkeypatch):
    # else hypothesis uses constants of all loaded modules, so that traffic depends on other tests
    monkeypatch.setattr(providers, "_get_local_constants", Constants)
    Traffic.events = Counter()
    run_state_machine_as_test(
        Traffic,
        settings=settings(
            max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None
        ),
    )
    # every kind of event occurred
    for event in (
        "chunks",
        "mixed steps",
        "prefix hits",
        "prefix hits within a step",
        "preemptions",
        "preemptions with a token in flight",
        "tokens dropped",
        "log-probability blocks",
        "masks",
        "steps that wait for a token",
    ):
        assert Traffic.events[event] >= 20, Traffic.events
