"""Engines with real workers, from their start to every kind of end.

That nothing is left behind is checked after each test by a fixture in tests/conftest.py; what the
launcher alone can show is shown with cheaper workers in tests/supervision/test_launcher.py. Engines
are forked (`tests.forked_engines`) but for those whose start is the subject.
"""

import gc
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import psutil
import pytest

from launch import forked_workers
from launch.soak_worker import continuation
from tests.ctrl_c import is_interrupted, press_ctrl_c
from tests.forked_engines import engines_are_started
from tests.leaks import wait_until, worker_pids
from tests.reference import shipped_greedy
from tests.scripts import running
from tpllm import LLM, SamplingParams, WorkerError
from tpllm import llm as llm_module
from tpllm.channel import ring
from tpllm.config.checkpoint import resolve_model
from tpllm.config.engine_config import EngineConfig
from tpllm.engine import block_manager, coordinator, scheduler
from tpllm.offline import calls, fair_lock
from tpllm.supervision import interrupts, launcher, processes
from tpllm.supervision.start import start_engine

pytestmark = pytest.mark.usefixtures("ctrl_c_raises", "forked_engines")

REFERENCES = shipped_greedy()[:3]
PROMPTS = [reference.prompt_ids for reference in REFERENCES]
SHORT = SamplingParams(temperature=0, max_tokens=6)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)  # up to max_model_len: minutes


