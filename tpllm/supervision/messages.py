"""Messages between the engine's process and its caller. Each message is a map with a `type`.

To the engine:
    add         request_ids, prompt_token_ids, params, bad_word_ids: the requests of one prompt and
                what they have in common; params holds sampling parameters that are not the default
    abort       request_ids
    stats       number: the reply repeats it
    alive       a ping: the engine returns it between two steps
    shutdown

From the engine:
    phase       rank, phase: what a worker has begun, until all are ready
    ready       worker_pids, max_total_tokens of a sequence: the engine can take requests
    updates     updates: the fields of a `RequestUpdate` in order, for every request with new tokens
                in a step
    refused     request_ids, error: the requests of an `add` that can never run, and why
    stats       number, stats: the fields of `EngineStats`
    alive       the reply to a ping
    error       error, kind ("setting", "worker" or "value"), details of a `WorkerError`: the engine
                has failed; this is the last message
"""

import traceback
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from tpllm.engine.request import AddRequest, PackedLogprobs, RequestUpdate, TokenLogprobs
from tpllm.engine.stats import EngineStats
from tpllm.errors import SettingError, WorkerError
from tpllm.sampling_params import SamplingParams
from tpllm.structured_outputs import StructuredOutputsParams
from tpllm.supervision.connection import Message

_DEFAULTS = SamplingParams()
# only the caller uses these: the engine has no text, and output_kind is not plain data
_NOT_SENT = {"output_kind", "stop", "bad_words"}
_ERROR_DETAILS = ("rank", "phase", "step", "cause", "signal", "remote_traceback")
_SENT = [field.name for field in fields(SamplingParams) if field.name not in _NOT_SENT]


def add(requests: Sequence[AddRequest]) -> Message:
    """Return the message that adds the requests of one prompt, in order."""
    first, params = requests[0], requests[0].sampling_params
    changed = {
        name: value
        for name in _SENT
        if (value := getattr(params, name)) != getattr(_DEFAULTS, name)
    }
    if params.structured_outputs is not None:
        changed["structured_outputs"] = params.structured_outputs.to_dict()
    return {
        "type": "add",
        "request_ids": [each.request_id for each in requests],
        "prompt_token_ids": first.prompt_token_ids,
        "params": changed,
        "bad_word_ids": first.bad_word_ids,
    }


def read_add(message: Message) -> list[AddRequest]:
    changed = message["params"]
    if (outputs := changed.get("structured_outputs")) is not None:
        changed["structured_outputs"] = StructuredOutputsParams(**outputs)
    params = SamplingParams(**changed)
    prompt_token_ids, bad_word_ids = message["prompt_token_ids"], message["bad_word_ids"]
    return [
        AddRequest(request_id, prompt_token_ids, params.of_continuation(index), bad_word_ids)
        for index, request_id in enumerate(message["request_ids"])
    ]


def updates(each: list[RequestUpdate]) -> Message:
    return {"type": "updates", "updates": each}  # tuples are packed as arrays


def read_updates(message: Message) -> list[RequestUpdate]:
    return [_with_logprobs(RequestUpdate(*row)) for row in message["updates"]]


def _with_logprobs(update: RequestUpdate) -> RequestUpdate:
    """Return an update with its log-probabilities as tuples with names again."""
    new, of_prompt = update.logprobs, update.prompt_logprobs
    if new is None and of_prompt is None:
        return update
    return update._replace(
        logprobs=None if new is None else [TokenLogprobs(*each) for each in new],
        prompt_logprobs=None if of_prompt is None else PackedLogprobs(*of_prompt),
    )


def stats(number: int, each: EngineStats) -> Message:
    return {"type": "stats", "number": number, "stats": asdict(each)}


def read_stats(message: Message) -> EngineStats:
    return EngineStats(**message["stats"])


def error(raised: BaseException) -> Message:
    """Return the message with the exception that ended the engine, for the caller to raise."""
    if isinstance(raised, WorkerError):
        details = {name: getattr(raised, name) for name in _ERROR_DETAILS}
        details["report"] = None if raised.report is None else str(raised.report)
        return {"type": "error", "kind": "worker", "error": str(raised), "details": details}
    if isinstance(raised, ValueError):
        kind = "setting" if isinstance(raised, SettingError) else "value"
        return {"type": "error", "kind": kind, "error": str(raised)}
    trace = "".join(traceback.format_exception(raised))
    text = f"the engine's process failed:\n{trace}"
    return {"type": "error", "kind": "worker", "error": text, "details": {}}


def read_error(message: Message) -> Exception:
    """Return the exception that an error message holds."""
    text, kind = message["error"], message["kind"]
    if kind != "worker":
        return SettingError(text) if kind == "setting" else ValueError(text)
    details = message["details"]
    if details.get("report") is not None:
        details["report"] = Path(details["report"])
    return WorkerError(text, **details)
