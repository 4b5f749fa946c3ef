"""Bodies of many clients: which fields are accepted, and the errors for all others."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from tests.server.conftest import Served
from tests.server.test_http import CHAT, HELLO, error_of
from tpllm.server.errors import APIError, from_validation, from_value_error
from tpllm.server.foreign_fields import FOREIGN, WITHOUT_EFFECT
from tpllm.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

COMPLETIONS = "/v1/completions"
BODIES: dict[str, type[BaseModel]] = {
    COMPLETIONS: CompletionRequest,
    CHAT: ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
WHOLE: dict[str, dict[str, Any]] = {
    CHAT: HELLO,
    COMPLETIONS: {"prompt": "ab"},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [97]},
}
# All fields of vLLM's chat requests, and those that other clients add, at their defaults.
DEFAULTS: dict[str, Any] = {
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "best_of": 1,
    "priority": 0,
    "detokenize": True,
    "echo": False,
    "truncate_prompt_tokens": None,
    "logits_processors": None,
    "mm_processor_kwargs": None,
    "media_io_kwargs": {},
    "max_tokens": -1,
    "documents": [],
    "chat_template": None,
    "add_special_tokens": False,
    "request_id": "mine",
    "cache_salt": "salt",
    "return_tokens_as_token_ids": False,
    "return_token_ids": False,
    "kv_transfer_params": None,
    "vllm_xargs": None,
    "functions": [],
    "function_call": "auto",
    "web_search_options": None,
    "audio": None,
    "thinking": None,
    "extra_body": {},
    "logit_bias": {},
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "logprobs": False,
    "top_logprobs": 0,
    "stop": [],
    "stop_token_ids": [],
    "bad_words": [],
    "stream_options": {"include_usage": True, "include_cost": True},
    "some_new_field": None,
}


def test_other_servers_fields_are_accepted_at_their_defaults(
    http: httpx.Client, served: Served
) -> None:
    for fields in (DEFAULTS, *({name: value} for name, value in DEFAULTS.items())):
        answer = http.post(CHAT, json={**HELLO, **fields})
        assert answer.status_code == 200, answer.text
    params = [replace(params, logit_bias=None) for _, params in served.engine.seen]
    assert all(each == params[0] for each in params)
    assert all(each["tools"] is None for each in served.engine.tokenizer.rendered)


def test_the_body_of_llama_cpps_page_passes(http: httpx.Client) -> None:
    fields = {
        **{"cache_prompt": True, "reasoning_format": "auto", "timings_per_token": True},
        **{"temperature": 0.8, "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 40},
        **{"top_p": 0.95, "min_p": 0.05, "typical_p": 1, "xtc_probability": 0},
        **{"xtc_threshold": 0.1, "repeat_last_n": 64, "repeat_penalty": 1},
        **{"presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0, "dry_base": 1.75},
        **{"dry_allowed_length": 2, "dry_penalty_last_n": -1, "max_tokens": -1},
    }
    assert http.post(CHAT, json={**HELLO, **fields}).status_code == 200


@pytest.mark.parametrize("path", WHOLE)
@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_another_servers_field_with_an_effect_is_refused_by_name(
    http: httpx.Client, name: str, path: str
) -> None:
    ignored, instead = FOREIGN[name]
    if name in BODIES[path].model_fields:
        return  # it is a field here
    for value in (None, *ignored):
        answer = http.post(path, json={**WHOLE[path], name: value})
        assert answer.status_code == 200, answer.text
    error = error_of(http.post(path, json={**WHOLE[path], name: "asks for it"}), 400)
    assert error["message"] == f"{name}='asks for it' is not supported; {instead}"
    assert error["param"] == name


@pytest.mark.parametrize("path", WHOLE)
def test_fields_without_effect_are_accepted_at_any_value(http: httpx.Client, path: str) -> None:
    body = {**WHOLE[path], **dict.fromkeys(WITHOUT_EFFECT, "x")}
    assert http.post(path, json=body).status_code == 200


def test_best_of_equal_to_n_is_accepted(http: httpx.Client) -> None:
    assert http.post(CHAT, json={**HELLO, "n": 2, "best_of": 2}).status_code == 200
    assert error_of(http.post(CHAT, json={**HELLO, "best_of": 2}), 400)["param"] == "best_of"


@pytest.mark.parametrize(
    "path, name, near",
    [
        (CHAT, "max_token", "'max_tokens'"),
        (CHAT, "top_kk", "'top_k'"),
        (COMPLETIONS, "propmt", "'prompt'"),
        ("/detokenize", "token", "'tokens'"),
        ("/tokenize", "return_token_str", "'return_token_strs'"),
        (CHAT, "wholly_unheard_of", None),
    ],
)
def test_a_misspelled_field_gets_the_nearest_name_of_its_level(
    http: httpx.Client, path: str, name: str, near: str | None
) -> None:
    error = error_of(http.post(path, json={**WHOLE[path], name: 1}), 400)
    mend = "leave it out" if near is None else f"did you mean {near}?"
    assert error["message"] == f"there is no field {name!r} here; {mend}"
    assert error["param"] == name


def test_unknown_keys_inside_objects_are_ignored(http: httpx.Client, served: Served) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "x-note": 1}, "x": 1}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}], "id": 7},
        {"role": "assistant", "tool_calls": [{**call, "x": 1}], "reasoning_contents": "x"},
        {"role": "tool", "content": "b", "tool_call_id": "c", "opts": {}},
    ]
    body = {"messages": messages, "tools": [tool], "stream_options": {"more": 1}}
    for path in (CHAT, "/tokenize"):
        kept = body if path == CHAT else {"messages": messages, "tools": [tool]}
        assert http.post(path, json=kept).status_code == 200
    for rendered in served.engine.tokenizer.rendered:
        assert rendered["messages"][0] == {"role": "user", "content": "a"}
        assert "x" not in str(rendered["messages"][1:])
        assert rendered["tools"] == [{"type": "function", "function": {"name": "f"}}]


# ---- our words -----------------------------------------------------------------------------------

VALUES: list[Any] = [5, -1.5, True, "x", "x" * 2000, [], [5], ["x"], [{}], {}, {"a": {}}]
VALUES += [["x"] * 2000, [[]], {"function": {}}, [{"function": {"name": 5}}], {"5": "x"}]
PYDANTIC = re.compile(r"[Ii]nput should|after validation|valid (string|integer|number|list|dict)")


def wrong_bodies() -> Iterator[tuple[type[BaseModel], str, Any]]:
    for path, body in BODIES.items():
        for name in body.model_fields:
            for value in VALUES:
                yield body, name, {**WHOLE[path], name: value}


def test_no_error_has_pydantics_message() -> None:
    kinds = set()
    for model, name, body in wrong_bodies():
        try:
            model.model_validate(body)
        except ValidationError as error:
            problems = RequestValidationError(error.errors()).errors()
            kinds.add(problems[0]["type"])
            refused = from_validation(problems, list(model.model_fields))
            assert not PYDANTIC.search(refused.message), refused.message
            assert "is not valid here" not in refused.message, problems  # it has words of its own
            assert refused.message.startswith(name) and len(refused.message) < 300
            assert refused.param is not None and refused.param.startswith(name)
    assert kinds >= {"too_short", "too_long", "literal_error", "model_type", "string_too_long"}


@pytest.mark.parametrize(
    "path, fields, message, param",
    [
        (CHAT, {"messages": []}, "messages=[] has too few entries; give at least 1", "messages"),
        (CHAT, {"messages": [5]}, "messages[0]=5 must be an object", "messages[0]"),
        (CHAT, {"messages": [{}]}, "messages[0].role is missing", "messages[0].role"),
        (CHAT, {"stop": [""]}, "stop[0]='' is empty", "stop[0]"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias key='x' must be", "logit_bias"),
        (CHAT, {"logit_bias": {"5": "a"}}, "logit_bias[5]='a' must be a number", "logit_bias[5]"),
        (CHAT, {"tools": [5]}, "tools[0]=5 must be an object", "tools[0]"),
        (CHAT, {"tools": [{}]}, "tools[0].function is missing", "tools[0].function"),
        (
            CHAT,
            {"tools": [{"function": {"name": "f", "parameters": 5}}]},
            "tools[0].function.parameters=5 must be an object",
            "tools[0].function.parameters",
        ),
        (CHAT, {"tool_choice": 5}, "tool_choice=5 must be a string or an object", "tool_choice"),
        (CHAT, {"stream_options": 5}, "stream_options=5 must be an object", "stream_options"),
        (
            CHAT,
            {"stream_options": {"include_usage": 1}},
            "stream_options.include_usage=1 must be true or false",
            "stream_options.include_usage",
        ),
        (CHAT, {"modalities": ["audio"]}, "modalities[0]='audio' must be 'text'", "modalities[0]"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type='image_url' is not supported",
            "messages[0].content[0].type",
        ),
        (
            CHAT,
            {"max_completion_tokens": 5, "min_tokens": 9},
            "min_tokens=9 is more than max_completion_tokens=5",
            "min_tokens",
        ),
        (COMPLETIONS, {"prompt": [True]}, "prompt[0]=True must be a string", "prompt[0]"),
        (COMPLETIONS, {"prompt": "\ud800"}, "prompt 0 holds a lone surrogate", "prompt"),
        (COMPLETIONS, {"prompt": [1, -1]}, "prompt holds -1, which is not a token id", "prompt"),
        (COMPLETIONS, {"prompt": ["a", [2**70]]}, f"prompt holds {2**70}, which is no", "prompt"),
        (CHAT, {"stop": "\ud800"}, "stop='\\ud800' is not valid Unicode", "stop"),
        (CHAT, {"bad_words": ["a", "\ud800"]}, "bad_words[1]='\\ud800' is not", "bad_words[1]"),
        (COMPLETIONS, {"prompt": "x", "n": 0}, "n=0 must be at least 1", "n"),
        (COMPLETIONS, {"prompt": 5}, "prompt=5 must be a string, token ids", "prompt"),
        (COMPLETIONS, {}, "prompt is missing; every request needs it", "prompt"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]='a' must be a whole number", "tokens[0]"),
    ],
)
def test_an_error_has_the_path_of_the_field(
    http: httpx.Client, path: str, fields: dict[str, Any], message: str, param: str
) -> None:
    body = {**HELLO, **fields} if path == CHAT else fields
    content = json.dumps(body)  # pure ASCII, also where a text is no valid Unicode
    refused = http.post(path, content=content, headers={"content-type": "application/json"})
    error = error_of(refused, 400)
    assert error["message"].startswith(message), error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    "words, param",
    [
        ("logit_bias holds 5000, outside the vocabulary", "logit_bias"),
        ("stop_token_ids holds 5000, outside the vocabulary", "stop_token_ids"),
        ("allowed_token_ids=[4] leaves no token to sample", "allowed_token_ids"),
        ("the prompt holds token id 5000, outside the vocabulary", "prompt"),
        ("the prompt is empty; give at least one token", "prompt"),
        ("stop[0]='' is empty, and matches everywhere", "stop[0]"),
        ("messages[3].tool_calls[0].id=5 must be a string", "messages[3].tool_calls[0].id"),
        ("the request cannot be sent to the engine", None),
        ("a text of 5 characters", None),
        ("no tokenizer can be read", None),
    ],
)
def test_the_first_word_of_an_engines_error_is_its_param(words: str, param: str | None) -> None:
    error: APIError = from_value_error(ValueError(words))
    assert (error.message, error.param) == (words, param)
