"""`tpllm serve`: up to the server, for which a stand-in runs, and once to its very end."""

import json
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

import tpllm.server
from tests.scripts import ROOT
from tpllm.cli import main
from tpllm.server import ServerSettings


class Serving:
    """Takes the place of `tpllm.server.run`, and notes what it is called with."""

    def __init__(self) -> None:
        self.called: list[Any] = []
        self.error: Exception | None = None

    def __call__(self, model: str | None, engine: dict[str, Any], server: ServerSettings) -> int:
        engine["on_phase"](0, "loading weights")
        self.called = [model, {k: v for k, v in engine.items() if k != "on_phase"}, server]
        if self.error is not None:
            raise self.error
        return 7


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Serving:
    stand_in = Serving()
    monkeypatch.setattr(tpllm.server, "run", stand_in, raising=False)
    return stand_in


def test_the_server_gets_the_engine_s_settings_and_its_own(serving, tmp_path, monkeypatch):
    file = tmp_path / "server.yaml"
    file.write_text("port: 1\nmax_queue: 5\ncors_origins: ['https://a.org']\nmodel: other\n")
    monkeypatch.setenv("TPLLM_PORT", "2")
    monkeypatch.setenv("TPLLM_SERVED_MODEL_NAME", "a,b")
    words = ["folder", "--tensor-parallel-size", "2", "--config", str(file), "--no-page"]
    assert main(["serve", *words]) == 7
    model, engine, server = serving.called
    assert model == "folder"
    assert engine == {"tensor_parallel_size": 2}
    assert server == ServerSettings(
        port=2,
        max_queue=5,
        cors_origins=["https://a.org"],
        served_model_name=["a", "b"],
        page=False,
    )


@pytest.mark.parametrize("name", ["served_model_name", "cors_origins"])
def test_lists_of_texts_are_the_same_from_every_source(serving, tmp_path, monkeypatch, name):
    first, second = "https://a.org", "https://b.org"
    flag = "--" + name.replace("_", "-")
    file = tmp_path / "server.yaml"
    for words, variable, text in (
        ([flag, f"{first},{second}"], None, ""),
        ([flag, first, flag, second], None, ""),
        ([], f"{first},{second}", ""),
        ([], None, f"{name}: '{first},{second}'"),
        ([], None, f"{name}: ['{first}', '{second}']"),
    ):
        file.write_text(text or "{}")
        with monkeypatch.context() as patch:
            if variable is not None:
                patch.setenv(f"TPLLM_{name.upper()}", variable)
            assert main(["serve", "--config", str(file), *words]) == 7
        assert getattr(serving.called[2], name) == (first, second)


def test_without_a_model_the_shipped_one_is_served_and_its_start_is_told(serving, capsys):
    assert main(["serve"]) == 7
    assert serving.called == [None, {}, ServerSettings()]
    assert capsys.readouterr().err.splitlines()[1].endswith("loading weights")


def test_a_wrong_setting_of_either_is_refused_before_anything_starts(serving, capsys, monkeypatch):
    monkeypatch.setenv("TPLLM_PORT", "70000")
    assert main(["serve"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("tpllm: error: port=70000 must be at most 65535 ")
    assert err.endswith("(port is from TPLLM_PORT)\n")
    assert main(["serve", "--port", "1", "--max-num-seqs", "0"]) == 2
    assert "(max_num_seqs is from --max-num-seqs)" in capsys.readouterr().err
    assert serving.called == []


def test_a_setting_that_the_start_refuses_is_named_with_its_source(serving, capsys):
    serving.error = ValueError("port=5 is taken")
    assert main(["serve", "--port", "5", "--quiet"]) == 2
    assert capsys.readouterr().err == "tpllm: error: port=5 is taken (port is from --port)\n"


def test_a_key_is_never_shown(serving, capsys):
    assert main(["serve", "--api-key", "not visible"]) == 2
    assert "not visible" not in capsys.readouterr().err


def test_without_the_packages_of_the_extra_it_says_which_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("tpllm.server.")]:
        if name != "tpllm.server.settings":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(vars(tpllm.server), "run", raising=False)
    assert main(["serve"]) == 2
    assert "run pip install 'tpllm[server]'" in capsys.readouterr().err


def test_a_real_server_bears_the_load_of_the_bench_and_ends_at_a_signal(capsys):
    """From the command line to the first token and back: nothing here stands in for another."""
    words = ["--device", "cpu", "--port", "0", "--max-num-seqs", "4", "--num-kv-blocks", "64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tpllm", "serve", *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr is not None
    try:
        told = ""
        while (found := re.search(r"http://\S+:\d+(?= serves )", told)) is None:
            line = process.stderr.readline()
            assert line, f"the server ended: {told}"
            told += line
        assert "loading weights" in told
        load = "--num-prompts 3 --num-warmups 1 --input-len 8 --output-len 4 --endpoint chat"
        assert main(["bench", "serve", "--base-url", found[0], *load.split()]) == 0
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, rest
    [run] = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert (run["completed"], run["output_tokens"]) == (3, 12)
    assert run["input_tokens"] > 3 * 8  # the chat template has words of its own
    assert run["ttft_ms"]["p50"] > 0
