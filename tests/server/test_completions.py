"""/v1/completions by OpenAI's own client."""

from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.server.conftest import Served


def test_a_text_is_continued(client: OpenAI, served: Served) -> None:
    answer = client.completions.create(model="fake", prompt="abc")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "fake"
    assert answer.choices[0].text == "cba"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 3)
    assert answer.usage.total_tokens == 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert served.engine.seen[0][1].max_tokens == 16


def test_several_prompts_with_n_answers_are_numbered_in_their_order(client: OpenAI) -> None:
    prompts: list[list[int]] = [[97, 98], [99, 100, 101, 102]]
    answer = client.completions.create(model="fake", prompt=prompts, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["ba", "ba", "fedc", "fedc"]
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    stream = client.completions.create(model="fake", prompt=["ab", "cdef"], n=2, stream=True)
    texts = ["", "", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["ba", "ba", "fedc", "fedc"]


def test_a_stream_ends_with_reason_and_usage(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="fake",
            prompt="abcdefgh",
            max_tokens=7,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "hgfedcb"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 7
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_every_sampling_field_reaches_the_engine(client: OpenAI, served: Served) -> None:
    client.completions.create(
        model="fake",
        prompt="x",
        max_tokens=9,
        n=3,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        seed=7,
        stop=["!", "?"],
        logit_bias={"65": -100},
        logprobs=4,
        user="somebody",
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "stop_token_ids": [1, 2],
            "bad_words": ["bad"],
            "allowed_token_ids": [65, 66],
            "min_tokens": 2,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "include_stop_str_in_output": True,
            "prompt_logprobs": 1,
        },
    )
    params = served.engine.seen[0][1]
    wanted = {
        "max_tokens": 9,
        "n": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "seed": 7,
        "stop": ("!", "?"),
        "stop_token_ids": (1, 2),
        "bad_words": ("bad",),
        "allowed_token_ids": (65, 66),
        "logit_bias": {65: -100.0},
        "logprobs": 4,
        "prompt_logprobs": 1,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    assert {name: getattr(params, name) for name in wanted} == wanted


def test_logprobs_have_the_format_of_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="abc", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["c", "b", "a"]
    assert logprobs.token_logprobs == [-2.0, -2.0, -2.0]
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"d": -1.0, "c": -2.0}


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_prompts_logprobs(client: OpenAI, stream: bool) -> None:
    answer: Any = client.completions.create(
        model="fake", prompt="abc", echo=True, logprobs=1, stream=stream, max_tokens=2
    )
    choices = [c.choices[0] for c in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == "abccb"
    tokens = [t for c in choices for t in c.logprobs.tokens]
    values = [v for c in choices for v in c.logprobs.token_logprobs]
    assert tokens == ["a", "b", "c", "c", "b"]
    assert values == [None, -2.0, -2.0, -2.0, -2.0]
    assert [o for c in choices for o in c.logprobs.text_offset] == [0, 1, 2, 3, 4]


def test_an_echo_without_new_tokens_measures_the_prompt_alone(client: OpenAI) -> None:
    answer = client.completions.create(
        model="fake", prompt="abc", echo=True, logprobs=1, max_tokens=0
    )
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["a", "b", "c"]
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_prompt_logprobs_are_keyed_by_token_id(client: OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="ab", extra_body={"prompt_logprobs": 1})
    assert answer.choices[0].model_extra is not None
    first, second = answer.choices[0].model_extra["prompt_logprobs"]
    assert first is None
    assert second["98"] == {"logprob": -2.0, "rank": 2, "decoded_token": "b"}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_long_prompt_are_complete(client: OpenAI, stream: bool) -> None:
    answer: Any = client.completions.create(
        model="fake",
        prompt="abc" * 100,
        echo=True,
        logprobs=1,
        stream=stream,
        max_tokens=2,
        extra_body=None if stream else {"prompt_logprobs": 0},
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert "".join(tokens) == "abc" * 100 + "cb" and offsets == list(range(302))
    if not stream:
        by_id = choices[0].model_extra["prompt_logprobs"]
        assert by_id[0] is None and [list(each) for each in by_id[1:]] == [
            [str(ord(char))] for char in ("abc" * 100)[1:]
        ]


def test_a_stop_string_is_reported(client: OpenAI) -> None:
    choice = client.completions.create(model="fake", prompt="abc", stop="a").choices[0]
    assert choice.text == "cb"
    assert choice.model_extra is not None and choice.model_extra["stop_reason"] == "a"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be between 0"),
        ({"n": 129}, "n=129 must be at most 128"),
        ({"logprobs": 21}, "logprobs=21 must be between 0 and 20"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        (
            {"max_tokens": 1999},
            "This model's maximum context length is 2000 tokens. However, you requested 2001",
        ),
        ({"best_of": 2}, "best_of=2 is not supported beyond n=1"),
        (
            {"extra_body": {"prompt_logprobs": 1}, "stream": True},
            "prompt_logprobs=1 is not available in streams",
        ),
        ({"suffix": "end"}, "suffix is not supported"),
        ({"logit_bias": {"x": 1}}, "logit_bias key='x' must be a whole number"),
        ({"prompt": ""}, "prompt 0 has no tokens"),
        ({"prompt": []}, "prompt=[] is empty"),
        ({"prompt": [[1], "a", {}]}, "prompt[2]={} must be a string or a list of token ids"),
        ({"prompt": [True]}, "prompt[0]=True must be a string"),
        (
            {"prompt": "x" * 2000},
            "This model's maximum context length is 2000 tokens. However, your prompt is too",
        ),
    ],
)
def test_what_cannot_run_is_refused(
    client: OpenAI, served: Served, fields: dict[str, object], message: str
) -> None:
    request: dict[str, object] = {"model": "fake", "prompt": "ab", **fields}
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(**request)  # type: ignore[call-overload]
    assert refused.value.body["message"].startswith(message)  # type: ignore[index]
