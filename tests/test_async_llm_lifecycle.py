"""An engine in a process of its own, with workers that need no torch: every way to fail and to end.

That nothing is left behind is checked after each test by a fixture in tests/conftest.py.
"""

import asyncio
import gc
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import psutil
import pytest

from tests.leaks import is_running, wait_until
from tests.scripts import running
from tests.supervision.stub_worker import HANG, READY
from tpllm import SamplingParams, WorkerError
from tpllm.async_llm import AsyncLLM
from tpllm.config.engine_config import EngineConfig
from tpllm.engine.coordinator import MAX_STEPS_IN_FLIGHT
from tpllm.outputs import RequestOutput
from tpllm.supervision import engine_client, messages
from tpllm.supervision.connection import Connection, Message
from tpllm.supervision.engine_client import EngineClient
from tpllm.text.output_processor import OutputProcessor

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)  # 1000 steps of a millisecond
SLOW = {"0": [READY, ["compute", 1e-3]]}
MakeEngine = Callable[..., AsyncLLM]


@pytest.fixture
def make_engine(monkeypatch) -> MakeEngine:
    folders = [str(Path(__file__).parent / "supervision"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
    monkeypatch.setattr(engine_client, "MODULE", "stub_engine")

    def make(acts: dict[str, Any] | None = None, ranks: int = 2, **settings: Any) -> AsyncLLM:
        monkeypatch.setenv("TPLLM_TEST_ACTS", json.dumps(acts or {}))
        return AsyncLLM(
            device="cpu", tensor_parallel_size=ranks, skip_tokenizer_init=True, **settings
        )

    return make


async def outputs_of(
    engine: AsyncLLM, params: SamplingParams = SHORT, prompt: list[int] | None = None
) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt or [1, 2, 3], params)]


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def until(is_so: Callable[[], bool]) -> None:
    assert await asyncio.to_thread(wait_until, is_so)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


# ---- working -------------------------------------------------------------------------------------


def test_an_engine_serves_one_event_loop_after_the_other(make_engine):
    engine = make_engine()
    for _ in range(2):
        outputs = run(outputs_of(engine))
        assert outputs[-1].finished
        assert outputs[-1].outputs[0].token_ids == [103, 104, 105, 106]
    engine.shutdown()
    engine.shutdown()
    assert engine.dead_error is None
    with pytest.raises(RuntimeError, match="this AsyncLLM is closed; make a new one"):
        run(outputs_of(engine))
    with pytest.raises(RuntimeError, match="this AsyncLLM is closed"):
        run(engine.stats())


def test_a_slow_caller_delays_no_other_and_misses_nothing(make_engine):
    async def check() -> None:
        async with make_engine() as engine:
            slow = engine.generate([1, 2, 3], ENDLESS)
            first = await anext(slow)
            others = await asyncio.gather(*(outputs_of(engine) for _ in range(20)))
            assert all(each[-1].outputs[0].token_ids[-1] == 106 for each in others)
            while (await engine.stats()).num_running:
                await asyncio.sleep(0.01)
            rest = [output async for output in slow]
            assert len(rest) < 3
            ids = rest[-1].outputs[0].token_ids
            assert ids == list(range(103, 103 + len(ids))) and len(ids) > 900
            assert first.outputs[0].token_ids == ids[: len(first.outputs[0].token_ids)]

    run(check())


def test_a_caller_slower_than_a_step_leaves_others_their_turn(make_engine):
    async def check() -> None:
        num_turns = 0

        async def others() -> None:
            nonlocal num_turns
            while True:
                await asyncio.sleep(0)
                num_turns += 1

        async with make_engine(SLOW) as engine:
            task = asyncio.create_task(others())
            turns = []
            async for _ in engine.generate([1, 2, 3], ENDLESS):
                time.sleep(0.02)  # news come meanwhile
                turns.append(num_turns)
            task.cancel()
            assert len(set(turns)) == len(turns) > 5

    run(check())


