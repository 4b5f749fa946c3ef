"""Runs the code of large clients against a server: LiteLLM, LangChain and pydantic-ai.

Each client chats, streams, replays a tool call that `max_tokens` truncated, and requests a
structured output; it must also recognise an overflow of the context. This takes 25 s with the
shipped model on two CPU cores. The script installs nothing and skips a client that is not
installed. In an environment of its own:

    pip install litellm langchain-openai 'pydantic-ai-slim[openai]'
    tpllm serve --device cpu --port 8000 &
    python launch/try_clients.py --url http://127.0.0.1:8000

Prints a table. The exit code is 1 if anything failed. tests/server/test_clients.py tests the
libraries `openai` and `openai-agents`.
"""

import argparse
import json
import os
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

QUESTION = "What is 348 + 44?"
WRONG = "the arguments are no valid JSON; try again"
TRUNCATED = '{"city": "Ul'  # the end of an answer with too few tokens
LONG = "word " * 50_000
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
SUM = {
    "title": "Sum",
    "description": "A sum",
    "type": "object",
    "properties": {"total": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["total"],
    "additionalProperties": False,
}
Checks = dict[str, Callable[[], object]]


def openai_history() -> list[dict[str, Any]]:
    """Return a conversation with a truncated call, as OpenAI's clients keep it."""
    function = {"name": "weather", "arguments": TRUNCATED}
    call = {"id": "call_1", "type": "function", "function": function}
    return [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": WRONG},
    ]


@contextmanager
def must_raise(kind: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def litellm_checks(url: str, model: str) -> Checks:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it is loaded from the network
    import litellm

    litellm.suppress_debug_info = True
    tool = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    schema = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SUM, "strict": True}}

    def ask(content: str = QUESTION, **fields: Any) -> Any:
        messages = fields.pop("messages", [{"role": "user", "content": content}])
        options = {"api_base": url, "api_key": "none", "num_retries": 0, "temperature": 0}
        return litellm.completion(f"openai/{model}", messages, **options, **fields)

    def stream() -> None:
        chunks = list(ask(stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def overflow() -> None:
        for streams in (False, True):
            with must_raise(litellm.ContextWindowExceededError):
                list(ask(LONG, stream=streams))

    def structured() -> None:
        text = ask(response_format=schema, max_tokens=200).choices[0].message.content
        assert 0 <= json.loads(text)["total"] <= 999, text

    def replay() -> None:
        assert ask(messages=openai_history(), tools=[tool], max_tokens=8).usage.completion_tokens

    def chat() -> None:
        assert ask().choices[0].message.content

    return dict(chat=chat, stream=stream, replay=replay, structured=structured, overflow=overflow)


def langchain_checks(url: str, model: str) -> Checks:
    from langchain_core.exceptions import ContextOverflowError
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"model": model, "base_url": url, "api_key": "none", "max_retries": 0}
    llm = ChatOpenAI(temperature=0, max_tokens=200, **options)
    tool = {"name": "weather", "description": "of a city", "parameters": PARAMETERS}
    call = {"type": "invalid_tool_call", "id": "call_1", "name": "weather", "args": TRUNCATED}

    def chat() -> None:
        assert llm.invoke(QUESTION).content

    def stream() -> None:
        assert "".join(str(chunk.content) for chunk in llm.stream(QUESTION))

    def replay() -> None:
        answer = AIMessage("", invalid_tool_calls=[{**call, "error": None}])
        history = [HumanMessage(QUESTION), answer, ToolMessage(WRONG, tool_call_id="call_1")]
        assert llm.bind_tools([tool]).invoke(history).usage_metadata

    def structured() -> None:
        for method in ("json_schema", "function_calling"):
            answer = llm.with_structured_output(SUM, method=method).invoke(QUESTION)
            assert 0 <= answer["total"] <= 999, (method, answer)

    def overflow() -> None:
        with must_raise(ContextOverflowError):
            llm.invoke(LONG)
        with must_raise(ContextOverflowError):
            list(llm.stream(LONG))

    return dict(chat=chat, stream=stream, replay=replay, structured=structured, overflow=overflow)


def pydantic_ai_checks(url: str, model: str) -> Checks:
    from pydantic import BaseModel, Field
    from pydantic_ai import Agent, NativeOutput, Tool, ToolOutput
    from pydantic_ai.exceptions import ModelContextWindowExceededError
    from pydantic_ai.messages import (
        ModelRequest,
        ModelResponse,
        ToolCallPart,
        ToolReturnPart,
        UserPromptPart,
    )
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Sum(BaseModel):
        total: int = Field(ge=0, le=999)

    def weather(city: str) -> str:
        """The weather in a city."""
        return "sun"

    def agent(**options: Any) -> Any:
        provider = OpenAIProvider(base_url=url, api_key="none")
        settings: Any = {"temperature": 0, "max_tokens": 200}
        return Agent(OpenAIChatModel(model, provider=provider), model_settings=settings, **options)

    def chat() -> None:
        assert agent().run_sync(QUESTION).output

    def stream() -> None:
        assert "".join(agent().run_stream_sync(QUESTION).stream_text(delta=True))

    def replay() -> None:
        history = [
            ModelRequest([UserPromptPart(QUESTION)]),
            ModelResponse([ToolCallPart("weather", TRUNCATED, "call_1")]),
            ModelRequest([ToolReturnPart("weather", WRONG, "call_1", outcome="retried")]),
        ]
        asked = agent(tools=[Tool(weather)]).run_sync("Well?", message_history=history)
        assert asked.usage.output_tokens

    def structured() -> None:
        for kind in (NativeOutput, ToolOutput):
            assert 0 <= agent(output_type=kind(Sum)).run_sync(QUESTION).output.total <= 999

    def overflow() -> None:
        with must_raise(ModelContextWindowExceededError):
            agent().run_sync(LONG)

    return dict(chat=chat, stream=stream, replay=replay, structured=structured, overflow=overflow)


CLIENTS: dict[str, Callable[[str, str], Checks]] = {
    "litellm": litellm_checks,
    "langchain-openai": langchain_checks,
    "pydantic-ai": pydantic_ai_checks,
}


def try_client(make: Callable[[str, str], Checks], url: str, model: str) -> dict[str, str]:
    """Return the result of each check: "ok", or the error."""
    results = {}
    for name, check in make(url, model).items():
        try:
            check()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            results[name] = "ok"
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    url = parser.parse_args().url.rstrip("/").removesuffix("/v1") + "/v1"
    with urllib.request.urlopen(f"{url}/models", timeout=30) as answer:  # noqa: S310
        model = json.load(answer)["data"][0]["id"]
    failed = False
    for client, make in CLIENTS.items():
        try:
            results = try_client(make, url, model)
        except ImportError as error:
            print(f"{client:18} not installed ({error})")
            continue
        for check, result in results.items():
            print(f"{client:18} {check:12} {result}", flush=True)
            failed |= result != "ok"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
