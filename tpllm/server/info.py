"""Endpoints for the model's card, health, metrics and version, and the tokenizer's endpoints."""

import asyncio
from collections.abc import Iterable
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.utils import floatToGoString
from starlette.requests import Request
from starlette.responses import Response

import tpllm
from tpllm.checks import MAX_INT32
from tpllm.server.errors import engine_failed, invalid, to_json
from tpllm.server.protocol import DetokenizeRequest, TokenizeRequest
from tpllm.server.service import Service

STATS_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 0.5  # probes wait at most a second
WORKING = ("ok", "busy")


def json_response(content: object, status: int = 200) -> Response:
    return Response(to_json(content), status, media_type="application/json")


async def models(service: Service) -> Response:
    """List the model under each of its names."""
    return json_response(
        {"object": "list", "data": [_card(service, n) for n in service.model_names]}
    )


async def model(service: Service, name: str) -> Response:
    """Describe the model if it has this name."""
    service.check_model(name)
    return json_response(_card(service, name))


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "tpllm",
        "root": service.engine.config.model or service.engine.config.model_config.name,
        "parent": None,
        "max_model_len": service.engine.config.max_model_len,
    }


async def version(service: Service) -> Response:
    """Return the version of tpllm."""
    return json_response({"version": tpllm.__version__})


async def tokenize(service: Service, body: TokenizeRequest) -> Response:
    """Encode a text or a conversation, in vLLM's format."""
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt, a string, or messages, a conversation")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        ids = (await service.prompts.encode([body.prompt], special))[0]
    else:
        _, ids = await service.prompts.render(body)
    texts = await service.prompts.token_texts(ids) if body.return_token_strs else None
    limit = service.engine.config.max_model_len
    content = {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts}
    return json_response(content)


async def detokenize(service: Service, body: DetokenizeRequest) -> Response:
    """Decode token ids, in vLLM's format."""
    service.check_model(body.model)
    ids = body.tokens
    if ids and not 0 <= min(ids) <= max(ids) <= MAX_INT32:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise invalid(f"tokens holds {wrong}; ids are at least 0 and at most {MAX_INT32}")
    return json_response({"prompt": await service.prompts.decode(ids)})


async def health(service: Service, request: Request) -> Response:
    """Return 200 while the engine accepts requests, otherwise 503.

    If the engine does not reply in time, it is in a long step, and the status is "busy". A step
    that never ends makes the engine fail at its own deadline. Clients without the key only get
    "ok" or "unavailable"; others also get every rank's state.
    """
    error, stats = await _ask(service, HEALTH_TIMEOUT_S)
    status, ranks = "ok", []
    if error is not None:
        status = engine_failed(error).message
    elif stats is None:
        status = "busy"
    else:
        ranks = [dict(rank) for rank in stats.health]
        if not all(rank["alive"] for rank in ranks):
            status = "a rank has ended"
    if status in WORKING and service.admission.draining:
        status = "shutting down"
    content: dict[str, Any] = {"status": status, "model": service.model_name, "ranks": ranks}
    if not request.state.knows_key:
        content = {"status": "ok" if status in WORKING else "unavailable"}
    return json_response(content, 200 if status in WORKING else 503)


async def metrics(service: Service) -> Response:
    """Return metrics for Prometheus. Once the engine has failed, its own are missing."""
    error, stats = await _ask(service, STATS_TIMEOUT_S)
    families = list(_families(service, error is None, stats))
    return Response(service.metrics.text(families), media_type=CONTENT_TYPE_LATEST)


async def _ask(service: Service, timeout_s: float) -> tuple[BaseException | None, Any | None]:
    """Return the engine's error, or None, and its statistics, or None if they are not available."""
    error = service.engine.dead_error
    if error is None:
        try:
            async with asyncio.timeout(timeout_s):
                return None, await service.engine.stats()
        except TimeoutError:  # the engine is in a long step
            pass
        except RuntimeError as raised:  # the engine is closed, or has just failed
            error = raised
    return error, None


def _families(service: Service, is_up: bool, stats: Any | None) -> Iterable[Metric]:
    def gauge(name: str, words: str, value: float) -> Metric:
        return GaugeMetricFamily(f"tpllm_{name}", words, value=value)

    def counter(name: str, words: str, value: float) -> Metric:
        return CounterMetricFamily(f"tpllm_{name}", words, value=value)

    yield gauge("engine_up", "1 while the engine runs, 0 once it has failed", is_up)
    yield gauge(
        "server_sequences",
        "Sequences in the server: running, waiting, or in answers that are being sent",
        service.admission.num_seqs,
    )
    yield gauge("server_draining", "1 while the server shuts down", service.admission.draining)
    limit = service.engine.config.max_num_seqs
    yield gauge("max_num_seqs", "Sequences that can run at the same time", limit)
    if stats is None:
        return
    yield gauge("sequences_running", "Sequences that the engine runs", stats.num_running)
    yield gauge("sequences_waiting", "Sequences that wait in the engine", stats.num_waiting)
    yield gauge("kv_cache_usage_ratio", "Share of the KV cache in use", stats.kv_cache_usage)
    prompt, cached = stats.num_prompt_tokens, stats.num_cached_tokens
    yield counter("prompt_tokens", "Tokens of prompts", prompt)
    yield counter("cached_prompt_tokens", "Of these, tokens that the prefix cache had", cached)
    yield gauge(
        "prefix_cache_hit_ratio",
        "Share of all prompt tokens that the prefix cache had",
        cached / prompt if prompt else 0.0,
    )
    yield counter("generated_tokens", "Tokens generated", stats.num_generated_tokens)
    yield counter("preemptions", "Preempted sequences", stats.num_preemptions)
    yield counter("steps", "Steps of the engine", stats.num_steps)
    yield HistogramMetricFamily(
        "tpllm_step_seconds",
        "From one step's result to the next one's",
        [(floatToGoString(bound), num_steps) for bound, num_steps in stats.step_buckets],
        stats.step_s,
    )
    seconds = CounterMetricFamily(
        "tpllm_coordinator_seconds", "Time of the coordinator, by part of a step", labels=["part"]
    )
    for part in ("schedule", "broadcast", "wait", "collect"):
        seconds.add_metric([part], getattr(stats, f"{part}_s"))
    yield seconds
    ranks = GaugeMetricFamily("tpllm_rank_up", "1 while a rank's process lives", labels=["rank"])
    for rank in stats.health:
        ranks.add_metric([str(rank["rank"])], rank["alive"])
    yield ranks