def make_llm(tensor_parallel_size: int = 2) -> LLM:
    return LLM(device="cpu", tensor_parallel_size=tensor_parallel_size, skip_tokenizer_init=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """An engine that every test leaves as it was."""
    with make_llm() as llm:
        yield llm


def assert_right(llm: LLM) -> None:
    """The engine is at rest, and gives the tokens that transformers gives."""
    assert llm._coordinator.num_unfinished == 0
    outputs = llm.generate(PROMPTS, SHORT, use_tqdm=False)
    for reference, output in zip(REFERENCES, outputs, strict=True):
        assert output.outputs[0].token_ids == reference.output_ids[: SHORT.max_tokens]


@contextmanager
def while_generating(llm: LLM, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` from a thread when the engine has gone on for a few steps."""
    begin = llm.stats().num_steps

    def watch() -> None:
        assert wait_until(lambda: llm.stats().num_steps > begin + 5)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


# ---- Ctrl-C --------------------------------------------------------------------------------------


def test_ctrl_c_in_generate_ends_its_requests_and_leaves_the_engine_usable(llm):
    num_free = llm._coordinator._blocks.num_free
    with while_generating(llm, press_ctrl_c), pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
    assert llm._coordinator.num_unfinished == llm._coordinator.num_in_flight == 0
    assert llm._coordinator._blocks.num_free == num_free
    assert_right(llm)


def test_ctrl_c_at_any_line_of_generate_leaves_the_engine_usable(monkeypatch):
    """With workers that draw tokens without a model: only the caller's process matters here."""
    quick = partial(start_engine, module="launch.soak_worker")
    monkeypatch.setattr(llm_module, "start_engine", quick)
    llm = LLM(device="cpu", num_kv_blocks=64, skip_tokenizer_init=True)
    parts = (
        llm_module,
        calls,
        fair_lock,
        interrupts,
        coordinator,
        scheduler,
        block_manager,
        launcher,
        processes,
        ring,
    )

    def generate() -> None:
        llm.generate(PROMPTS, SHORT, use_tqdm=False)

    with llm:
        line = 1
        while is_interrupted(generate, line, parts):
            assert llm._coordinator.num_in_flight == 0
            # the lines before the first step, and of the thousands after it any number
            line += 1 if line < 100 else 31
        assert line > 1000
        assert llm._coordinator.num_unfinished == 0
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, SHORT, False), strict=True):
            expected = islice(continuation(prompt, 4096), SHORT.max_tokens)
            assert output.outputs[0].token_ids == list(expected)


def test_ctrl_c_while_loading_leaves_nothing(nothing_left):
    others = worker_pids().keys()

    def watch() -> None:
        assert wait_until(lambda: len(worker_pids().keys() - others) == 2)
        press_ctrl_c()

    thread = threading.Thread(target=watch)
    thread.start()
    with engines_are_started(), pytest.raises(KeyboardInterrupt):
        make_llm()
    thread.join()
    nothing_left()  # though the exception, and all it refers to, is still here


def test_an_uncaught_ctrl_c_ends_the_program_and_leaves_nothing():
    code = """
import threading, time
from tpllm import LLM, SamplingParams
llm = LLM(device="cpu", tensor_parallel_size=2, skip_tokenizer_init=True)
def watch():
    while llm.stats().num_steps < 5:
        time.sleep(0.01)
    print("generating", flush=True)
threading.Thread(target=watch).start()
llm.generate([[1, 2, 3]], SamplingParams(temperature=0, ignore_eos=True), use_tqdm=False)
"""
    with running(code) as script:
        script.wait_for("generating")
        script.interrupt()
        assert "KeyboardInterrupt" in script.finish()
        assert script.exit_code == -signal.SIGINT


# ---- ending by one's own will --------------------------------------------------------------------


def test_an_engine_that_nobody_holds_gives_everything_back(nothing_left):
    llm = make_llm()
    assert_right(llm)
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.generate([[]])
    gc.collect()
    gc.disable()  # from here on: no cycle may keep it
    try:
        del llm
        nothing_left()
    finally:
        gc.enable()


def test_closing_ends_a_call_in_another_thread_and_all_later_ones():
    with make_llm(tensor_parallel_size=1) as llm:
        assert_right(llm)
        with while_generating(llm, llm.close), pytest.raises(RuntimeError, match="is closed"):
            llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
        llm.close()
        with pytest.raises(RuntimeError, match="this LLM is closed; make a new one"):
            llm.generate(PROMPTS, SHORT)


def test_a_script_from_standard_input_needs_no_main_guard_and_no_close():
    code = """
from tpllm import LLM, SamplingParams
llm = LLM(device="cpu", tensor_parallel_size=2, skip_tokenizer_init=True)
print(llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4)))
"""
    with running("", from_stdin=True) as script:
        output = script.finish(stdin=code)
        assert script.exit_code == 0, output
    assert "finish_reason='length'" in output


# ---- workers that fail ---------------------------------------------------------------------------


def test_two_engines_at_once_and_the_death_of_one(llm):
    with make_llm(tensor_parallel_size=1) as other:
        assert not {*other.worker_pids} & {*llm.worker_pids}
        thread = threading.Thread(target=assert_right, args=(other,))
        thread.start()
        assert_right(llm)
        thread.join()

        os.kill(other.worker_pids[0], signal.SIGKILL)  # while it is idle
        with pytest.raises(WorkerError, match="worker rank 0 was killed by SIGKILL") as raised:
            assert_right(other)
        assert raised.value.rank == 0
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            other.generate(PROMPTS, SHORT)
    assert_right(llm)


def test_a_worker_killed_while_it_runs_is_named(nothing_left):
    llm = make_llm()
    victim = llm.worker_pids[1]
    with (
        while_generating(llm, lambda: os.kill(victim, signal.SIGKILL)),
        pytest.raises(WorkerError, match=r"^worker rank 1 was killed by SIGKILL in step \d+"),
    ):
        llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
    nothing_left()


def test_a_worker_killed_while_it_loads_is_named(nothing_left):
    def kill_one(rank: int, phase: str) -> None:
        if phase == "loading weights":
            children = psutil.Process().children()
            os.kill(max(children, key=psutil.Process.create_time).pid, signal.SIGKILL)

    config = EngineConfig.resolve(device="cpu", tensor_parallel_size=2, skip_tokenizer_init=True)
    with pytest.raises(WorkerError, match=r"^worker rank . was killed by SIGKILL while "):
        start_engine(config, on_phase=kill_one)
    nothing_left()


def test_a_worker_that_raises_gives_its_traceback(tmp_path):
    """The weights vanish between the check of the headers and the load."""
    folder = shutil.copytree(resolve_model(None), tmp_path / "model")
    config = EngineConfig.resolve(
        str(folder), device="cpu", tensor_parallel_size=2, skip_tokenizer_init=True
    )
    for file in Path(folder).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(WorkerError, match="worker rank . failed while loading weights:") as raised:
        start_engine(config)
    assert raised.value.rank in (0, 1)
    for part in ("Traceback (most recent call last)", "FileNotFoundError", "safetensors"):
        assert part in str(raised.value)


# ---- the end of the coordinator ------------------------------------------------------------------

KILLED = """
import os, signal, threading, time
from tpllm import LLM, SamplingParams
from tpllm.config.engine_config import EngineConfig
from tpllm.engine.coordinator import Coordinator
from tpllm.supervision.start import start_engine

SETTINGS = dict(device={device!r}, tensor_parallel_size={size}, skip_tokenizer_init=True)
moment = {moment!r}

def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)

def watch():
    while llm.stats().num_steps < 5:
        time.sleep(0.01)
    kill_me()

if moment == "idle":
    llm = LLM(**SETTINGS)
    kill_me()
elif moment == "running":
    llm = LLM(**SETTINGS)
    threading.Thread(target=watch).start()
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0, ignore_eos=True), use_tqdm=False)
else:
    config = EngineConfig.resolve(**SETTINGS)
    start_engine(config, on_phase=lambda rank, phase: phase == moment and kill_me())
"""
MOMENTS = ["importing torch", "joining the group", "loading weights", "idle", "running"]


@pytest.mark.parametrize("moment", ["importing torch", "running"])
def test_a_killed_coordinator_takes_everything_along(moment):
    with running(KILLED.format(moment=moment, device="cpu", size=2)) as script:
        assert script.exit_code == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["joining the group", "loading weights", "idle"])
def test_a_killed_coordinator_that_was_forked_takes_everything_along(moment):
    """The same program and workers without the seconds of their start; see `tests.leaks`."""
    code = KILLED.format(moment=moment, device="cpu", size=2)
    program = forked_workers.fork(lambda: exec(code, {"__name__": "__main__"}))
    assert program.wait() == -signal.SIGKILL


@pytest.mark.gpu
@pytest.mark.parametrize("moment", [*MOMENTS, "measuring memory", "capturing graphs"])
def test_a_killed_coordinator_takes_everything_along_on_a_gpu(moment):
    with running(KILLED.format(moment=moment, device="cuda", size=1)) as script:
        assert script.exit_code == -signal.SIGKILL


@pytest.mark.multi_gpu
@pytest.mark.parametrize("moment", [*MOMENTS, "measuring memory", "capturing graphs"])
def test_a_killed_coordinator_takes_everything_along_on_two_gpus(moment):
    with running(KILLED.format(moment=moment, device="cuda", size=2)) as script:
        assert script.exit_code == -signal.SIGKILL