def test_an_engine_without_requests_sleeps(make_engine):
    with_engine = make_engine()
    run(outputs_of(with_engine))
    process = psutil.Process(with_engine.engine_pid)
    before = process.num_ctx_switches()
    threading.Event().wait(0.3)
    assert process.num_ctx_switches().voluntary - before.voluntary < 5
    with_engine.shutdown()


def test_stats_cover_requests_and_ranks(make_engine):
    async def check() -> None:
        async with make_engine(SLOW) as engine:
            task = asyncio.create_task(outputs_of(engine, ENDLESS))
            while not (stats := await engine.stats()).num_running:
                await asyncio.sleep(0.01)
            assert 0 < stats.kv_cache_usage < 1
            assert (stats.num_waiting, stats.num_prompt_tokens) == (0, 3)
            assert [
                (each["rank"], each["pid"], each["phase"], each["alive"]) for each in stats.health
            ] == [(rank, pid, "ready", True) for rank, pid in enumerate(engine.worker_pids)]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while (stats := await engine.stats()).kv_cache_usage:
                await asyncio.sleep(0.01)
            assert stats.num_running == 0
            assert 0 < stats.num_generated_tokens < 900 and stats.wait_s > 0
            bound, num_done = stats.step_buckets[-1]
            assert bound == math.inf and stats.num_generated_tokens <= num_done
            assert stats.num_steps - MAX_STEPS_IN_FLIGHT <= num_done <= stats.num_steps
            assert stats.step_s > 0

    run(check())


# ---- failing -------------------------------------------------------------------------------------


def test_a_worker_killed_while_it_runs_is_named_to_every_caller(make_engine):
    async def check() -> None:
        engine = make_engine(SLOW)
        tasks = [asyncio.create_task(outputs_of(engine, ENDLESS)) for _ in range(3)]
        while not (await engine.stats()).num_running:
            await asyncio.sleep(0.01)
        kill(engine.worker_pids[1])
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, WorkerError) and result is not engine.dead_error
            assert vars(result) == vars(engine.dead_error)
            assert (result.rank, result.cause, result.signal) == (1, "SIGKILL", signal.SIGKILL)
            assert result.report is not None and result.report.exists()
            assert "worker rank 1 was killed by SIGKILL in step" in str(result)
        assert isinstance(engine.dead_error, WorkerError)
        for call in (outputs_of(engine), engine.stats()):
            with pytest.raises(WorkerError, match="worker rank 1 was killed"):
                await call
        await engine.abort("0")
        await engine.close()

    run(check())


def test_outputs_before_an_error_are_yielded_before_it(make_engine, monkeypatch):
    """Also where both come in one piece."""
    receive = Connection.receive
    reported: list[int] = []

    def receive_all(connection: Connection, timeout_s: float) -> list[Message]:
        received = receive(connection, timeout_s)
        while received and received[-1]["type"] == "updates":
            received += receive(connection, timeout_s)
        for message in received[:-1]:
            for update in messages.read_updates(message):
                reported.extend(update.new_token_ids)
        return received

    async def check() -> None:
        engine = make_engine(SLOW)
        await engine.stats()
        monkeypatch.setattr(Connection, "receive", receive_all)
        stream = engine.generate([1, 2, 3], ENDLESS)
        threading.Timer(0.3, kill, [engine.worker_pids[1]]).start()
        token_ids: list[int] = []
        with pytest.raises(WorkerError, match="worker rank 1 was killed"):
            async for output in stream:
                token_ids = output.outputs[0].token_ids
        assert reported and token_ids[-len(reported) :] == reported

    run(check())


