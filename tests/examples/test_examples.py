"""Every script of examples/ runs as a user would run it, and shows what it is about."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.scripts import ROOT
from tests.shared_engines import SharedEngines, shared_engines

pytestmark = pytest.mark.usefixtures("forked_engines")

EXAMPLES = ROOT / "examples"
PSALM = " I shall not want.\n2"


@pytest.fixture(scope="module")
def engines() -> Iterator[SharedEngines]:
    with shared_engines() as engines:
        yield engines


@pytest.fixture
def run(
    engines: SharedEngines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    def run_example(name: str, *arguments: str) -> str:
        """What the script prints."""
        path = str(EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        with engines.lent():
            runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_every_example_has_a_test() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert names and names <= tested


def test_basic(run: Any) -> None:
    shown = run("basic.py")
    assert f"shepherd;' -> {PSALM + ' He maketh'!r}" in shown.partition("--- sampled")[0]
    assert shown.count(" -> ") == 6
    # and by itself, with an engine of its own, on the CPU as here
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, EXAMPLES / "basic.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == shown


def test_chat(run: Any) -> None:
    first, second = run("chat.py").split("---\n")[1:]
    assert first.splitlines()[1::2] == ["assistant: 392", "assistant: 50"]
    assert second.splitlines()[-1].startswith("assistant: ")


def test_streaming(run: Any) -> None:
    shown = run("streaming.py")
    alone, together, counts = shown.split("---")
    assert alone.startswith(f"Psalms 23\n1 The LORD is my shepherd;{PSALM}")
    assert together.strip().startswith(alone.strip())
    texts, pieces = map(int, re.findall(r"\d+", counts))
    assert texts == 2 and pieces > 10


def test_prefix_caching(run: Any) -> None:
    counts = [
        tuple(map(int, each))
        for each in re.findall(r"(\d+) of (\d+) tokens", run("prefix_caching.py"))
    ]
    first, again, emptied = counts[:3], counts[3:6], counts[6:]
    assert first[0][0] == 0 and all(cached >= 384 for cached, _ in first[1:])
    assert all(total - cached <= 16 for cached, total in again)
    assert emptied == first


def test_beam_search(run: Any) -> None:
    groups = run("beam_search.py").split("--- ")[1:]
    for group in groups:
        scores = [float(line.split()[0]) for line in group.splitlines()[1:]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert repr(PSALM + " He maketh") in groups[0].splitlines()[1]


def test_log_probabilities(run: Any) -> None:
    shown = run("log_probabilities.py")
    assert shown.count(", out of\n") == 4 and shown.count("    1. ") == 4
    known, unknown = map(float, re.findall(r"perplexity ([\d.]+)", shown))
    assert known < unknown


def test_structured_output(run: Any) -> None:
    shown = dict(line.split(": ", 1) for line in run("structured_output.py").splitlines())
    assert shown["choice"] in ("yes", "no")
    assert shown["regex"] == "392"
    assert re.fullmatch(r'\{"sum":\d{1,3}\}', shown["json"])
    assert re.fullmatch(r"\d{1,3} \+ \d{1,3}", shown["grammar"])


def test_async_requests(run: Any) -> None:
    psalm, genesis, novel, end = run("async_requests.py").splitlines()
    assert psalm.startswith(f"psalm (length): {PSALM!r}"[:-1])
    assert genesis.startswith("genesis (length): ' the heaven")
    assert novel.startswith("novel (abort): '")
    assert end == "0 requests run, 0 wait"


def test_openai_client(run: Any, engines: SharedEngines) -> None:
    shown = run("openai_client.py", f"http://{engines.address}/v1")
    assert f"completion: {PSALM + ' He maketh'!r}" in shown
    assert "chat: 392\n" in shown
    assert re.search(r"streamed: 469.*473 \(\d+ tokens\)\n", shown)
    assert re.search(r"JSON: \{'sum': \d{1,3}\}\n", shown)
    assert shown.count("sampled: ") == 2
