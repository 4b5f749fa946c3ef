"""Conversations mean the same to `LLM.chat` and to the server."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpllm.config.checkpoint import resolve_model
from tpllm.server.prompt_encoder import Prompts
from tpllm.server.protocol import ChatCompletionRequest
from tpllm.text.conversation import plain_messages, plain_tools
from tpllm.text.tokenizer import Tokenizer

# Prints all that a template can see.
ALL = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}[{{ m | tojson }}]{% endfor %}"
)
# As Qwen3's template writes calls; as templates do that go through the arguments; and without care.
QWEN3 = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% if c.function.arguments is string %}{{ c.function.arguments }}"
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}{% endfor %}{% endfor %}"
)
ITEMS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}"
    "{% endfor %}{% endfor %}"
)
METHOD = ITEMS.replace(" | items", ".items()")
TOJSON = ITEMS[: ITEMS.index("{% for k")] + (
    "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
USER = {"role": "user", "content": "Weather?"}
CUT = '{"city": "Ul'


def with_arguments(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "sun"}
    return [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result]


def arguments_of(messages: list[dict[str, Any]]) -> Any:
    return plain_messages(messages)[1]["tool_calls"][0]["function"]["arguments"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(resolve_model(None))


@pytest.fixture(scope="module")
def prints_all(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer whose template prints all of its inputs."""
    folder: Path = tmp_path_factory.mktemp("prints-all")
    shutil.copy(resolve_model(None) / "tokenizer.json", folder)
    config = json.loads((resolve_model(None) / "tokenizer_config.json").read_text())
    config["chat_template"] = ALL
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


@pytest.mark.parametrize(
    "arguments, plain",
    [
        ('{"city": "Ulm"}', {"city": "Ulm"}),
        ({"city": "Ulm"}, {"city": "Ulm"}),
        (' {"a": {"b": [1, 2.5, null]}} ', {"a": {"b": [1, 2.5, None]}}),
        (None, {}),
        ("", {}),
        (" \n", {}),
        ("{}", {}),
        *(
            (text, text)
            for text in (
                CUT,
                '{"text": "He said "hello" and left"}',
                "not json",
                '["a"]',
                '"x"',
                "5",
                "null",
                "[" * 100_000,
                '{"a":' * 400 + "1" + "}" * 400,
                '{"a": "\\ud83d"}',  # half of a surrogate pair
                '{"a": ' + "1" * 5000 + "}",
            )
        ),
    ],
)
def test_arguments_become_an_object_or_stay_a_string(arguments: Any, plain: Any) -> None:
    assert arguments_of(with_arguments(arguments)) == plain


@pytest.mark.parametrize("template", [QWEN3, ITEMS, METHOD, TOJSON])
@pytest.mark.parametrize("arguments", [CUT, '["Ul"]', '"Ul"', "say Ul", '{"a": "Ul\\ud83d"}'])
def test_every_template_renders_arguments_that_are_no_object(
    tokenizer: Tokenizer, template: str, arguments: str
) -> None:
    text = tokenizer.render_chat(with_arguments(arguments), chat_template=template)
    assert "Ul" in text
    if template is QWEN3:
        assert text == f"Weather?{arguments}sun"


def test_arguments_reach_templates_as_objects(tokenizer: Tokenizer) -> None:
    messages = with_arguments('{"city": "Ulm"}')
    for template, wanted in ((TOJSON, '{"city": "Ulm"}'), (ITEMS, "city=Ulm")):
        assert wanted in tokenizer.render_chat(messages, chat_template=template)


@pytest.mark.parametrize(
    "message, plain",
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        (
            {"role": "function", "name": "f", "content": "x"},
            {"role": "tool", "name": "f", "content": "x"},
        ),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        ({"role": "user", "content": ""}, {"role": "user", "content": ""}),
        ({"role": "user", "content": ["a", "b"]}, {"role": "user", "content": "a\nb"}),
        (
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                    {"type": "input_text", "text": "b"},
                    {"text": "c"},
                ],
            },
            {"role": "user", "content": "a\nb\nc"},
        ),
        ({"role": "tool", "content": None}, {"role": "tool", "content": ""}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": "no"},
        ),
        (
            {"role": "assistant", "content": None, "refusal": "no"},
            {"role": "assistant", "content": "no"},
        ),
        (
            {"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": None},
            {"role": "assistant", "content": "x", "reasoning_content": "r"},
        ),
        (
            {"role": "assistant", "content": "x", "tool_calls": [], "function_call": None},
            {"role": "assistant", "content": "x"},
        ),
        (
            {
                "id": 7,
                "role": "assistant",
                "content": "x",
                "audio": None,
                "annotations": [],
                "provider_specific_fields": {"a": [1]},
                "opts": {"visible": False},
            },
            {"role": "assistant", "content": "x"},
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "index": 0,
                        "id": "c",
                        "type": None,
                        "extra": 1,
                        "function": {"name": "f", "arguments": "{}", "x-more": 1},
                    }
                ],
            },
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
                ],
            },
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": CUT}},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": CUT}}],
            },
        ),
    ],
)
def test_a_message_is_converted_for_the_template(
    message: dict[str, Any], plain: dict[str, Any]
) -> None:
    assert plain_messages([USER, message]) == [USER, plain]


