"""/v1/chat/completions by OpenAI's own client."""

import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.server.conftest import Served

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS},
    }
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def ask(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "fake", "messages": HELLO, **fields})


def put_together(chunks: list[Any]) -> dict[str, Any]:
    """The message that a stream's deltas add up to."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta
            message["content"] += delta.content or ""
            reasoning = getattr(delta, "reasoning_content", None)
            assert getattr(delta, "reasoning", None) == reasoning
            message["reasoning_content"] += reasoning or ""
            for call in delta.tool_calls or []:
                if call.function.name:
                    assert call.id.startswith("call_") and call.type == "function"
                    message["calls"].append([call.function.name, ""])
                message["calls"][call.index][1] += call.function.arguments
    return message


def test_a_conversation_is_answered(client: OpenAI, served: Served) -> None:
    served.engine.reply = "good day"
    answer = ask(client)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "good day")
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens == 8
    rendered = served.engine.tokenizer.rendered[0]
    assert rendered["messages"] == HELLO
    assert rendered["add_generation_prompt"] is True
    assert served.engine.seen[0][1].max_tokens is None


def test_a_stream_gives_the_role_then_the_text_then_the_reason(
    client: OpenAI, served: Served
) -> None:
    served.engine.reply = "good day"
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert put_together(chunks)["content"] == "good day"
    reasons = [c.choices[0].finish_reason for c in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8


def test_n_answers_stream_side_by_side(client: OpenAI, served: Served) -> None:
    served.engine.reply = "abcdef"
    chunks = list(ask(client, stream=True, n=3))
    for index in range(3):
        own = [c for c in chunks if c.choices[0].index == index]
        assert put_together(own)["content"] == "abcdef"
        assert own[0].choices[0].delta.role == "assistant"
        assert own[-1].choices[0].finish_reason == "stop"
    assert [c.message.content for c in ask(client, n=3).choices] == ["abcdef"] * 3


def test_usage_can_come_with_every_chunk(client: OpenAI, served: Served) -> None:
    served.engine.reply = "abcdef"
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, stream=True, stream_options=options))
    assert chunks[0].usage.completion_tokens == 3
    assert chunks[-1].usage.completion_tokens == 6


@pytest.mark.parametrize("chars_per_step", [1, 4, 1000])
def test_reasoning_is_separate_from_content(
    client: OpenAI, served: Served, chars_per_step: int
) -> None:
    served.engine.reply = "<think>\nI think.\n</think>\n\nIt is."
    served.engine.chars_per_step = chars_per_step
    message = ask(client).choices[0].message
    assert (message.reasoning_content, message.content) == ("I think.", "It is.")
    assert message.reasoning == message.reasoning_content
    streamed = put_together(list(ask(client, stream=True)))
    assert (streamed["reasoning_content"], streamed["content"]) == ("I think.", "It is.")
    fields = {"include_reasoning": False}
    message = ask(client, extra_body=fields).choices[0].message
    assert (message.reasoning_content, message.content) == (None, "It is.")
    assert message.reasoning is None
    streamed = put_together(list(ask(client, stream=True, extra_body=fields)))
    assert (streamed["reasoning_content"], streamed["content"]) == ("", "It is.")


def test_a_prompt_may_open_the_reasoning(client: OpenAI, served: Served) -> None:
    served.engine.tokenizer.template_end = "<assistant>\n<think>\n"
    served.engine.reply = "I think.\n</think>\n\nIt is."
    message = ask(client).choices[0].message
    assert (message.reasoning_content, message.content) == ("I think.", "It is.")


@pytest.mark.parametrize(
    "fields, options",
    [
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"reasoning_effort": "low"}, {}),
    ],
)
def test_thinking_can_be_switched_off(
    client: OpenAI, served: Served, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    ask(client, extra_body=fields)
    assert served.engine.tokenizer.rendered[0]["chat_template_kwargs"] == options


@pytest.mark.parametrize("chars_per_step", [1, 7, 1000])
def test_tool_calls_are_parsed(client: OpenAI, served: Served, chars_per_step: int) -> None:
    served.engine.reply = f"Let me see.\n{CALL}\n{CALL}"
    served.engine.chars_per_step = chars_per_step
    choice = ask(client, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["weather", "weather"]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Ulm"}] * 2
    assert len({call.id for call in calls}) == 2
    chunks = list(ask(client, tools=TOOLS, stream=True))
    message = put_together(chunks)
    assert message["content"] == "Let me see."
    assert message["calls"] == [["weather", '{"city": "Ulm"}']] * 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    one = ask(client, tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls) == 1


def test_a_call_alone_has_no_content(client: OpenAI, served: Served) -> None:
    served.engine.reply = CALL
    assert ask(client, tools=TOOLS).choices[0].message.content is None


def test_tools_reach_the_template_unless_the_choice_is_none(client: OpenAI, served: Served) -> None:
    served.engine.reply = CALL
    ask(client, tools=TOOLS, tool_choice="auto")
    message = ask(client, tools=TOOLS, tool_choice="none").choices[0].message
    first, second = served.engine.tokenizer.rendered
    assert first["tools"] == TOOLS
    assert second["tools"] is None
    assert message.tool_calls is None and message.content == CALL


def test_an_answer_with_calls_can_be_sent_back(client: OpenAI, served: Served) -> None:
    served.engine.reply = f"<think>hm</think>{CALL}"
    message = ask(client, tools=TOOLS).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    ask(client, messages=[*HELLO, message, result], tools=TOOLS)
    _, assistant, tool = served.engine.tokenizer.rendered[1]["messages"]
    assert assistant["content"] == ""
    assert assistant["reasoning_content"] == "hm"
    function = {"name": "weather", "arguments": {"city": "Ulm"}}
    assert assistant["tool_calls"][0]["function"] == function
    assert tool == {**result, "role": "tool"}


@pytest.mark.parametrize(
    "fields, reasoning",
    [
        ({"reasoning": "a"}, "a"),
        ({"reasoning_content": "b"}, "b"),
        ({"reasoning": "a", "reasoning_content": "b"}, "a"),
        ({"reasoning": None, "reasoning_content": "b"}, "b"),
        ({"reasoning": "", "reasoning_content": "b"}, "b"),
        ({"reasoning": None, "reasoning_content": None}, None),
    ],
)
def test_the_template_reads_reasoning_under_the_name_that_it_knows(
    client: OpenAI, served: Served, fields: dict[str, Any], reasoning: str | None
) -> None:
    ask(client, messages=[*HELLO, {"role": "assistant", "content": "x", **fields}, *HELLO])
    assistant = served.engine.tokenizer.rendered[0]["messages"][1]
    assert "reasoning" not in assistant
    assert assistant.get("reasoning_content") == reasoning


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    "choice, reason",
    [("auto", "tool_calls"), ("required", "tool_calls"), (NAMED, "stop"), ("none", "stop")],
)
def test_the_reason_for_the_end_is_openais(
    client: OpenAI, served: Served, choice: Any, reason: str
) -> None:
    served.engine.reply = CALL
    whole = ask(client, tools=TOOLS, tool_choice=choice)
    streamed = list(ask(client, tools=TOOLS, tool_choice=choice, stream=True))
    assert whole.choices[0].finish_reason == reason
    assert streamed[-1].choices[0].finish_reason == reason


def allowed(mode: Any, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_the_template_gets_only_the_allowed_tools(
    client: OpenAI, served: Served, mode: str
) -> None:
    served.engine.reply = CALL
    time: Any = {"type": "function", "function": {"name": "time"}}
    answer = ask(client, tools=[time, *TOOLS], tool_choice=allowed(mode, "weather")).choices[0]
    assert answer.finish_reason == "tool_calls"
    (tool,) = served.engine.tokenizer.rendered[0]["tools"]
    assert tool["function"]["name"] == "weather"
    (_, params) = served.engine.seen[0]
    form = params.structured_outputs
    assert form is None if mode == "auto" else "weather" in form.grammar
    assert mode == "auto" or '"time' not in form.grammar


@pytest.mark.parametrize("choice", ["required", NAMED, "auto", allowed("required", "weather")])
def test_a_truncated_call_leaves_no_tags_in_the_content(
    client: OpenAI, served: Served, choice: Any
) -> None:
    served.engine.reply = CALL
    name_ends = CALL.index('"weather"') + len('"weather"')
    opened = len("<tool_call>")
    for limit in (5, opened, opened + 3, name_ends - 1, name_ends, name_ends + 5, len(CALL) - 20):
        fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": limit}
        answer = ask(client, **fields).choices[0]
        assert answer.finish_reason == "length"
        calls = [
            [call.function.name, call.function.arguments]
            for call in answer.message.tool_calls or []
        ]
        if limit < name_ends:
            assert calls == []
        else:
            [[name, arguments]] = calls
            assert name == "weather" and '{"city": "Ulm"}'.startswith(arguments)
        # the beginning of a tag is text, unless nothing but a call may come
        is_text = choice == "auto" and limit < opened
        assert (answer.message.content or "") == (CALL[:limit] if is_text else "")
        streamed = put_together(list(ask(client, stream=True, **fields)))
        assert streamed["calls"] == calls
        assert streamed["content"] == (answer.message.content or "")


@pytest.mark.parametrize("chars_per_step", [1, 4, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "Use <tool_call> tags, they say.",
        "a\n\n<tool_call>\n[1]\n</tool_call>\n\nb",
        " `<tool_call>` and </think> \n",
        '<tool_call>{"name": 3}</tool_call> ',
        "so <tool_call>",
    ],
)
def test_a_tag_in_prose_is_content(
    client: OpenAI, served: Served, text: str, chars_per_step: int
) -> None:
    served.engine.reply, served.engine.chars_per_step = text, chars_per_step
    answer = ask(client, tools=TOOLS).choices[0]
    assert (answer.message.content, answer.finish_reason) == (text, "stop")
    assert put_together(list(ask(client, tools=TOOLS, stream=True)))["content"] == text


def test_content_parts_and_developer_roles_are_converted_for_the_template(
    client: OpenAI, served: Served
) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask(client, messages=[{"role": "developer", "content": parts}])
    assert served.engine.tokenizer.rendered[0]["messages"] == [
        {"role": "system", "content": "a\nb"}
    ]


def test_the_last_message_can_be_continued(client: OpenAI, served: Served) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "good"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    ask(client, messages=messages, extra_body=fields)
    rendered = served.engine.tokenizer.rendered[0]
    assert rendered["continue_final_message"] is True
    assert rendered["add_generation_prompt"] is False


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_the_format_of_chat_completions(
    client: OpenAI, served: Served, stream: bool
) -> None:
    served.engine.reply = "aé\N{REPLACEMENT CHARACTER}"
    answer = ask(client, logprobs=True, top_logprobs=2, stream=stream)
    choices = [c.choices[0] for c in answer] if stream else answer.choices
    entries = [e for c in choices if c.logprobs is not None for e in c.logprobs.content]
    assert [entry.token for entry in entries] == list(served.engine.reply)
    assert [entry.bytes for entry in entries] == [[97], [0xC3, 0xA9], [0xEF, 0xBF, 0xBD]]
    assert [entry.logprob for entry in entries] == [-2.0] * 3
    assert [(top.token, top.logprob) for top in entries[0].top_logprobs] == [
        ("b", -1.0),
        ("a", -2.0),
    ]


def test_tokens_whose_text_is_held_back_still_have_their_logprobs(
    client: OpenAI, served: Served
) -> None:
    served.engine.reply = "<think>a</think>b"
    served.engine.chars_per_step = 1
    chunks = ask(client, logprobs=True, stream=True)
    entries = [c.choices[0].logprobs for c in chunks]
    tokens = [each.token for entry in entries if entry is not None for each in entry.content]
    assert "".join(tokens) == served.engine.reply


def test_max_completion_tokens_overrides_max_tokens(client: OpenAI, served: Served) -> None:
    ask(client, max_tokens=3, max_completion_tokens=5)
    assert served.engine.seen[0][1].max_tokens == 5


@pytest.mark.parametrize(
    "fields, message, param",
    [
        ({"top_logprobs": 2}, "top_logprobs=2 needs logprobs=true", "top_logprobs"),
        ({"messages": []}, "messages=[] has too few entries; give at least 1", "messages"),
        (
            {"messages": [{"role": "user"}]},
            "messages[0].content is missing",
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "boss", "content": "x"}]},
            "messages[0].role='boss' must be 'system', 'developer', 'user', 'assistant', 'tool' or "
            "'function'",
            "messages[0].role",
        ),
        (
            {"messages": [{"role": "user", "content": "refuse"}]},
            "the chat template of fake cannot render these messages",
            None,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type='image_url' is not supported by this model; send text",
            "messages[0].content[0].type",
        ),
        ({"response_format": {"type": "xml"}}, "response_format of type 'xml'", "response_format"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format of type 'json_schema'",
            None,
        ),
        ({"extra_body": {"guided_regex": ""}}, "guided_regex: regex='' must be", "guided_regex"),
        (
            {"extra_body": {"structured_outputs": {"regexp": "a"}}},
            "structured_outputs: has no setting 'regexp'; did you mean",
            "structured_outputs",
        ),
        (
            {"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}},
            "response_format and guided_regex exclude each other; keep one",
            None,
        ),
        ({"tool_choice": "required"}, "tool_choice='required' names none of the 0 tools", None),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "time"}}},
            "tool_choice={'type': 'function', 'function': {'name': 'time'}} names none",
            "tool_choice",
        ),
        (
            {"tools": TOOLS, "tool_choice": allowed("auto", "time")},
            "tool_choice={'type': 'allowed_tools', 'allowed_tools'",
            "tool_choice",
        ),
        (
            {"tools": TOOLS, "tool_choice": allowed("any", "weather")},
            "tool_choice={'type': 'allowed_tools', 'allowed_tools'",
            "tool_choice",
        ),
        (
            {"extra_body": {"continue_final_message": True, "add_generation_prompt": True}},
            "continue",
            None,
        ),
        ({"extra_body": {"top_kk": 3}}, "there is no field 'top_kk' here; did you mean", "top_kk"),
        ({"extra_body": {"temperature": "hot"}}, "temperature='hot' must be a number", None),
        ({"extra_body": {"stop": 5}}, "stop=5 must be a string or a list of strings", "stop"),
        ({"extra_body": {"stop": ["a", 5]}}, "stop[1]=5 must be a string", "stop[1]"),
        ({"extra_body": {"n": True}}, "n=True must be a whole number", "n"),
        ({"extra_body": {"max_tokens": 2.5}}, "max_tokens=2.5 must be a whole number", None),
    ],
)
def test_what_cannot_run_is_refused(
    client: OpenAI, served: Served, fields: dict[str, Any], message: str, param: str | None
) -> None:
    for stream in (False, True):
        with pytest.raises(BadRequestError) as refused:
            ask(client, stream=stream, **fields)
        body: Any = refused.value.body
        assert body["message"].startswith(message), body["message"]
        assert body["type"] == "invalid_request_error"
        if param is not None:
            assert body["param"] == param
    assert served.engine.seen == []


def test_openais_fields_without_effect_are_accepted(client: OpenAI, served: Served) -> None:
    ask(
        client,
        user="u",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        verbosity="low",
        modalities=["text"],
        response_format={"type": "text"},
    )
    assert len(served.engine.seen) == 1
