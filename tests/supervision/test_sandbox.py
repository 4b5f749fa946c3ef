"""Tests of the process that tries grammars. A grammar that ends it is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.leaks import is_running, process_state, wait_until
from tests.scripts import ROOT
from tpllm.config.engine_config import EngineConfig
from tpllm.structured_outputs import StructuredOutputsParams
from tpllm.supervision import sandbox as sandbox_module
from tpllm.supervision.processes import ClosedError
from tpllm.supervision.sandbox import Sandbox
from tpllm.supervision.start import engine_grammars

CONFIG = EngineConfig.resolve(device="cpu")
GRAMMAR = StructuredOutputsParams(regex="a+")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox(CONFIG)
    yield sandbox
    sandbox.close()


def pid_of(sandbox: Sandbox) -> int:
    child = sandbox._child
    assert child is not None
    return child._processes.processes[0].pid


DEEP = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(900)}
OVERFLOW = {"$ref": "#/$defs/d0", "$defs": {**DEEP, "d900": {"type": "null"}}}


def test_a_crash_refuses_one_grammar_and_is_cached():
    grammars = engine_grammars(CONFIG)
    grammar = StructuredOutputsParams(json=OVERFLOW)
    try:
        with pytest.raises(ValueError, match="json cannot be used: the compiler crashed on it"):
            grammars.compile(grammar)
        assert grammars.compile(GRAMMAR).first_mask
        begin = time.perf_counter()
        with pytest.raises(
            ValueError, match="the compiler crashed on it, or took more than .* MiB or 10 s"
        ):
            grammars.compile(grammar)
        assert time.perf_counter() - begin < 0.1
    finally:
        grammars.close()


def test_one_process_tries_many_grammars_and_is_replaced_when_it_dies(sandbox):
    sandbox.check(GRAMMAR)
    first = pid_of(sandbox)
    sandbox.check(StructuredOutputsParams(choice=["a", "b"]))
    assert pid_of(sandbox) == first
    os.kill(first, signal.SIGKILL)
    sandbox.check(GRAMMAR)  # tried again: the grammar did not cause the end
    assert pid_of(sandbox) != first and not is_running(first)


def test_what_takes_too_long_or_too_much_is_refused(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox_module, "CPU_S", 0)
    slow = StructuredOutputsParams(
        json={"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}
    )
    with pytest.raises(ValueError, match="compiling it took more than 0 s; make it simpler"):
        sandbox.check(slow)
    small = Sandbox(CONFIG)
    monkeypatch.setattr(sandbox_module, "CPU_S", 10)
    monkeypatch.setattr(sandbox_module, "MEMORY_BYTES", 8 << 20)
    try:
        with pytest.raises(ValueError, match="took more than 8 MiB or|too much memory"):
            small.check(slow)
    finally:
        small.close()


def test_a_process_that_does_not_reply_is_killed(sandbox, monkeypatch):
    sandbox.check(GRAMMAR)
    pid = pid_of(sandbox)
    monkeypatch.setattr(sandbox_module, "_MAX_WAITS", 1)
    os.kill(pid, signal.SIGSTOP)
    assert wait_until(lambda: process_state(pid) == "T")
    with pytest.raises(ValueError, match="compiling it took more than 1 s"):
        sandbox.check(StructuredOutputsParams(regex="ab"))
    assert not is_running(pid)
    monkeypatch.undo()
    sandbox.check(GRAMMAR)


DEAD_ENDS: dict[str, dict[str, Any]] = {
    """'{"a":-0,'""": {
        "json": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "patternProperties": {"^a$": {"type": "integer"}},
            "additionalProperties": False,
            "required": ["a"],
        }
    },
    "'a'": {"grammar": 'start: "a" B\nB: /b/ & /c/'},
}


@pytest.mark.parametrize("message", DEAD_ENDS)
def test_a_grammar_that_leads_to_a_dead_end_is_refused_with_its_place(sandbox, message):
    with pytest.raises(ValueError, match=f"nothing that fits can follow {message}"):
        sandbox.check(StructuredOutputsParams(**DEAD_ENDS[message]))


def test_check_raises_after_close(sandbox):
    sandbox.check(GRAMMAR)
    sandbox.close()
    sandbox.close()
    with pytest.raises(ClosedError):
        sandbox.check(GRAMMAR)


def test_a_process_that_cannot_start_is_no_error_of_the_grammar():
    sandbox = Sandbox(CONFIG, module="tests.no_such_module")
    with pytest.raises(RuntimeError, match="ended before it was ready: .*exit code 1"):
        sandbox.check(GRAMMAR)


PROGRAM = """
import json, os, sys
from tpllm.config.engine_config import EngineConfig
from tpllm.supervision.sandbox import Sandbox
from tpllm.structured_outputs import StructuredOutputsParams
sandbox = Sandbox(EngineConfig.resolve(device="cpu"))
sandbox.check(StructuredOutputsParams(regex="a"))
print(sandbox._child._processes.processes[0].pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
def test_it_ends_with_the_program_however_that_ends(number):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert program.stdout is not None and program.stdin is not None
    with program:
        pid = int(program.stdout.readline())
        assert is_running(pid)
        if number is None:
            program.stdin.close()
        else:
            program.send_signal(number)
    assert wait_until(lambda: not is_running(pid), 5)


def test_it_loads_neither_torch_nor_transformers():
    code = "import tpllm.supervision.sandbox_process, sys, json; print(json.dumps([*sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert not {"torch", "transformers"} & set(json.loads(run.stdout))
