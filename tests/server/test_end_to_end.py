"""`run` with the shipped model, in a process of its own: from its first line to its exit code."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import APIError, BadRequestError, DefaultHttpxClient, OpenAI

from tests.leaks import is_running, wait_until
from tests.reference import TIE, shipped_greedy
from tests.scripts import ROOT
from tpllm.config.checkpoint import resolve_model
from tpllm.text.tokenizer import Tokenizer

PROGRAM = """
import sys
from tpllm.server import ServerSettings, run
settings = dict(device="cpu", tensor_parallel_size=2, num_kv_blocks=80, max_num_seqs=8)
sys.exit(run(None, settings, ServerSettings(port=0, served_model_name="tiny")))
"""
QUESTION: list[Any] = [{"role": "user", "content": "What is 12 + 7?"}]


class Server:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        self.log = ""
        for line in self.process.stderr:
            self.log += line
            if found := re.search(r"(http://127\.0\.0\.1:\d+) serves tiny", line):
                self.url = found[1]
                return
        raise AssertionError(f"the server ended:\n{self.log}")

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, verify=False)

    def end(self, number: int | None = None) -> int:
        """Send a signal, and return the exit code."""
        if number is not None:
            self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=60)
        self.log += rest
        return self.process.returncode

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    try:
        with server.http() as http:  # the sandbox process is started before any test
            body = {"prompt": "a", "max_tokens": 1, "guided_regex": "a"}
            assert http.post("/v1/completions", json=body).status_code == 200
        yield server
        if server.process.poll() is None:  # the last test has been deselected
            assert server.end(signal.SIGTERM) == 0, server.log
    finally:
        server.kill()


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    http = DefaultHttpxClient(verify=False)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http) as client:
        yield client


def test_greedy_completions_are_those_of_transformers(client: OpenAI) -> None:
    references = shipped_greedy()[:4]
    answer = client.completions.create(
        model="tiny",
        prompt=[reference.prompt_ids for reference in references],
        temperature=0,
        max_tokens=32,
        extra_body={"ignore_eos": True},
        logprobs=0,
    )
    text_of = Tokenizer(resolve_model(None)).decode_one
    for reference, choice in zip(references, answer.choices, strict=True):
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        wanted = [text_of(token_id) for token_id in reference.output_ids[:32]]
        differ = [i for i in range(32) if choice.logprobs.tokens[i] != wanted[i]]
        assert not differ or reference.margins[differ[0]] < TIE
    again = client.completions.create(
        model="tiny",
        prompt=references[0].prompt_ids,
        temperature=0,
        max_tokens=32,
        extra_body={"ignore_eos": True},
        stream=True,
    )
    assert "".join(chunk.choices[0].text for chunk in again) == answer.choices[0].text


def test_a_chat_is_the_same_streamed_and_whole(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0)
    text = whole.choices[0].message.content
    assert text
    stream = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == text
    assert whole.choices[0].finish_reason == "stop"
    two = client.chat.completions.create(
        model="tiny", messages=QUESTION, n=2, seed=3, temperature=20, max_tokens=20
    )
    assert len({choice.message.content for choice in two.choices}) == 2


def test_a_stop_string_and_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="Psalms 23\n1 The LORD is my shepherd;", temperature=0, stop="want"
    )
    assert answer.choices[0].text == " I shall not "
    chat = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_tokens=4
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    for entry in chat.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["sum"],
    "additionalProperties": False,
}


def test_an_answer_follows_its_constraint(client: OpenAI) -> None:
    described: Any = {"name": "sum", "schema": SCHEMA, "strict": True}
    answer = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        temperature=1,
        max_tokens=400,
        response_format={"type": "json_schema", "json_schema": described},
    )
    content = answer.choices[0].message.content
    assert content is not None
    assert 0 <= json.loads(content)["sum"] <= 99
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
    stream = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        tools=[tool],
        tool_choice="required",
        stream=True,
        parallel_tool_calls=False,
    )
    calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    functions = [call.function for call in calls if call.function is not None]
    assert functions[0].name == "add"
    arguments = "".join(each.arguments or "" for each in functions)
    assert 0 <= json.loads(arguments)["sum"] <= 99
    for streams in (False, True):
        with pytest.raises(BadRequestError, match="guided_regex: its value cannot be used"):
            client.chat.completions.create(
                model="tiny",
                messages=QUESTION,
                stream=streams,
                extra_body={"guided_regex": "(a"},
            )


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "now"}}])
def test_forced_calls_are_json_wherever_they_are_truncated(client: OpenAI, choice: Any) -> None:
    tools: Any = [
        {"type": "function", "function": {"name": "now"}},
        {"type": "function", "function": {"name": "add", "parameters": SCHEMA}},
    ]

    def ask(**fields: Any) -> Any:
        return client.chat.completions.create(
            model="tiny", messages=QUESTION, tools=tools, tool_choice=choice, seed=1, **fields
        )

    whole = ask(temperature=1, parallel_tool_calls=False).choices[0]
    assert whole.finish_reason == ("tool_calls" if choice == "required" else "stop")
    [call] = whole.message.tool_calls
    assert isinstance(json.loads(call.function.arguments), dict)
    for max_tokens in (1, 9, 17, 26):
        cut = ask(temperature=1, parallel_tool_calls=False, max_tokens=max_tokens).choices[0]
        assert cut.finish_reason == "length" and not cut.message.content
        for each in cut.message.tool_calls or []:
            assert each.function.name == call.function.name
            assert call.function.arguments.startswith(each.function.arguments)


def test_an_echo_scores_its_prompt(server: Server) -> None:
    with server.http() as http:
        body = {"prompt": "The LORD is my shepherd", "echo": True, "logprobs": 1, "max_tokens": 0}
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == body["prompt"]
    assert "".join(choice["logprobs"]["tokens"]) == body["prompt"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])


@pytest.mark.parametrize(
    "body, message",
    [
        ({"prompt": [999999]}, "999999"),
        ({"prompt": "x", "logit_bias": {"999999": 1}}, "999999"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_what_the_engine_refuses_is_a_bad_request(
    server: Server, body: dict[str, Any], message: str
) -> None:
    with server.http() as http:
        for stream in (False, True):
            response = http.post("/v1/completions", json={**body, "stream": stream})
            assert response.status_code == 400, response.text
            assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_invalid_constraint_is_blamed_on_the_field_that_was_sent(
    server: Server, stream: bool
) -> None:
    wrong = {"type": "strin"}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": wrong}}
    parameters = {"type": "object", "properties": {"a": wrong}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    fields: dict[str, dict[str, Any]] = {
        "response_format": {"response_format": schema},
        "tools[0].function.parameters": {"tool_choice": "required", "tools": [tool]},
    }
    with server.http() as http:
        for field, sent in fields.items():
            body = {"messages": QUESTION, "stream": stream, **sent}
            response = http.post("/v1/chat/completions", json=body)
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert error["param"] == field
            assert error["message"].startswith(f"{field}: ") and "strin" in error["message"]
            assert "start:" not in error["message"] and "arguments_0" not in error["message"]


def test_a_request_without_a_next_token_is_an_error_whole_and_streamed(client: OpenAI) -> None:
    ids = Tokenizer(resolve_model(None)).encode_batch(["f"], add_special_tokens=False)[0]
    extra = {"structured_outputs": {"choice": ["foobar"]}, "allowed_token_ids": ids}
    with pytest.raises(BadRequestError, match="leave no next token"):
        client.chat.completions.create(model="tiny", messages=QUESTION, extra_body=extra)
    with pytest.raises(APIError, match="leave no next token"):
        for chunk in client.chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, extra_body=extra
        ):
            assert not chunk.choices or chunk.choices[0].finish_reason is None


def test_a_client_that_hangs_up_leaves_the_engine_idle(server: Server) -> None:
    def running(http: httpx.Client) -> float:
        found = re.search(r"^tpllm_sequences_running (\S+)", http.get("/metrics").text, re.M)
        assert found is not None
        return float(found[1])

    body = {"messages": QUESTION, "stream": True, "ignore_eos": True, "max_tokens": 1200}
    with server.http() as http:
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["object"].endswith(".chunk")
            assert running(http) == 1
        assert wait_until(lambda: running(http) == 0)


def test_tools_and_templates_options_reach_the_template(server: Server) -> None:
    with server.http() as http:
        body = {"messages": QUESTION, "chat_template_kwargs": {"enable_thinking": False}}
        tokens = http.post("/tokenize", json=body).json()["tokens"]
        text = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        assert text == "<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<|im_start|>assistant\n"
        for name in ("chat_template", "tokenize", "messages"):
            hostile = {"messages": QUESTION, "chat_template_kwargs": {name: "{{ 1 }}"}}
            response = http.post("/v1/chat/completions", json=hostile)
            assert response.status_code == 400, response.text


def test_health_and_metrics_are_the_engines(server: Server) -> None:
    with server.http() as http:
        body = {"prompt": "x", "max_tokens": 9, "ignore_eos": True}
        assert http.post("/v1/completions", json=body).status_code == 200
        health = http.get("/health").json()
        metrics = http.get("/metrics").text
    assert health["status"] == "ok"
    assert [rank["rank"] for rank in health["ranks"]] == [0, 1]
    assert all(rank["alive"] and is_running(rank["pid"]) for rank in health["ranks"])
    values = dict(re.findall(r"^(tpllm_[a-z_]+)(?:\{rank=\"1\"\})? (\S+)$", metrics, re.M))
    assert float(values["tpllm_generated_tokens_total"]) >= 9
    assert float(values["tpllm_steps_total"]) >= 9
    assert float(values["tpllm_rank_up"]) == 1


def test_a_worker_that_dies_ends_the_server_with_its_reason(server: Server) -> None:
    """The last of these tests: each start of an engine takes seconds."""
    with server.http() as http:
        pid = http.get("/health").json()["ranks"][1]["pid"]
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: server.process.poll() is not None)
    assert server.end() == 1
    assert "the engine has failed" in server.log and "rank 1" in server.log
