"""The offline workloads, and the commands that run them; tests/launch measures for real."""

import json
from typing import Any

import pytest

from tpllm.cli import main
from tpllm.cli.bench import workloads


def test_the_seed_workload_is_that_of_the_peers():
    prompts, params = workloads.seed_workload(vocab_size=151_936)
    assert len(prompts) == len(params) == 256
    assert sum(map(len, prompts)) == 142_827
    assert sum(each.max_tokens or 0 for each in params) == 133_966
    assert all(each.temperature == 0.6 and each.ignore_eos for each in params)


@pytest.fixture
def measured(llm, monkeypatch) -> list[tuple[Any, ...]]:
    """Calls of a measurement that takes no time."""
    calls: list[tuple[Any, ...]] = []

    def measure(engine: Any, repeats: int, breakdown: bool) -> dict[str, Any]:
        calls.append((repeats, breakdown))
        return {"ms_per_token": 1.5}

    monkeypatch.setattr(llm, "startup_s", 2.0, raising=False)
    monkeypatch.setitem(workloads.MEASURES, "latency", measure)
    monkeypatch.setattr(workloads, "environment", lambda engine: {"tpllm": "x"})
    return calls


def test_a_workload_prints_a_table_and_one_json_line(llm, measured, capsys):
    words = ["m", "--dtype", "float32", "--repeats", "2", "--breakdown", "--quiet"]
    assert main(["bench", "latency", *words]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert "  ms_per_token            1.5" in table
    settings = {
        "model": "m",
        "dtype": "float32",
        "max_model_len": 4096,
        "skip_tokenizer_init": True,
    }
    assert json.loads(last) == {
        "settings": settings,
        "startup_s": 2.0,
        "tpllm": "x",
        "latency": {"ms_per_token": 1.5},
    }
    assert measured == [(2, True)]
    assert llm.made["settings"] == settings


def test_the_length_is_the_command_s_own_unless_given(llm, measured, monkeypatch):
    monkeypatch.setenv("TPLLM_MAX_MODEL_LEN", "2048")
    assert main(["bench", "latency", "--quiet"]) == 0
    assert llm.made["settings"]["max_model_len"] == 2048


def test_no_timed_run_is_refused(llm, measured, capsys):
    assert main(["bench", "latency", "--repeats", "0"]) == 2
    assert capsys.readouterr().err == "tpllm: error: --repeats 0 must be at least 1\n"
    assert llm.made == {}
