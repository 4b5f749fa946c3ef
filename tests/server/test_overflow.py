"""A request beyond the model's context: the message, code and field that clients look for."""

from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from tests.server.conftest import Served, running_server
from tests.server.fake_engine import MAX_MODEL_LEN
from tests.server.test_http import CHAT, HELLO, error_of
from tpllm.server import prompt_encoder as prompts

COMPLETIONS = "/v1/completions"
BEGINNING = f"This model's maximum context length is {MAX_MODEL_LEN} tokens. However, "
LONG = [{"role": "user", "content": "x" * MAX_MODEL_LEN}]
IDS = [97] * MAX_MODEL_LEN


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads for long texts would outlive the test."""
    monkeypatch.setattr(prompts, "SHORT", 2**30)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path, body, param, words",
    [
        (CHAT, {"messages": LONG}, "messages", "prompt is too long: the 2007 tokens of messages"),
        (CHAT, {"messages": LONG, "max_tokens": 1}, "messages", "prompt is too long"),
        (CHAT, {**HELLO, "max_tokens": 1990}, "max_tokens", "requested 2002 tokens (12 in"),
        (CHAT, {**HELLO, "max_completion_tokens": 1990}, "max_completion_tokens", "requested 2002"),
        (CHAT, {**HELLO, "max_tokens": 10**7}, "max_tokens", "10000000 tokens by max_tokens alone"),
        (CHAT, {**HELLO, "max_tokens": 10**20}, "max_tokens", "by max_tokens alone"),
        (
            CHAT,
            {**HELLO, "max_tokens": 3, "max_completion_tokens": 10**7},
            "max_completion_tokens",
            "by max_completion_tokens alone",
        ),
        (COMPLETIONS, {"prompt": "x" * 2000}, "prompt", "the 2000 tokens of prompt leave no room"),
        (COMPLETIONS, {"prompt": IDS}, "prompt", "the 2000 tokens of prompt leave no room"),
        (COMPLETIONS, {"prompt": ["x", IDS]}, "prompt", "2000 tokens of prompt[1] leave no room"),
        (COMPLETIONS, {"prompt": IDS, "echo": True, "max_tokens": 0}, "prompt", "leave no room"),
        (COMPLETIONS, {"prompt": IDS[1:], "max_tokens": 2}, "max_tokens", "requested 2001 tokens"),
        (COMPLETIONS, {"prompt": ["x", IDS[2:]], "max_tokens": 3}, "max_tokens", "in prompt[1]"),
        (COMPLETIONS, {"prompt": "x" * 300_000}, "prompt", "a text has 300000 characters"),
        (CHAT, {"messages": [{**LONG[0], "content": "x" * 300_000}]}, "messages", "characters"),
    ],
)
def test_an_overflow_has_openais_message(
    http: httpx.Client,
    served: Served,
    path: str,
    body: dict[str, Any],
    param: str,
    words: str,
    stream: bool,
) -> None:
    error = error_of(http.post(path, json={**body, "stream": stream}), 400)
    assert error["message"].startswith(BEGINNING) and words in error["message"], error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == param
    assert served.engine.seen == []


def test_texts_to_tokenize_have_a_maximum_length(http: httpx.Client) -> None:
    text = "x" * 300_000
    for body, param in (
        ({"prompt": text}, "prompt"),
        ({"messages": [{"role": "user", "content": text}]}, "messages"),
    ):
        error = error_of(http.post("/tokenize", json=body), 400)
        assert error["message"].startswith(BEGINNING) and error["param"] == param
        assert error["code"] == "context_length_exceeded"


def test_a_prompt_that_just_fits_runs(http: httpx.Client) -> None:
    for fields in ({"prompt": IDS[1:]}, {"prompt": IDS[1:], "max_tokens": 1}):
        assert http.post(COMPLETIONS, json=fields).status_code == 200


def test_openais_client_gets_the_code(client: OpenAI) -> None:
    messages: Any = LONG
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(model="fake", messages=messages)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(
    "value, message", [(0, "={} must be at least 1"), (5, "={} must be at most 3")]
)
def test_other_errors_name_the_field_that_was_sent(field: str, value: int, message: str) -> None:
    with running_server(max_output_tokens=3) as served, served.http() as http:
        error = error_of(http.post(CHAT, json={**HELLO, field: value}), 400)
    assert error["message"].startswith(field + message.format(value))
    assert (error["param"], error["code"]) == (field, None)
