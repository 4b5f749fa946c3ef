"""Requests that try to occupy the server; other clients must not notice them."""

import socket
from typing import Any

import httpx
import pytest

from tests.leaks import wait_until
from tests.server.conftest import Served, running_server
from tests.server.fake_engine import MAX_MODEL_LEN, CharTokenizer
from tests.server.test_http import CHAT, HELLO, error_of
from tpllm.server import guard
from tpllm.server import prompt_encoder as prompts
from tpllm.server.errors import APIError

COMPLETIONS = "/v1/completions"
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS = {"role": "assistant", "tool_calls": [CALL] * 1000}


@pytest.mark.parametrize(
    "path, body, message",
    [
        (COMPLETIONS, {"stop": ["x"] * 65}, "stop=['x', "),
        (COMPLETIONS, {"stop": "x" * 1025}, "stop='xxx"),
        (COMPLETIONS, {"bad_words": ["x"] * 1025}, "bad_words=['x', "),
        (COMPLETIONS, {"bad_words": ["x" * 1025]}, "bad_words[0]='xxx"),
        (COMPLETIONS, {"guided_choice": ["x"] * 1025}, "guided_choice=['x', "),
        (COMPLETIONS, {"stop_token_ids": ["a"] * 10**5}, "stop_token_ids[0]='a' "),
        (COMPLETIONS, {f"field{i}": i for i in range(10**4)}, "the body has 10001 fields"),
        (COMPLETIONS, {"prompt": ["x"] * 16385}, "prompt has 16385 entries"),
        (
            COMPLETIONS,
            {"n": 100, "stop_token_ids": [1] * 2000},
            "stop_token_ids is too long for a request of 100 sequences",
        ),
        (
            COMPLETIONS,
            {"prompt": ["x"] * 1000, "bad_words": ["words"] * 14},
            "bad_words is too long for a request of 1000 sequences",
        ),
        (CHAT, {"messages": HELLO["messages"] * 4097}, "messages=[{"),
        (CHAT, {"messages": [{"role": "nobody"}] * 4000}, "messages[0].role='nobody' "),
        (CHAT, {"messages": [CALLS] * 9}, "messages have more than 8192 parts and calls"),
    ],
)
def test_too_many_entries_are_refused_with_a_short_error(
    http: httpx.Client, path: str, body: dict[str, Any], message: str
) -> None:
    whole = {"prompt": "x", **body} if path == COMPLETIONS else body
    error = error_of(http.post(path, json=whole), 400)
    assert error["message"].startswith(message) and len(error["message"]) < 300


