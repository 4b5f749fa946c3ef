"""docs/cli.md: every command in it runs, with stand-ins for engine and server."""

import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tpllm.server
from tests.cli.fake_server import FakeServer, serving
from tpllm.checkpoint import SHIPPED_MODEL
from tpllm.cli import main
from tpllm.cli.bench import workloads
from tpllm.cli.sources import collect
from tpllm.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
[YAML] = [block for kind, block in BLOCKS if kind == "yaml"]


def test_the_page_has_every_command():
    for command in (
        "generate",
        "chat",
        "serve",
        "bench seed",
        "bench latency",
        "bench serve",
        "info",
    ):
        assert any(f"tpllm {command}" in line for line in LINES), command


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    with serving(FakeServer()) as fake:
        yield fake


@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_page_runs(line, llm, fake_server, monkeypatch, tmp_path, capsys: Any):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engine.yaml").write_text(YAML)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a line\n"))
    for name in workloads.MEASURES:
        monkeypatch.setitem(workloads.MEASURES, name, lambda llm, repeats, breakdown: {"x": 1})
    monkeypatch.setattr(workloads, "environment", lambda llm: {})
    monkeypatch.setattr(llm, "startup_s", 1.0, raising=False)
    monkeypatch.setattr(tpllm.server, "run", lambda model, engine, server: 0, raising=False)
    words = shlex.split(line.rpartition(" | ")[2])
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    assert words.pop(0) == "tpllm"
    if words[:2] == ["bench", "serve"]:
        small = ["--num-prompts", "1", "--num-warmups", "1", "--base-url", fake_server.url]
        words += small
    # what is not here without a network: the shipped model is
    words = [str(SHIPPED_MODEL) if word == "Qwen/Qwen3-8B" else word for word in words]
    code = main(words)
    assert code == 0, capsys.readouterr().err


def test_the_file_of_the_page_is_one(tmp_path):
    path = tmp_path / "engine.yaml"
    path.write_text(YAML)
    assert collect(Settings, {}, str(path), {}).values == {
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
    }
