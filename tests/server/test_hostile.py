"""Requests that would keep the server to themselves, and that other clients must not feel."""

import socket
from typing import Any

import httpx
import pytest

from tests.leaks import wait_until
from tests.server.conftest import running_server
from tests.server.fake_engine import MAX_MODEL_LEN, LetterTokenizer
from tests.server.test_http import CHAT, HELLO, error_of
from tpllm.server import guard, prompts

COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize(
    "path, body, message",
    [
        (COMPLETIONS, {"stop": ["x"] * 65}, "stop=['x', "),
        (COMPLETIONS, {"stop": "x" * 1025}, "stop='xxx"),
        (COMPLETIONS, {"bad_words": ["x"] * 1025}, "bad_words=['x', "),
        (COMPLETIONS, {"bad_words": ["x" * 1025]}, "bad_words[0]='xxx"),
        (COMPLETIONS, {"guided_choice": ["x"] * 1025}, "guided_choice=['x', "),
        (COMPLETIONS, {"stop_token_ids": [1] * (2**20 + 1)}, "stop_token_ids=[1, "),
        (COMPLETIONS, {"stop_token_ids": ["a"] * 10**5}, "stop_token_ids[0]='a' "),
        (COMPLETIONS, {f"field{i}": i for i in range(10**4)}, "an object of 10001 fields"),
        (COMPLETIONS, {"prompt": ["x"] * 16385}, "prompt has 16385 entries"),
        (
            COMPLETIONS,
            {"n": 100, "stop_token_ids": [1] * 2000},
            "stop_token_ids has 2000 entries, too many for a request of 100 sequences",
        ),
        (
            COMPLETIONS,
            {"prompt": ["x"] * 1000, "bad_words": ["x"] * 10},
            "bad_words has 10 entries, too many for a request of 1000 sequences",
        ),
        (CHAT, {"messages": HELLO["messages"] * 4097}, "messages=[{"),
        (CHAT, {"messages": [{"role": "nobody"}] * 4000}, "messages[0].role='nobody' "),
        ("/detokenize", {"tokens": [1] * (2**20 + 1)}, "tokens=[1, "),
    ],
)
def test_more_than_anyone_needs_is_refused_shortly(
    http: httpx.Client, path: str, body: dict[str, Any], message: str
) -> None:
    whole = {"prompt": "x", **body} if path == COMPLETIONS else body
    error = error_of(http.post(path, json=whole), 400)
    assert error["message"].startswith(message) and len(error["message"]) < 300


def test_as_many_as_the_vocabulary_has_may_be_allowed_to_one_sequence(http: httpx.Client) -> None:
    body = {"prompt": "x", "allowed_token_ids": list(range(10**5))}
    assert http.post(COMPLETIONS, json=body).status_code == 200


def test_a_text_that_is_far_too_long_is_not_encoded_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = 0
    encode_batch = LetterTokenizer.encode_batch

    def counting(self: LetterTokenizer, texts: list[str], special: bool = True) -> list[list[int]]:
        nonlocal seen
        seen += sum(map(len, texts))
        return encode_batch(self, texts, special)

    monkeypatch.setattr(LetterTokenizer, "encode_batch", counting)
    text = "x" * (4 * prompts.PIECE_CHARS)
    chat = {"messages": [{"role": "user", "content": text}]}
    with running_server() as served, served.http() as http:
        for path, body in (
            (COMPLETIONS, {"prompt": text}),
            ("/tokenize", {"prompt": text}),
            (CHAT, chat),
        ):
            seen = 0
            error = error_of(http.post(path, json=body), 400)
            assert error["code"] == "context_length_exceeded"
            assert f"more than {2 * MAX_MODEL_LEN} tokens" in error["message"]
            assert seen == prompts.PIECE_CHARS


def test_many_texts_are_encoded_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "PIECE_CHARS", 10)
    sizes: list[int] = []

    class Counting(LetterTokenizer):
        def encode_batch(self, texts: list[str], special: bool = True) -> list[list[int]]:
            sizes.append(sum(map(len, texts)))
            return super().encode_batch(texts, special)

    texts = ["abcdef", "ghi", "jkl", "mnopqrstu", "v", "", "w"]
    encoded = prompts.Prompts(Counting(), 100)._encode(texts, True)
    assert encoded == [[ord(letter) for letter in text] for text in texts]
    assert sum(sizes) == len("".join(texts)) and max(sizes) <= 10 and len(sizes) == 4


def test_bodies_that_never_end_hold_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_HELD_BYTES", 5000)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
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
