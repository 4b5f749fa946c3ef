"""Runs the shell lines of documents, with stand-ins for what would take long or stay for ever."""

import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tpllm
import tpllm.server
from tests.cli.fake_server import FakeServer, serving
from tests.cli.stand_in import StandIn
from tests.shared_engines import ADDRESS, NOT_HERE
from tpllm.cli import main
from tpllm.cli.bench import workloads
from tpllm.config.checkpoint import SHIPPED_MODEL

ENDS_THE_SERVER = "kill %1"  # the job of a `tpllm serve ... &`, which a stand-in has ended


def run_line(line: str, folder: Path, address: str) -> None:
    """Run one line as typed in `folder`; the server that documents suppose is at `address`.

    `tpllm` runs in this process, its settings read and checked, before a stand-in for the engine or
    the server. Of a pipe, its last command is run. `curl` is the real one, and fails where the
    server refuses a request; without it the test is skipped.

    Raises:
        AssertionError: the command fails, or there is no way to run it.
    """
    if line == ENDS_THE_SERVER:
        return
    command = line.rpartition(" | ")[2].removesuffix(" &")
    words = shlex.split(command, comments=True)
    variables = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if words[0] == "tpllm":
        code = _run_tpllm(words[1:], folder, variables)
    elif words[0] in ("curl", "until"):
        if shutil.which("curl") is None:
            pytest.skip("needs curl")
        script = command.replace(ADDRESS, address).replace("curl ", "curl --fail ")
        code = subprocess.run(["bash", "-c", script], cwd=folder, timeout=60).returncode
    else:
        raise AssertionError(f"{line!r}: tests/docs/shell.py does not know {words[0]!r}")
    assert code == 0, f"{line!r} ends with {code}"


def _run_tpllm(words: list[str], folder: Path, variables: dict[str, str]) -> int:
    with pytest.MonkeyPatch.context() as patch, serving(FakeServer()) as server:
        stand_in: Any = type("LLM", (StandIn,), {"made": {}, "startup_s": 1.0})
        patch.setattr(tpllm, "LLM", stand_in)
        patch.setattr(tpllm.server, "run", lambda model, engine, settings: 0, raising=False)
        for name in workloads.MEASURES:
            patch.setitem(workloads.MEASURES, name, lambda llm, repeats, breakdown: {"x": 1})
        patch.setattr(workloads, "environment", lambda llm: {})
        patch.setattr(sys, "stdin", io.StringIO("a line\n"))
        for name in [name for name in os.environ if name.startswith("TPLLM_")]:
            patch.delenv(name)
        patch.delenv("OPENAI_API_KEY", raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        if words[:2] == ["bench", "serve"]:
            small = ["--num-prompts", "1", "--num-warmups", "1", "--base-url", server.url]
            words = words + small
        # what is not here without a network: the shipped model is
        words = [str(SHIPPED_MODEL) if word == NOT_HERE else word for word in words]
        try:
            return main(words)
        except SystemExit as end:  # a flag that does not exist
            return int(end.code or 0)
