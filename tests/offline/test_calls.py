"""Concurrent calls of one LLM: streams that change threads, and threads that share an engine.

The workers make tokens without a model (`launch.soak_worker`): the tests concern only the caller's
process.
"""

import gc
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import pytest

from launch.soak_worker import continuation
from tests.ctrl_c import press_ctrl_c
from tests.leaks import wait_until
from tpllm import LLM, RequestOutputKind, SamplingParams, WorkerError
from tpllm import llm as llm_module
from tpllm.supervision.start import start_engine

pytestmark = pytest.mark.usefixtures("ctrl_c_raises", "forked_engines")

NUM_TOKENS = 8
PROMPTS = [[i + 1, 2, 3] for i in range(12)]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
DELTAS = SamplingParams(
    temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, output_kind=RequestOutputKind.DELTA
)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)


@contextmanager
def made_llm() -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        quick = partial(start_engine, module="launch.soak_worker")
        patch.setattr(llm_module, "start_engine", quick)
        made = LLM(device="cpu", num_kv_blocks=300, max_num_seqs=16, skip_tokenizer_init=True)
    with made:
        yield made


@pytest.fixture(scope="module")
def llm(forked_engines: None) -> Iterator[LLM]:
    with made_llm() as llm:
        yield llm


@pytest.fixture(autouse=True)
def quiet_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check that a test leaves nothing in the engine."""
    yield
    if "llm" in request.fixturenames:
        coordinator = request.getfixturevalue("llm")._coordinator
        assert coordinator.num_unfinished == coordinator.num_in_flight == 0


def expected(prompt: list[int]) -> list[int]:
    return list(islice(continuation(prompt, 4096), NUM_TOKENS))


def ids_of(outputs: list[Any]) -> list[int]:
    return [id_ for output in outputs for id_ in output.outputs[0].token_ids]


def generate(llm: LLM, prompt: list[int]) -> list[int]:
    return ids_of(llm.generate(prompt, GREEDY, use_tqdm=False))


def test_a_stream_continues_in_another_thread_while_its_first_thread_calls(llm):
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        stream = llm.generate_stream(PROMPTS[0], DELTAS)
        first = one.submit(next, stream).result()
        other = one.submit(generate, llm, PROMPTS[1])
        rest = two.submit(lambda: ids_of(list(stream))).result(30)
        assert ids_of([first]) + rest == expected(PROMPTS[0])
        assert other.result(30) == expected(PROMPTS[1])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_more_streams_than_threads_never_wait_for_each_other(llm, num_threads):
    streams = {i: llm.generate_stream(prompt, DELTAS) for i, prompt in enumerate(PROMPTS)}
    got: dict[int, list[Any]] = {i: [] for i in streams}
    with ThreadPoolExecutor(num_threads) as pool:
        running = dict(streams)
        while running:
            futures = {i: pool.submit(next, stream, None) for i, stream in running.items()}
            for i, future in futures.items():
                if (output := future.result(30)) is None:
                    del running[i]
                else:
                    got[i].append(output)
    assert [ids_of(got[i]) for i in streams] == [expected(prompt) for prompt in PROMPTS]


def test_calls_inside_the_loop_over_a_stream_run_beside_it(llm):
    stream = llm.generate_stream(PROMPTS[0], DELTAS)
    got = []
    for i, output in enumerate(stream):
        got += ids_of([output])
        assert generate(llm, PROMPTS[i]) == expected(PROMPTS[i])
        llm.reset_prefix_cache()
    assert got == expected(PROMPTS[0])


def test_a_stream_that_others_have_finished_yields_what_came(llm):
    stream = llm.generate_stream(PROMPTS[0], DELTAS)
    first = next(stream)
    for prompt in PROMPTS[1:4]:
        generate(llm, prompt)
    steps = llm.stats().num_steps
    [rest] = list(stream)
    assert rest.finished and llm.stats().num_steps == steps
    assert ids_of([first, rest]) == expected(PROMPTS[0])


def test_threads_that_do_everything_at_once_get_what_a_quiet_engine_gives(llm):
    def work(number: int) -> None:
        choice = random.Random(number)
        for _ in range(12):
            prompt = choice.choice(PROMPTS)
            act = choice.randrange(4)
            if act == 0:
                assert generate(llm, prompt) == expected(prompt)
            elif act == 1:
                assert ids_of(list(llm.generate_stream(prompt, DELTAS))) == expected(prompt)
            elif act == 2:
                stream = llm.generate_stream(prompt, ENDLESS)
                next(stream)
                stream.close()
            else:
                outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
                assert [ids_of([o]) for o in outputs] == [expected(p) for p in PROMPTS]

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(work, i) for i in range(6)]:
            future.result(60)


# ---- ends ----------------------------------------------------------------------------------------


@contextmanager
def in_step(llm: LLM, act: Callable[[], object]) -> Iterator[None]:
    """Call `act` in the middle of the next step."""
    step = llm._coordinator.step
    acts = [act]

    def acting_step() -> Any:
        if acts:
            acts.pop()()
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._coordinator, "step", acting_step)
        yield
    assert not acts


def test_a_stream_that_is_collected_in_the_middle_of_a_step_ends(llm):
    streams = [llm.generate_stream(PROMPTS[0], ENDLESS)]
    next(streams[0])

    def collect() -> None:
        streams.clear()
        gc.collect()

    with in_step(llm, collect):
        assert generate(llm, PROMPTS[1]) == expected(PROMPTS[1])


def test_a_stream_closed_in_another_thread_during_a_call_ends(llm):
    stream = llm.generate_stream(PROMPTS[0], ENDLESS)
    next(stream)

    def close() -> None:
        thread = threading.Thread(target=stream.close)
        thread.start()
        thread.join(30)  # it does not wait for the step
        assert not thread.is_alive()

    with in_step(llm, close):
        assert generate(llm, PROMPTS[1]) == expected(PROMPTS[1])


def test_ctrl_c_ends_the_requests_of_the_call_that_it_meets(llm):
    stream = llm.generate_stream(PROMPTS[0], DELTAS)
    got = ids_of([next(stream)])
    with ThreadPoolExecutor(1) as pool:
        with in_step(llm, press_ctrl_c), pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS[1:4], ENDLESS, use_tqdm=False)
        assert llm._coordinator.num_unfinished == 1
        got += pool.submit(lambda: ids_of(list(stream))).result(30)
    assert got == expected(PROMPTS[0])


def test_a_request_that_is_refused_leaves_the_others_running(llm):
    stream = llm.generate_stream(PROMPTS[0], DELTAS)
    got = ids_of([next(stream)])
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        llm.generate([PROMPTS[1], []], GREEDY, use_tqdm=False)
    assert got + ids_of(list(stream)) == expected(PROMPTS[0])


def test_a_worker_that_dies_is_reported_to_every_call_with_its_own_outputs():
    with made_llm() as llm, ThreadPoolExecutor(1) as pool:
        stream = llm.generate_stream(PROMPTS[0], ENDLESS)
        next(stream)
        params = [GREEDY, ENDLESS]
        call = pool.submit(llm.generate, PROMPTS[1:3], params, use_tqdm=False)
        assert wait_until(lambda: llm.stats().num_steps > 3 * NUM_TOKENS)
        os.kill(llm.worker_pids[0], signal.SIGKILL)
        with pytest.raises(WorkerError, match="rank 0 was killed by SIGKILL") as raised:
            call.result(30)
        assert [ids_of([each]) for each in raised.value.outputs] == [expected(PROMPTS[1])]
        assert len(raised.value.unfinished) == 1
        with pytest.raises(WorkerError, match="rank 0 was killed by SIGKILL") as raised:
            list(stream)
        assert raised.value.outputs == raised.value.unfinished == []
        with pytest.raises(RuntimeError, match="this LLM is closed; make a new one"):
            generate(llm, PROMPTS[0])


def test_closing_ends_open_streams():
    with made_llm() as llm:
        stream = llm.generate_stream(PROMPTS[0], ENDLESS)
        next(stream)
        llm.close()
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            list(stream)
