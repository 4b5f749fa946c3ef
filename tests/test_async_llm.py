"""AsyncLLM on the shipped model: what it gives is what LLM gives, in the form asked for."""

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from tests.reference import shipped_greedy
from tpllm import AsyncLLM, RequestOutputKind, SamplingParams
from tpllm.outputs import RequestOutput

REFERENCES = shipped_greedy()
PSALM = "Psalms 23\n1 The LORD is my shepherd;"
GREEDY = SamplingParams(temperature=0, max_tokens=6)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)
DELTA = RequestOutputKind.DELTA


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncLLM]:
    engine = AsyncLLM(device="cpu", max_num_seqs=16, num_kv_blocks=300)
    yield engine
    engine.shutdown()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 120))


async def outputs_of(engine: AsyncLLM, prompt: Any, params: Any = GREEDY) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params)]


async def until_idle(engine: AsyncLLM) -> None:
    while (stats := await engine.stats()).num_running + stats.num_waiting:
        await asyncio.sleep(0.01)


def test_many_requests_at_once_get_the_tokens_of_transformers(engine):
    async def stream(i: int) -> None:
        reference = REFERENCES[i % len(REFERENCES)]
        params = SamplingParams(temperature=0, max_tokens=4 + i % 5, output_kind=DELTA)
        outputs = await outputs_of(engine, reference.prompt_ids, params)
        token_ids = [id_ for output in outputs for id_ in output.outputs[0].token_ids]
        assert token_ids == reference.output_ids[: 4 + i % 5]
        text = "".join(output.outputs[0].text for output in outputs)
        assert text == engine.get_tokenizer().decode(token_ids)
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]

    async def check() -> None:
        await asyncio.gather(*(stream(i) for i in range(48)))

    run(check())


def test_every_form_of_a_prompt_gives_the_same(engine):
    ids = engine.get_tokenizer().encode_batch([PSALM])[0]
    for prompt in (PSALM, ids, {"prompt": PSALM}, {"prompt_token_ids": ids}):
        last = run(outputs_of(engine, prompt))[-1]
        assert last.outputs[0].text == " I shall not want.\n2"
        assert last.prompt_token_ids == ids
    long = run(outputs_of(engine, PSALM * 200, SamplingParams(max_tokens=1)))[-1]
    assert long.prompt == PSALM * 200  # encoded off the event loop


def test_a_stop_string_ends_a_stream(engine):
    params = SamplingParams(temperature=0, max_tokens=100, stop=["t want"], output_kind=DELTA)
    outputs = run(outputs_of(engine, PSALM, params))
    assert "".join(output.outputs[0].text for output in outputs) == " I shall no"
    assert outputs[-1].outputs[0].stop_reason == "t want"
    run(until_idle(engine))


def test_continuations_with_seeds_are_repeated_and_the_first_is_that_of_one_alone(engine):
    def texts(n: int) -> list[str]:
        params = SamplingParams(n=n, seed=3, max_tokens=8)
        return [each.text for each in run(outputs_of(engine, PSALM, params))[-1].outputs]

    three = texts(3)
    assert len(set(three)) == 3
    assert texts(3) == three
    assert texts(1) == three[:1]


def test_log_probabilities_are_streamed(engine):
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1)
    last = run(outputs_of(engine, PSALM, params))[-1]
    completion = last.outputs[0]
    assert len(completion.logprobs) == 3
    for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
        assert next(iter(position)) == token_id and len(position) == 2
        assert position[token_id].rank == 1
        assert position[token_id].decoded_token == engine.get_tokenizer().decode([token_id])
    sum_of_own = sum(next(iter(each.values())).logprob for each in completion.logprobs)
    assert completion.cumulative_logprob == pytest.approx(sum_of_own)
    assert last.prompt_logprobs[0] is None
    assert len(last.prompt_logprobs) == len(last.prompt_token_ids)


def test_an_abort_ends_a_stream_with_its_tokens_so_far(engine):
    async def check() -> None:
        stream = engine.generate(PSALM, ENDLESS, request_id="mine")
        first = await anext(stream)
        assert first.request_id == "mine"
        with pytest.raises(ValueError, match="request_id='mine' is still running"):
            await anext(engine.generate(PSALM, GREEDY, request_id="mine"))
        await engine.abort("unknown")
        await engine.abort("mine")
        outputs = [output async for output in stream]
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        assert outputs[-1].outputs[0].text.startswith(first.outputs[0].text)
        await until_idle(engine)

    run(check())


@pytest.mark.parametrize("ending", ["closed", "cancelled"])
def test_a_stream_that_nobody_reads_on_is_aborted(engine, ending):
    async def check() -> None:
        if ending == "closed":
            stream = engine.generate(PSALM, ENDLESS)
            await anext(stream)
            await stream.aclose()
        else:
            task = asyncio.create_task(outputs_of(engine, PSALM, ENDLESS))
            while not (await engine.stats()).num_running:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until_idle(engine)

    run(check())


@pytest.mark.parametrize(
    "prompt, params, message",
    [
        ([], GREEDY, "^the prompt is empty"),
        ([4096], GREEDY, "^the prompt holds token id 4096, outside the vocabulary"),
        ([1] * 5000, GREEDY, "has 5000 tokens, which leaves no room"),
        (None, GREEDY, "give a string, a list of token ids"),
        ("hi", "greedy", "sampling_params='greedy' must be SamplingParams"),
        ("hi", SamplingParams(stop_token_ids=[5000]), "stop_token_ids holds 5000"),
    ],
)
def test_what_cannot_run_is_refused_at_the_first_iteration(engine, prompt, params, message):
    with pytest.raises(ValueError, match=message):
        run(outputs_of(engine, prompt, params))
    run(until_idle(engine))


def test_the_limit_is_what_the_cache_holds_where_that_is_less():
    async def check() -> None:
        async with AsyncLLM(device="cpu", num_kv_blocks=8, kv_block_size=16) as engine:
            assert engine.config.max_model_len == 7 * 16
            assert (await outputs_of(engine, [1] * 111))[-1].finished
            with pytest.raises(ValueError, match="the prompt has 112 tokens"):
                await outputs_of(engine, [1] * 112)

    run(check())


def test_without_sampling_parameters_the_checkpoint_s_are_taken(engine):
    assert engine.get_default_sampling_params() == SamplingParams(temperature=0, max_tokens=128)
    last = run(outputs_of(engine, PSALM, None))[-1]
    assert len(last.outputs[0].token_ids) == 128 or last.outputs[0].finish_reason == "stop"
