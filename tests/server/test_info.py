"""Models, tokenizer, health, metrics and version."""

import asyncio
import re
import threading

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

import tpllm
from tests.leaks import wait_until
from tests.server.conftest import Served, running_server
from tests.server.fake_engine import FakeEngine
from tests.server.test_http import CHAT, HELLO, error_of
from tpllm.engine.stats import EngineStats
from tpllm.server import info


def test_the_model_is_listed_under_each_of_its_names() -> None:
    with running_server(served_model_name=["big", "qwen/small"]) as served:
        with served.openai() as client:
            assert [model.id for model in client.models.list()] == ["big", "qwen/small"]
            assert client.models.retrieve("qwen/small").id == "qwen/small"
            for name in ("big", "qwen/small"):
                assert client.completions.create(model=name, prompt="x").model == "big"
        with served.http() as http:
            card = http.get("/v1/models").json()["data"][0]
            assert card["root"] == "fake" and card["max_model_len"] == 2000
            error_of(http.get("/v1/models/fake"), 404)


def test_a_text_and_a_chat_are_tokenized(http: httpx.Client, served: Served) -> None:
    answer = http.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
    assert answer == {
        "count": 2,
        "max_model_len": 2000,
        "tokens": [97, 98],
        "token_strs": ["a", "b"],
    }
    answer = http.post("/tokenize", json=HELLO).json()
    assert served.engine.tokenizer.decode(answer["tokens"]) == "<user>hello\n"
    assert answer["token_strs"] is None
    neither = http.post("/tokenize", json={})
    assert "either prompt" in error_of(neither, 400)["message"]


def test_tokens_are_decoded_to_text(http: httpx.Client) -> None:
    assert http.post("/detokenize", json={"tokens": [97, 233]}).json() == {"prompt": "aé"}
    for tokens, message in (([1, -1], "tokens holds -1;"), ([2**40], f"tokens holds {2**40};")):
        error = error_of(http.post("/detokenize", json={"tokens": tokens}), 400)
        assert error["message"].startswith(message)


def test_long_texts_are_tokenized_in_a_thread_that_ends_with_the_server() -> None:
    text = "x" * 100_000
    with running_server() as served, served.http() as http:
        answer = http.post("/tokenize", json={"prompt": text}).json()
        assert answer["count"] == 100_000
        tokens = {"tokens": answer["tokens"]}
        assert http.post("/detokenize", json=tokens).json()["prompt"] == text
        names = [thread.name for thread in threading.enumerate()]
        assert any(name.startswith("tpllm-server-tokenizer") for name in names)


def test_health_shows_every_rank(http: httpx.Client) -> None:
    response = http.get("/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "model": "fake",
        "ranks": [{"rank": i, "pid": 7 + i, "phase": "serving", "alive": True} for i in (0, 1)],
    }


def test_an_engine_in_a_long_step_is_busy(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(self: FakeEngine) -> EngineStats:
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(info, "HEALTH_TIMEOUT_S", 0.05)
    monkeypatch.setattr(info, "STATS_TIMEOUT_S", 0.05)
    monkeypatch.setattr(FakeEngine, "stats", late)
    response = http.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "busy", "model": "fake", "ranks": []}
    assert "tpllm_engine_up 1.0" in http.get("/metrics").text


def test_a_closed_engine_is_down(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def closed(self: FakeEngine) -> EngineStats:
        raise RuntimeError("this AsyncLLM is closed; make a new one")

    monkeypatch.setattr(FakeEngine, "stats", closed)
    response = http.get("/health")
    assert response.status_code == 503
    assert response.json()["status"].endswith("this AsyncLLM is closed; make a new one")
    assert "tpllm_engine_up 0.0" in http.get("/metrics").text


def test_the_version_is_the_packages(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": tpllm.__version__}


def test_metrics_count_requests_and_tokens(
    http: httpx.Client, client: OpenAI, served: Served
) -> None:
    def values() -> dict[str, float]:
        text = http.get("/metrics").text
        return {
            sample.name + "".join(f" {v}" for _, v in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = values()
    assert before["tpllm_engine_up"] == before["tpllm_rank_up 1"] == 1
    assert before["tpllm_kv_cache_usage_ratio"] == before["tpllm_prefix_cache_hit_ratio"] == 0.25
    assert before["tpllm_preemptions_total"] == 2
    steps = {
        bound: before[f"tpllm_step_seconds_bucket {bound}"] for bound in ("0.01", "1.0", "+Inf")
    }
    assert steps == {"0.01": 60, "1.0": 99, "+Inf": 99}
    assert (before["tpllm_step_seconds_count"], before["tpllm_step_seconds_sum"]) == (99, 1.25)
    served.engine.reply = "abcdefg"
    list(client.completions.create(model="fake", prompt="x", n=2, stream=True))
    http.post("/v1/completions", json={"n": 0})
    key = "tpllm_requests_total {} /v1/completions"

    def gained(name: str) -> float:
        return values().get(name, 0) - before.get(name, 0)

    assert wait_until(lambda: gained(key.format("invalid")) == 1)
    assert gained(key.format("ok")) == 1
    assert gained("tpllm_time_to_first_token_seconds_count") == 2
    assert gained("tpllm_inter_token_seconds_count") == 4
    assert gained("tpllm_request_seconds_count") == 1
    assert gained("tpllm_generated_tokens_total") == 14
    served.hold()
    with served.connect() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
            b'content-length: 15\r\n\r\n{"prompt": "x"}'
        )
        assert wait_until(lambda: values()["tpllm_sequences_running"] == 1)
    assert wait_until(lambda: gained(key.format("client_gone")) == 1)
    served.go_on()


def test_the_openapi_document_describes_the_endpoints(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert {"/v1/completions", CHAT, "/tokenize", "/health", "/metrics"} <= set(document["paths"])
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "tools", "top_k", "chat_template_kwargs"} <= set(fields)
    for path, status in ((CHAT, "400"), (CHAT, "429"), ("/health", "503")):
        (operation,) = document["paths"][path].values()
        assert "422" not in operation["responses"]
        content = operation["responses"][status]["content"]["application/json"]
        assert content["schema"] == {"$ref": "#/components/schemas/ErrorBody"}
    # the pages that show it would load scripts from other sites
    assert http.get("/docs").status_code == http.get("/redoc").status_code == 404


def test_the_page_loads_nothing_and_connects_only_to_this_server(http: httpx.Client) -> None:
    response = http.get("/")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "connect-src 'self'" in policy
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)\w""", response.text)
    assert "http://" not in response.text.replace("http://www.w3.org/", "")
    assert "https://" not in response.text


@pytest.mark.parametrize("path, status", [("/", 404), ("/health", 200)])
def test_the_page_can_be_disabled(path: str, status: int) -> None:
    with running_server(page=False) as served, served.http() as http:
        assert http.get(path).status_code == status
