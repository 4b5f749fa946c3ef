"""`tpllm generate` up to the engine, for which a stand-in answers here."""

import io
import json
import sys

import pytest

from tpllm import RequestOutputKind, SamplingParams
from tpllm.cli import main


class Terminal(io.StringIO):
    """A stdout that is one."""

    def isatty(self) -> bool:
        return True


def generate(*words: str) -> int:
    return main(["generate", *words, "--quiet"])


def test_only_what_was_given_goes_to_the_engine(llm, capsys):
    assert generate("hi") == 0
    assert capsys.readouterr() == ("[user: hi]\n", "")
    assert llm.made["settings"] == {}
    assert llm.made["params"] == SamplingParams(temperature=0, max_tokens=256)
    assert llm.made["closed"]


def test_every_option_arrives(llm):
    engine = "--model m --tensor-parallel-size 2 --device cpu --dtype float32 --max-model-len 64 "
    engine += "--load-format dummy --no-enable-prefix-caching --gpu-memory-utilization 0.5"
    sampling = "--max-tokens 5 --temperature 0.5 --seed 7 --top-k 3 --n 2 --logit-bias 4=1.5 "
    sampling += "--stop-token-ids 1,2 --stop-token-ids 3 --ignore-eos --stop a --stop b,c"
    assert generate("hi", *engine.split(), *sampling.split()) == 0
    assert llm.made["params"] == SamplingParams(
        temperature=0.5,
        max_tokens=5,
        seed=7,
        top_k=3,
        n=2,
        logit_bias={4: 1.5},
        stop_token_ids=[1, 2, 3],
        ignore_eos=True,
        stop=["a", "b,c"],
    )
    assert llm.made["settings"] == {
        "model": "m",
        "tensor_parallel_size": 2,
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 64,
        "load_format": "dummy",
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5,
    }


def test_settings_come_from_a_file_too(llm, tmp_path, monkeypatch):
    file = tmp_path / "engine.yaml"
    file.write_text("model: m\nmax-num-seqs: 4\n")
    monkeypatch.setenv("TPLLM_MAX_NUM_SEQS", "5")
    assert generate("hi", "--config", str(file)) == 0
    assert llm.made["settings"] == {"model": "m", "max_num_seqs": 5}


def test_text_is_continued_raw_or_without_a_chat_template(llm, capsys):
    generate("once upon", "--raw")
    llm.has_chat_template = False
    generate("a time")
    assert capsys.readouterr().out == "once upon\na time\n"


def test_a_system_prompt_comes_first(llm, capsys):
    generate("hi", "--system", "be kind")
    assert capsys.readouterr().out == "[system: be kind][user: hi]\n"


def test_a_prompt_can_come_from_stdin(llm, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    generate("-", "--raw")
    assert capsys.readouterr().out == "two\nlines\n"


def test_a_terminal_gets_the_text_as_it_comes(llm, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert generate("one two three", "--raw") == 0
    assert terminal.getvalue() == "one two three\n"
    assert llm.made["params"].output_kind is RequestOutputKind.DELTA


def test_several_continuations_are_told_apart(llm, capsys):
    assert generate("hi", "--raw", "--n", "2", "--temperature", "1") == 0
    assert capsys.readouterr().out == "--- 1 of 2\nhi\n--- 2 of 2\nhi\n"


def test_json_has_the_whole_output(llm, capsys):
    assert generate("hi", "--json", "--logprobs", "2", "--no-detokenize") == 0
    output = json.loads(capsys.readouterr().out)
    assert output["outputs"][0]["token_ids"] == [1]
    assert output["finished"] is True
    assert llm.made["params"].logprobs == 2


@pytest.mark.parametrize(
    "words, message",
    [
        ("--temperature nan", "temperature=nan must be finite"),
        ("--raw --system x", "--system needs a chat template, which --raw does without; leave one"),
        ("--logprobs 1", "--logprobs is shown by --json alone; add it"),
        ("--prompt-logprobs 1", "--prompt-logprobs is shown by --json alone; add it"),
        ("--no-detokenize", "--no-detokenize leaves nothing to show but with --json; add it"),
    ],
)
def test_what_cannot_be_is_refused_before_the_engine_starts(llm, capsys, words, message):
    assert generate("hi", *words.split()) == 2
    assert capsys.readouterr().err.startswith(f"tpllm: error: {message}")
    assert llm.made == {}