def part(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": [fields]}


def call(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [fields]}


@pytest.mark.parametrize(
    "message, error",
    [
        ({"role": "user"}, "messages[0].content is missing"),
        ({"role": "system", "content": None}, "messages[0].content is missing"),
        ({"role": "user", "content": 5}, "messages[0].content=5 must be a string, or a list"),
        ({"role": "user", "content": {"text": "a"}}, "messages[0].content={'text': 'a'} must be"),
        ({"role": "user", "content": "\ud800"}, "messages[0].content holds a lone surrogate"),
        (
            part(type="image_url", image_url={}),
            "messages[0].content[0].type='image_url' is not supported",
        ),
        (
            part(type="input_audio", text="a"),
            "messages[0].content[0].type='input_audio' is not supported",
        ),
        (part(type="text"), "messages[0].content[0].text is missing"),
        (part(type="text", text=5), "messages[0].content[0].text=5 must be a string"),
        (part(type=["text"], text="a"), "messages[0].content[0].type=['text'] is not supported"),
        ({"role": "user", "content": [5]}, "messages[0].content[0]=5 must be {"),
        ({"role": "user", "content": "a", "name": 5}, "messages[0].name=5 must be a string"),
        ({"role": "assistant", "reasoning": 5}, "messages[0].reasoning=5 must be a string"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages[0].audio is not supported"),
        ({"role": "assistant", "tool_calls": 5}, "messages[0].tool_calls=5 must be a list"),
        ({"role": "assistant", "tool_calls": [5]}, "messages[0].tool_calls[0]=5 must be an object"),
        (call(type="custom"), "messages[0].tool_calls[0].type='custom' must be 'function'"),
        (call(), "messages[0].tool_calls[0].function=None must be {"),
        (call(function={}), "messages[0].tool_calls[0].function.name is missing"),
        (
            call(function={"name": "f", "arguments": [5]}),
            "messages[0].tool_calls[0].function.arguments=[5] must be a string",
        ),
    ],
)
def test_an_error_names_the_path_of_the_wrong_value(message: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError) as refused:
        plain_messages([message])
    assert str(refused.value).startswith(error), refused.value


def test_tools_keep_only_the_keys_of_a_function() -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "x-kept": 1}}
    tool = {"type": "function", "function": function}
    noisy = {**tool, "cache_control": {}, "function": {"strict": True, "x-a": 1, **function}}
    bare = {"type": "function", "function": {"name": "g", "description": None}}
    plain_bare = {"type": "function", "function": {"name": "g"}}
    assert plain_tools([noisy, bare, {"name": "own"}]) == [tool, plain_bare, {"name": "own"}]
    assert plain_tools([]) is plain_tools(None) is None


# ---- LLM.chat and the server ---------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
noise: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(["id", "opts", "cache_control", "x-1", "annotations", "refusal"]),
    st.sampled_from([None, []]),
)
parts = st.fixed_dictionaries({"type": st.just("text"), "text": texts})
contents = texts | st.lists(parts, max_size=3)
json_texts = st.sampled_from(['{"a": 1}', CUT, "", "[1]", '"x"', "{}", '{"b": {"c": "é"}}'])
functions = st.fixed_dictionaries(
    {"name": st.just("f"), "arguments": json_texts | st.just({"a": 1}) | st.none()}
)
calls = st.builds(
    lambda function, more: {**more, "id": "c1", "type": "function", "function": function},
    functions,
    noise,
)
said = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user"]), "content": contents},
    optional={"name": texts},
)
answered = st.fixed_dictionaries(
    {"role": st.just("assistant")},
    optional={
        "content": contents | st.none(),
        "reasoning": texts | st.none(),
        "reasoning_content": texts | st.none(),
        "tool_calls": st.lists(calls, max_size=2) | st.none(),
        "function_call": functions | st.none(),
    },
)
results = st.fixed_dictionaries(
    {"role": st.sampled_from(["tool", "function"])},
    optional={"content": contents | st.none(), "tool_call_id": st.just("c1"), "name": texts},
)
messages = st.builds(lambda message, more: {**more, **message}, said | answered | results, noise)
tools = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": texts})},
    optional={"cache_control": st.none()},
)


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(messages=st.lists(messages, min_size=1, max_size=4), tools=st.none() | st.lists(tools))
def test_the_server_renders_every_conversation_as_the_offline_call(
    prints_all: Tokenizer, messages: Sequence[Any], tools: list[Any] | None
) -> None:
    offline = prints_all.render_chat(messages, tools=tools)  # what LLM.chat calls
    body = ChatCompletionRequest.model_validate({"messages": messages, "tools": tools})
    served, ids = asyncio.run(Prompts(prints_all, 4096).render(body))
    assert served == offline
    assert ids == prints_all.encode_batch([offline], add_special_tokens=False)[0]