@pytest.mark.parametrize("busy", [False, True])
def test_a_stopped_engine_process_is_reported_and_ended(make_engine, monkeypatch, busy):
    monkeypatch.setattr(engine_client, "_PING_AFTER_S", 0.2)

    async def check() -> None:
        engine = make_engine(SLOW, step_timeout_s=0.5)
        stream = engine.generate([1, 2, 3], ENDLESS)
        await anext(stream)
        if not busy:
            await stream.aclose()
        await asyncio.sleep(0.7)  # asked, and answers
        assert engine.dead_error is None
        os.kill(engine.engine_pid, signal.SIGSTOP)
        await until(lambda: engine.dead_error is not None)
        with pytest.raises(WorkerError, match="the engine's process is stopped, as by SIGSTOP"):
            _ = [output async for output in (stream if busy else engine.generate([1]))]
        await until(lambda: not any(map(is_running, engine.worker_pids)))

    run(check())


def test_a_stop_is_measured_from_its_beginning(monkeypatch):
    """A start may be silent for long: a short stop in the middle is no reason to end it."""
    monkeypatch.setattr(engine_client, "_PING_AFTER_S", 1.0)
    stops = iter(100 * [False] + 3 * [True] + [False] + 4 * [True] + 9 * [False])
    client = object.__new__(EngineClient)
    client._config = EngineConfig.resolve(device="cpu", step_timeout_s=3, start_timeout_s=5)
    client._connection, client._process, client._processes = Mock(), Mock(), MagicMock()
    client._process.is_stopped.side_effect = stops
    client._connection.receive.return_value = []
    client._silent_s = client._stopped_s = 0.0
    client.worker_pids = []
    for _ in range(107):
        assert client._receive_or_ping() == []
    with pytest.raises(WorkerError, match="is stopped, as by SIGSTOP; it was killed after 3 s"):
        client._receive_or_ping()
    client.worker_pids = [1]
    client._silent_s = client._stopped_s = 0.0
    for _ in range(8):
        assert client._receive_or_ping() == []
    with pytest.raises(WorkerError, match="does not answer; it was killed after 8 s"):
        client._receive_or_ping()
    client._connection.send.assert_called_once_with({"type": "alive"})


def test_a_bug_ends_the_engine_and_is_reported(make_engine, monkeypatch):
    def fail(*args: object) -> None:
        raise RuntimeError("a mistake")

    async def check() -> None:
        engine = make_engine(SLOW)
        monkeypatch.setattr(OutputProcessor, "process", fail)
        with pytest.raises(RuntimeError, match="^a mistake$"):
            await outputs_of(engine)
        assert str(engine.dead_error) == "a mistake"
        with pytest.raises(RuntimeError, match="^a mistake$"):
            await outputs_of(engine)

    run(check())


def test_a_worker_killed_while_nothing_runs_is_noticed(make_engine):
    engine = make_engine()
    kill(engine.worker_pids[0])
    assert wait_until(lambda: engine.dead_error is not None)
    with pytest.raises(WorkerError, match="worker rank 0 was killed by SIGKILL while idle"):
        run(outputs_of(engine))


@pytest.mark.parametrize("params", [None, ENDLESS], ids=["idle", "running"])
def test_the_end_of_the_engine_process_is_reported_and_ends_the_workers(make_engine, params):
    async def check() -> None:
        engine = make_engine(SLOW)
        stream = engine.generate([1, 2, 3], params or SHORT)
        await anext(stream)
        if params is None:
            await stream.aclose()
        kill(engine.engine_pid)
        await until(lambda: engine.dead_error is not None)
        with pytest.raises(WorkerError, match="the engine's process was killed by SIGKILL"):
            _ = [output async for output in (engine.generate([1]) if params is None else stream)]
        await until(lambda: not any(map(is_running, engine.worker_pids)))

    run(check())


