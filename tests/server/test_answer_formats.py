"""The formats of each family are parsed alike as a whole and in any pieces."""

import json
import random

import pytest

from tests.server.test_answer_parser import cut_up, taken_apart
from tpllm.server.answer_formats import TOOL_FORMATS, always_reasons, tool_format
from tpllm.server.answer_pieces import Thinking
from tpllm.server.protocol import ChatCompletionRequest
from tpllm.server.settings import ServerSettings
from tpllm.server.structured import structured_outputs

PARIS, ROME = '{"city": "Paris, [France] {é}"}', '{"city": "Ro\\"me;"}'
BOTH = [("get_weather", PARIS), ("get_time", ROME)]
FIRST = BOTH[:1]


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


LLAMA = [call(*each, "parameters") for each in BOTH]
PLAIN = [call(*each) for each in BOTH]
TAG = "<|python_tag|>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
# format, text, content, calls
EXAMPLES = [
    ("hermes", "".join(f"<tool_call>\n{each}\n</tool_call>\n" for each in PLAIN), "", BOTH),
    ("hermes", f"Let me see.\n<tool_call>\n{PLAIN[0]}\n</tool_call>", "Let me see.", FIRST),
    ("llama3_json", LLAMA[0], "", FIRST),
    ("llama3_json", f"\n\n{PLAIN[0]}\n", "", FIRST),
    ("llama3_json", "; ".join(LLAMA), "", BOTH),
    ("llama3_json", f"{TAG}{LLAMA[0]};{LLAMA[1]}", "", BOTH),
    ("llama3_json", f"I look. {TAG}{LLAMA[0]}", "I look.", FIRST),
    ("llama3_json", f'{{"type": "function", {LLAMA[0][1:]}', "", FIRST),
    ("llama3_json", f'{{"parameters": {PARIS}, "name": "get_weather"}}', "", FIRST),
    ("llama3_json", '{"name": "Bob", "age": {"years": 3}}', None, []),
    ("llama3_json", f"{TAG}print(1)", None, []),
    ("llama3_json", f"As JSON: {LLAMA[0]}", None, []),
    ("llama3_json", "{not JSON; at all}", None, []),
    ("mistral", f"[TOOL_CALLS] [{', '.join(PLAIN)}]", "", BOTH),
    ("mistral", f"[TOOL_CALLS][{PLAIN[0]}]", "", FIRST),
    ("mistral", f"[TOOL_CALLS] {PLAIN[0]}", "", FIRST),
    ("mistral", f'[TOOL_CALLS] [{{"arguments": {PARIS}, "name": "get_weather"}}]', "", FIRST),
    ("mistral", f"I look.[TOOL_CALLS]get_weather[ARGS]{PARIS}", "I look.", FIRST),
    ("mistral", "".join(f"[TOOL_CALLS]{n}[ARGS]{a}" for n, a in BOTH), "", BOTH),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{PARIS}", "", FIRST),
    ("mistral", f"[TOOL_CALLS][TOOL_CALLS]get_weather{PARIS}", "[TOOL_CALLS]", FIRST),
    ("mistral", "The tag [TOOL_CALLS] begins calls [1, 2].", None, []),
    ("mistral", '[{"name": "f", "arguments": {}}]', None, []),
]


@pytest.mark.parametrize("name, text, content, calls", EXAMPLES)
def test_examples_are_parsed_at_every_split(name, text, content, calls):
    expected = ("", text if content is None else content, calls)
    rng = random.Random(0)
    splits = [[text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))]
    splits += [cut_up(text, [rng.randint(1, 12) for _ in range(20)]) for _ in range(100)]
    for parts in splits:
        assert taken_apart(parts, tools=TOOL_FORMATS[name]) == expected
        if name == "llama3_json":
            thought = taken_apart(["<think>a</think>", *parts], tools=TOOL_FORMATS[name])
            assert thought == ("a", expected[1].lstrip(), calls)


# `{"name": "Bob"`, truncated there, looks like a call
@pytest.mark.parametrize("name, text, content, calls", [e for e in EXAMPLES if "Bob" not in e[1]])
def test_a_truncated_example_is_parsed_at_every_split(name, text, content, calls):
    for length in range(len(text)):
        shown = text[:length]
        whole = taken_apart([shown], tools=TOOL_FORMATS[name], is_cut=True)
        assert taken_apart(list(shown), tools=TOOL_FORMATS[name], is_cut=True) == whole
        _, _, found = whole
        assert [each[0] for each in found] == [each[0] for each in calls][: len(found)]
        for (_, got), (_, arguments) in zip(found, calls, strict=False):
            assert arguments.startswith(got)


@pytest.mark.parametrize(
    "text, reasoning, content",
    [
        ("why\n</think>\n\nso", "why", "so"),
        ("<think>\nwhy</think>so", "why", "so"),
        ("why <think> not", "why <think> not", ""),
        ("<thi", "<thi", ""),
    ],
)
def test_deepseek_r1_reasons_without_a_tag(text, reasoning, content):
    for i in range(len(text)):
        assert taken_apart([text[:i], text[i:]], Thinking.ALWAYS) == (reasoning, content, [])
    assert Thinking.after(ASSISTANT, always=True) is Thinking.ALWAYS
    assert Thinking.after(f"{ASSISTANT}<think>\n", always=True) is Thinking.OPEN


def test_the_chat_template_chooses_the_formats():
    llama = '<|start_header_id|> {"name": function name, "parameters": dictionary}'
    deepseek = "{% set content = content.split('</think>')[-1] %}" + ASSISTANT
    for template, name in [("[TOOL_CALLS] [", "mistral"), (llama, "llama3_json"), ("", "hermes")]:
        assert tool_format("auto", template) is TOOL_FORMATS[name]
        assert tool_format("mistral", template) is TOOL_FORMATS["mistral"]
    assert always_reasons("auto", deepseek) and not always_reasons("qwen3", deepseek)
    assert always_reasons("deepseek_r1", "") and not always_reasons("auto", "<think></think>")


@pytest.mark.parametrize("setting", ["tool_call_parser", "reasoning_parser"])
def test_an_unknown_parser_is_refused_with_the_known_names(setting):
    known = "llama3_json.*mistral" if setting == "tool_call_parser" else "qwen3.*deepseek_r1"
    with pytest.raises(ValueError, match=f"{setting}='pythonic'.*{known}"):
        ServerSettings(**{setting: "pythonic"})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_forced_call_is_what_the_parser_reads(name):
    from llguidance import LLMatcher, LLTokenizer

    tools = [{"type": "function", "function": {"name": n, "parameters": SCHEMA}} for n, _ in BOTH]
    request = {"messages": [{"role": "user", "content": ""}], "tools": tools}
    body = ChatCompletionRequest.model_validate({**request, "tool_choice": "required"})
    form = TOOL_FORMATS[name]
    params = structured_outputs(body, form)
    assert params is not None and isinstance(params.grammar, str)
    calls = [form.call.replace("*", json.dumps(n), 1).replace("*", a, 1) for n, a in BOTH]
    text = form.answer.replace("*", form.between.join(calls))
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(params.grammar))
    assert matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting()
    assert taken_apart(list(text), tools=form, only_calls=True) == ("", "", BOTH)


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
