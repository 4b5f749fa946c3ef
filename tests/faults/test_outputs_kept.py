"""Tests that the error of a dead worker holds the outputs so far, and that a new engine starts."""

import os
import signal
import threading
from functools import partial
from itertools import islice

import pytest

from launch import forked_workers
from launch.soak_worker import continuation
from tests.leaks import wait_until
from tpllm import LLM, SamplingParams, WorkerError
from tpllm import llm as llm_module
from tpllm.supervision import processes
from tpllm.supervision.start import start_engine

SHORT = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)  # thousands of steps
PROMPTS = [[i, 7, 9] for i in range(6)]


def make_llm() -> LLM:
    return LLM(device="cpu", num_kv_blocks=2000, skip_tokenizer_init=True)


def test_finished_and_unfinished_outputs_come_with_the_error(monkeypatch, nothing_left):
    monkeypatch.setattr(processes, "_start", forked_workers.start)
    monkeypatch.setattr(
        llm_module, "start_engine", partial(start_engine, module="launch.soak_worker")
    )
    llm = make_llm()

    def kill_worker() -> None:
        assert wait_until(lambda: llm.stats().num_steps > 20)
        os.kill(llm.worker_pids[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_worker)
    thread.start()
    with pytest.raises(WorkerError, match=r"killed by SIGKILL in step \d+") as raised:
        llm.generate(PROMPTS, [SHORT, LONG] * 3, use_tqdm=False)
    thread.join()
    error = raised.value
    assert [output.prompt_token_ids for output in error.outputs] == PROMPTS[::2]
    assert [output.prompt_token_ids for output in error.unfinished] == PROMPTS[1::2]
    for output in error.outputs + error.unfinished:
        tokens = output.outputs[0].token_ids
        assert tokens == list(islice(continuation(output.prompt_token_ids, 4096), len(tokens)))
    assert all(output.finished for output in error.outputs)
    for output in error.unfinished:
        assert len(output.outputs[0].token_ids) > 10
        assert (output.finished, output.outputs[0].finish_reason) == (False, None)
    nothing_left()
    with make_llm() as another:
        assert another.generate(PROMPTS, SHORT, use_tqdm=False)[5].finished
