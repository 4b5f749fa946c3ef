"""Panics of libraries in Rust are ValueErrors, wherever we call one."""

import shutil
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from tpllm.config import checkpoint_files
from tpllm.config.checkpoint import resolve_model
from tpllm.config.checkpoint_files import WEIGHTS_NAME
from tpllm.engine import grammars
from tpllm.engine.grammars import Grammars
from tpllm.errors import panics_as_errors
from tpllm.structured_outputs import StructuredOutputsParams
from tpllm.text.tokenizer import Tokenizer

SHIPPED = resolve_model(None)


class PanicException(BaseException):
    """As pyo3 makes one for each library."""


def panic(*args: object, **kwargs: object) -> NoReturn:
    raise PanicException("index out of bounds: the len is 3\nnote: run with RUST_BACKTRACE=1")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(SHIPPED)


def test_only_a_panic_becomes_an_error():
    for error in (KeyboardInterrupt(), SystemExit(3), OSError("disk"), GeneratorExit()):
        with pytest.raises(type(error)), panics_as_errors("the library"):
            raise error
    whole = "^the library: index out of bounds: the len is 3$"
    with pytest.raises(ValueError, match=whole), panics_as_errors("the library"):
        panic()
    whole = "^the library: PanicException$"
    with pytest.raises(ValueError, match=whole), panics_as_errors("the library"):
        raise PanicException


def test_a_text_that_makes_tokenizers_panic_is_refused_and_the_next_is_encoded(tokenizer):
    """12 million spaces meet the retry limit of the library's regular expressions."""
    with pytest.raises(ValueError, match="tokenizer of tiny-qwen3 cannot encode this text: Onig"):
        tokenizer.encode_batch([" " * 12_000_000 + "x"])
    assert tokenizer.decode(tokenizer.encode_batch(["x"])[0]) == "x"


CALLS: dict[str, tuple[str, Callable[[Tokenizer], object]]] = {
    "encode": ("cannot encode this text", lambda t: t.encode_batch(["a"])),
    "bad words": ("cannot encode this text", lambda t: t.bad_word_ids(["a"])),
    "decode": ("cannot decode these tokens", lambda t: t.decode([1])),
    "render": (
        "cannot render these messages",
        lambda t: t.render_chat([{"role": "user", "content": "a"}]),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_the_tokenizer_is_guarded(call):
    class Panicking:
        chat_template = "{{ messages }}"
        __call__ = decode = apply_chat_template = panic

    message, make_call = CALLS[call]
    tokenizer = Tokenizer(SHIPPED)
    vars(tokenizer)["_inner"] = Panicking()
    with pytest.raises(ValueError, match=f"{message}: index out of bounds"):
        make_call(tokenizer)


def test_a_panic_while_files_are_read_is_refused_by_file(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(ValueError, match=r"no tokenizer can be read from .*: index out of bounds"):
        Tokenizer(SHIPPED).load()
    shutil.copy(SHIPPED / WEIGHTS_NAME, tmp_path)
    monkeypatch.setattr(checkpoint_files, "safe_open", panic)
    with pytest.raises(ValueError, match=r"model.safetensors is .* damaged \(safetensors: index"):
        checkpoint_files._read_header(tmp_path / WEIGHTS_NAME)


def test_a_panic_while_a_grammar_is_compiled_is_refused(monkeypatch):
    monkeypatch.setattr(grammars, "source_of", panic)
    monkeypatch.setattr(grammars, "NumberTokens", lambda tokenizer: None)
    loaded: Any = object()
    with pytest.raises(ValueError, match="regex='a' cannot be used: llguidance: index out of"):
        Grammars(lambda: loaded).compile(StructuredOutputsParams(regex="a"))