@pytest.mark.parametrize(
    "acts, error, message",
    [
        (
            {"1": [["raise", "disk on fire"]]},
            WorkerError,
            "(?s)rank 1 failed .*disk on fire\nA crash report is in ",
        ),
        ({"0": [["exit", 3]]}, WorkerError, "rank 0 ended with exit code 3 while starting"),
        ({"0": [["refuse", "lower max_num_seqs=9"]]}, ValueError, "^lower max_num_seqs=9$"),
    ],
)
def test_a_failed_start_is_an_error_of_the_constructor(make_engine, acts, error, message):
    with pytest.raises(error, match=message):
        make_engine(acts)


def test_an_engine_process_killed_while_it_starts_is_reported(make_engine):
    children = psutil.Process().children

    def kill_it() -> None:
        before = {child.pid for child in known}
        assert wait_until(lambda: any(child.pid not in before for child in children()))
        kill(next(child.pid for child in children() if child.pid not in before))

    known = children()
    thread = threading.Thread(target=kill_it)
    thread.start()
    with pytest.raises(WorkerError, match="the engine's process was killed by SIGKILL"):
        make_engine({"0": [HANG]})
    thread.join()


# ---- ending --------------------------------------------------------------------------------------


def test_closing_ends_open_streams(make_engine):
    async def check() -> None:
        engine = make_engine(SLOW)
        task = asyncio.create_task(outputs_of(engine, ENDLESS))
        while not (await engine.stats()).num_running:
            await asyncio.sleep(0.01)
        await engine.close()
        with pytest.raises(RuntimeError, match="this AsyncLLM is closed"):
            await task
        assert engine.dead_error is None

    run(check())


def test_an_engine_that_nobody_holds_is_gone(make_engine, nothing_left):
    engine = make_engine()
    run(outputs_of(engine))
    gc.collect()
    gc.disable()  # from here on: no cycle may keep it
    try:
        del engine
        nothing_left()
    finally:
        gc.enable()


PROGRAM = """
import asyncio, os, signal
from tpllm import AsyncLLM, SamplingParams
from tpllm.config.engine_config import EngineConfig
from tpllm.supervision import engine_client
from tpllm.supervision.connection import Connection, Message
engine_client.MODULE = "stub_engine"
engine = AsyncLLM(device="cpu", tensor_parallel_size=2, skip_tokenizer_init=True)

async def stream():
    async for output in engine.generate([1], SamplingParams(max_tokens=None, ignore_eos=True)):
        {running}

{ending}
"""


@pytest.mark.parametrize(
    "running_, ending",
    [
        ("pass", "os.kill(os.getpid(), signal.SIGKILL)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "asyncio.run(stream())"),
        ("raise OSError", "asyncio.run(stream())"),
        ("pass", ""),
    ],
    ids=["killed idle", "killed running", "an error", "no close"],
)
@pytest.mark.usefixtures("make_engine")
def test_the_end_of_the_program_takes_everything_along(running_, ending):
    with running(PROGRAM.format(running=running_, ending=ending)) as script:
        output = script.finish()
        expected = -signal.SIGKILL if "SIGKILL" in running_ + ending else bool(ending)
        assert script.exit_code == expected, output


REAPING = """
import asyncio, os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
from tpllm import AsyncLLM, SamplingParams, WorkerError
from tpllm.supervision import engine_client
engine_client.MODULE = "stub_engine"

async def one():
    async for output in engine.generate([1], SamplingParams(max_tokens=1)):
        pass

for kind in ("worker", "engine"):
    engine = AsyncLLM(device="cpu", skip_tokenizer_init=True)
    os.kill(engine.engine_pid if kind == "engine" else engine.worker_pids[0], signal.SIGKILL)
    try:
        while True:
            asyncio.run(one())
    except WorkerError as error:
        print(error)
"""


@pytest.mark.usefixtures("make_engine")
def test_in_a_program_that_ignores_its_children_only_the_engine_s_own_end_is_unknown():
    with running(REAPING) as script:
        output = script.finish()
    assert "worker rank 0 was killed by SIGKILL" in output, output
    assert "the engine's process ended (exit status unknown); this program" in output
    assert "exit code" not in output
