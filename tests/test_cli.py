"""The command line up to the engine, for which a stand-in answers here."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import tpllm
from tpllm.cli import main


class StandIn:
    """Notes what it is asked; its answer is the name of the method and the prompt."""

    made: dict[str, Any] = {}  # noqa: RUF012
    has_chat_template = True
    error: BaseException | None = None

    def __init__(self, **settings: Any) -> None:
        type(self).made = settings

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *error: object) -> None:
        type(self).made["closed"] = True

    def get_tokenizer(self) -> "StandIn":
        return self

    def generate(self, prompts: list[str], params: Any, use_tqdm: bool) -> list[Any]:
        return self.answer(f"generate {prompts[0]}", params)

    def chat(self, messages: list[dict[str, str]], params: Any, use_tqdm: bool) -> list[Any]:
        return self.answer(f"chat {messages[0]['content']}", params)

    def answer(self, text: str, params: Any) -> list[Any]:
        if self.error is not None:
            raise self.error
        type(self).made["params"] = params
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text)])]


@pytest.fixture
def llm(monkeypatch) -> type[StandIn]:
    fresh = type("LLM", (StandIn,), {})
    monkeypatch.setattr(tpllm, "LLM", fresh, raising=False)
    return fresh


def test_only_what_was_given_goes_to_the_engine(llm, capsys):
    assert main(["generate", "hi"]) == 0
    assert capsys.readouterr().out == "chat hi\n"
    params = tpllm.SamplingParams(temperature=0, max_tokens=256)
    assert llm.made == {"closed": True, "params": params}


def test_every_option_arrives(llm):
    options = "--model m --tensor-parallel-size 2 --device cpu --dtype float32 --max-model-len 64 "
    options += "--load-format dummy --max-tokens 5 --temperature 0.5 --seed 7"
    assert main(["generate", "hi", *options.split()]) == 0
    assert llm.made.pop("params") == tpllm.SamplingParams(temperature=0.5, max_tokens=5, seed=7)
    assert llm.made == {
        "model": "m",
        "tensor_parallel_size": 2,
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 64,
        "load_format": "dummy",
        "closed": True,
    }


def test_text_is_continued_raw_or_without_a_chat_template(llm, capsys):
    main(["generate", "once upon", "--raw"])
    llm.has_chat_template = False
    main(["generate", "a time"])
    assert capsys.readouterr().out == "generate once upon\ngenerate a time\n"


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("max_model_len=1\nis wrong"), 2),
        (FileNotFoundError("no such folder"), 2),
        (tpllm.WorkerError("worker rank 1 ended", rank=1), 1),
    ],
)
def test_an_error_is_one_line_on_stderr(llm, capsys, error, code):
    llm.error = error
    assert main(["generate", "hi"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"tpllm: error: {' '.join(str(error).split())}\n")
    assert llm.made["closed"]


def test_ctrl_c_ends_quietly(llm, capsys):
    llm.error = KeyboardInterrupt()
    assert main(["generate", "hi"]) == 130
    assert capsys.readouterr().err == ""


def test_a_wrong_sampling_value_is_refused_before_the_engine_starts(llm, capsys):
    assert main(["generate", "hi", "--temperature", "nan"]) == 2
    assert capsys.readouterr().err == "tpllm: error: temperature=nan must be finite\n"
    assert llm.made == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: COMMAND (see tpllm --help)"),
        (["generate"], "the following arguments are required: PROMPT (see tpllm generate --help)"),
        (["generate", "hi", "--seed", "x"], "argument --seed: invalid int value: 'x' (see tpllm"),
        (["generate", "hi", "--nonsense"], "unrecognized arguments: --nonsense (see tpllm"),
    ],
)
def test_a_wrong_command_line_is_one_line_on_stderr(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tpllm: error: {message}")
    assert err.count("\n") == 1


def test_python_m_tpllm_is_the_same_program():
    run = subprocess.run(
        [sys.executable, "-m", "tpllm", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"tpllm {tpllm.__version__}\n"