def test_as_many_as_the_vocabulary_has_may_be_allowed_to_one_sequence(http: httpx.Client) -> None:
    body = {"prompt": "x", "allowed_token_ids": list(range(10**5))}
    assert http.post(COMPLETIONS, json=body).status_code == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_a_body_of_very_many_values_is_not_read(http: httpx.Client, path: str) -> None:
    body = '{"messages": [], "prompt": "x", "metadata": {"a": [' + "[]," * 2**17 + "[]]}}"
    refused = http.post(path, content=body, headers={"content-type": "application/json"})
    error = error_of(refused, 413)
    assert error["code"] == "body_too_large" and "more than 262144 values" in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_a_text_of_too_many_characters_is_not_encoded(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(prompts, "SHORT", 2**30)  # no thread, which would outlive the test
    monkeypatch.delattr(CharTokenizer, "encode_batch")
    text = "x" * (2 * prompts.PIECE_CHARS)
    body = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    error = error_of(http.post(path, json=body), 400)
    assert error["code"] == "context_length_exceeded"
    beginning = f"This model's maximum context length is {MAX_MODEL_LEN} tokens."
    assert error["message"].startswith(beginning)


class Counting(CharTokenizer):
    """Notes how many characters are encoded at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def encode_batch(self, texts: list[str], special: bool = True) -> list[list[int]]:
        self.sizes.append(sum(map(len, texts)))
        return super().encode_batch(texts, special)


def test_a_text_of_too_many_tokens_is_not_encoded_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompts, "PIECE_CHARS", 1000)
    tokenizer: Any = Counting()
    encoder = prompts.Prompts(tokenizer, 1500)
    assert encoder._encode(["x" * 1500], True) == [[ord("x")] * 1500]
    tokenizer.sizes.clear()
    with pytest.raises(APIError, match="too long: a text has 10000 characters"):
        encoder._encode(["x" * 10_000], True)
    assert tokenizer.sizes == [1000, 1000]


def test_many_texts_are_encoded_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "PIECE_CHARS", 10)
    tokenizer: Any = Counting()
    texts = ["abcdef", "ghi", "jkl", "mnopqrstu", "v", "", "w"]
    encoded = prompts.Prompts(tokenizer, 100)._encode(texts, True)
    assert encoded == [[ord(char) for char in text] for text in texts]
    assert tokenizer.sizes == [9, 3, 10, 1]


def test_bodies_that_never_end_hold_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_HELD_BYTES", 5000)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    part = f"{head}content-length: 1024\r\n\r\n".encode() + b" " * 1000
    with running_server(max_body_bytes=1024) as served, served.http() as http:
        slow = [served.connect() for _ in range(5)]
        for each in slow:
            each.sendall(part)

        def is_full() -> bool:
            return http.post(COMPLETIONS, json={"prompt": "x" * 500}).status_code == 429

        assert wait_until(is_full)
        refused = http.post(COMPLETIONS, json={"prompt": "x" * 500})
        assert error_of(refused, 429)["code"] == "queue_full"
        assert http.get("/health").status_code == 200
        for each in slow:
            each.shutdown(socket.SHUT_RDWR)
            each.close()
        assert wait_until(lambda: not is_full())


@pytest.mark.parametrize(
    "path, body, num_entries",
    [
        (CHAT, {"logprobs": True, "top_logprobs": 20, "max_tokens": 999, "n": 101}, 2118879),
        (COMPLETIONS, {"logprobs": 19, "max_tokens": 1000, "n": 105}, 2_100_000),
        (COMPLETIONS, {"logprobs": 20, "max_tokens": 1999, "prompt": ["x"] * 50}, 2_098_950),
        (COMPLETIONS, {"prompt_logprobs": 20, "prompt": ["x" * 1990] * 51}, 2_131_290),
        (
            COMPLETIONS,
            {"logprobs": 20, "echo": True, "max_tokens": 0, "prompt": ["x" * 1990] * 51},
            2_132_361,
        ),
    ],
)
def test_more_log_probabilities_than_fit_into_memory_are_refused(
    served: Served,
    http: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    num_entries: int,
) -> None:
    monkeypatch.setattr(prompts, "SHORT", 2**30)  # no thread, which would outlive the test
    whole = {**HELLO, **body} if path == CHAT else {"prompt": "x", **body}
    error = error_of(http.post(path, json=whole), 400)
    assert error["param"] == "logprobs"
    assert f"have {num_entries}" in error["message"] and "2097152" in error["message"]
    assert all(name in error["message"] for name in ("top_logprobs", "max_tokens", "n"))
    error_of(http.post(path, json={**whole, "stream": True}), 400)
    assert served.engine.seen == []


def test_an_answer_of_open_length_has_as_many_log_probabilities_as_fit(
    served: Served, http: httpx.Client
) -> None:
    body = {**HELLO, "logprobs": True, "top_logprobs": 20, "n": 51}
    assert http.post(CHAT, json=body).status_code == 200
    [(_, params)] = served.engine.seen
    assert params.max_tokens == 2**21 // (51 * 21)
    served.engine.seen.clear()
    assert http.post(CHAT, json={**body, "n": 2}).status_code == 200
    [(_, params)] = served.engine.seen
    assert params.max_tokens is None


def test_an_answer_has_all_its_log_probabilities(http: httpx.Client) -> None:
    body = {**HELLO, "logprobs": True, "top_logprobs": 20, "max_tokens": 998, "n": 100}
    assert http.post(CHAT, json=body).status_code == 200
