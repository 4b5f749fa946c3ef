"""OpenAI's own Python libraries against a server of the shipped model."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    RunConfig,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI, BadRequestError, DefaultAsyncHttpxClient, OpenAI
from pydantic import BaseModel, Field

from tests.server.conftest import Served, running_server
from tpllm import AsyncLLM

pytestmark = pytest.mark.usefixtures("forked_engines")

QUESTION: list[Any] = [{"role": "user", "content": "What is 348 + 44?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "minLength": 60, "maxLength": 80}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
LONG: list[Any] = [{"role": "user", "content": "日" * 2000}]  # of several tokens each
CONTEXT = "This model's maximum context length is 4096 tokens"


class Sum(BaseModel):
    total: int = Field(ge=0, le=999)


@pytest.fixture(scope="module")
def real(forked_engines: None) -> Iterator[Served]:
    def engine() -> AsyncLLM:
        return AsyncLLM(device="cpu", num_kv_blocks=300, max_num_seqs=8)

    with running_server(engine, served_model_name="tiny") as served:
        with served.http() as http:  # starts the sandbox process, which stays
            form = {"structured_outputs": {"regex": "a"}}
            http.post("/v1/completions", json={"prompt": "x", **form}).raise_for_status()
        yield served


@pytest.fixture
def client(real: Served) -> Iterator[OpenAI]:
    with real.openai() as client:
        yield client


# ---- openai --------------------------------------------------------------------------------------


def test_openai_chats_whole_and_streamed(client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "temperature": 0}
    answer = client.chat.completions.create(**fields)
    assert answer.choices[0].message.content == "392"
    with client.chat.completions.stream(**fields) as stream:
        assert [event.delta for event in stream if event.type == "content.delta"] != []
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "392"
    assert final.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_openai_replays_a_truncated_tool_call(client: OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": QUESTION,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 30,
        "seed": 1,
    }
    if stream:
        with client.chat.completions.stream(**fields) as events:
            for _ in events:
                pass
            snapshot: Any = events.current_completion_snapshot
        [choice] = snapshot.choices
    else:
        [choice] = client.chat.completions.create(**fields).choices
    assert choice.finish_reason == "length"
    [call] = choice.message.tool_calls
    assert call.function.name == "weather"
    assert call.function.arguments.startswith("{") and "}" not in call.function.arguments
    result: Any = {
        "role": "tool",
        "tool_call_id": call.id,
        "content": "arguments were cut; try again",
    }
    message = choice.message.model_dump(exclude_none=True)
    again = client.chat.completions.create(
        model="tiny", messages=[*QUESTION, message, result], tools=[TOOL], max_tokens=4
    )
    assert again.usage is not None and again.usage.completion_tokens > 0


def test_openai_parses_an_answer_into_its_type(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=QUESTION, response_format=Sum, temperature=0, max_tokens=200
    )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None and 0 <= parsed.total <= 999


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_recognizes_an_overflow(client: OpenAI, stream: bool) -> None:
    for fields, param in (
        ({"messages": LONG}, "messages"),
        ({"messages": QUESTION, "max_tokens": 10**6}, "max_tokens"),
        ({"messages": QUESTION, "max_completion_tokens": 4090}, "max_completion_tokens"),
    ):
        create: Any = client.chat.completions.create
        with pytest.raises(BadRequestError) as refused:
            create(model="tiny", stream=stream, **fields)
        error: Any = refused.value
        assert (error.code, error.param) == ("context_length_exceeded", param)
        assert error.body["message"].startswith(CONTEXT)


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"extra_body": {"stop_token_ids": [4096]}}, "stop_token_ids"),
        ({"extra_body": {"allowed_token_ids": [1, 4096]}}, "allowed_token_ids"),
        ({"stop": [""]}, "stop[0]"),
    ],
)
def test_what_the_engine_refuses_blames_the_field(
    client: OpenAI, fields: dict[str, Any], param: str
) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(BadRequestError) as refused:
        create(model="tiny", messages=QUESTION, **fields)
    assert refused.value.param == param, refused.value


def test_a_token_id_beyond_the_vocabulary_is_the_prompts(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="tiny", prompt=[1, 4096])
    assert refused.value.param == "prompt"


def test_bytes_of_log_probabilities_make_the_text(client: OpenAI) -> None:
    text = "naïve 😀 日本語"
    answer = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
        extra_body={"structured_outputs": {"choice": [text]}},
    )
    [choice] = answer.choices
    assert choice.message.content == text
    assert choice.logprobs is not None and choice.logprobs.content is not None
    data = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert data.startswith(text.encode())
    assert all(top.bytes for entry in choice.logprobs.content for top in entry.top_logprobs)


# ---- openai-agents -------------------------------------------------------------------------------


@asynccontextmanager
async def agents_model(real: Served) -> AsyncIterator[OpenAIChatCompletionsModel]:
    http = DefaultAsyncHttpxClient(verify=False)
    url = f"{real.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=http) as client:
        yield OpenAIChatCompletionsModel("tiny", client)


UNTRACED = RunConfig(tracing_disabled=True)
GREEDY = ModelSettings(temperature=0, max_tokens=200)


async def run(real: Served, question: str = QUESTION[0]["content"], **options: Any) -> Any:
    async with agents_model(real) as model:
        options = {"model_settings": GREEDY, **options}
        agent: Agent[Any] = Agent("helper", model=model, **options)
        return await Runner.run(agent, question, run_config=UNTRACED, max_turns=4)


def test_agents_answer_whole_and_streamed(real: Served) -> None:
    assert asyncio.run(run(real)).final_output == "392"

    async def streamed() -> Any:
        async with agents_model(real) as model:
            agent: Agent[Any] = Agent("helper", model=model, model_settings=GREEDY)
            result = Runner.run_streamed(agent, QUESTION[0]["content"], run_config=UNTRACED)
            kinds = [event.type async for event in result.stream_events()]
            return result.final_output, kinds

    output, kinds = asyncio.run(streamed())
    assert output == "392" and "raw_response_event" in kinds


@pytest.mark.parametrize("max_tokens", [30, 100])
def test_agents_continue_after_a_complete_or_truncated_tool_call(
    real: Served, max_tokens: int
) -> None:
    called: list[str] = []

    @function_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        called.append(city)
        return "sun"

    settings = ModelSettings(
        temperature=1, max_tokens=max_tokens, tool_choice="required", extra_body={"seed": 2}
    )
    lengths = {"minLength": 80} if max_tokens == 30 else {"maxLength": 8}
    weather.params_json_schema["properties"]["city"].update(lengths)
    result = asyncio.run(run(real, tools=[weather], model_settings=settings))
    kinds = [item.type for item in result.new_items]
    assert kinds[0] == "tool_call_item" and kinds[-1] == "message_output_item"
    assert len(called) == (max_tokens == 100)  # a truncated call is reported to the model instead


def test_agents_get_an_output_of_their_type(real: Served) -> None:
    result = asyncio.run(run(real, output_type=Sum))
    assert 0 <= result.final_output.total <= 999


def test_agents_recognize_an_overflow(real: Served) -> None:
    with pytest.raises(BadRequestError) as refused:
        asyncio.run(run(real, LONG[0]["content"]))
    assert refused.value.code == "context_length_exceeded"
