"""Convert the fields of a request to SamplingParams."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from tpllm.sampling_params import RequestOutputKind, SamplingParams
from tpllm.server.answer_formats import ToolFormat
from tpllm.server.errors import context_exceeded, from_value_error, invalid
from tpllm.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from tpllm.server.settings import ServerSettings
from tpllm.server.structured import structured_outputs
from tpllm.text.bad_words import most_ids

# Fields that a request and SamplingParams both have; `_make` sets two of them itself.
SAME_NAME = GenerationRequest.model_fields.keys() & {each.name for each in fields(SamplingParams)}
# Most token ids in the lists of a request, over all its sequences: the engine reads them in about
# 0.1 s between two steps. For a bad word, the ids of all its spellings count.
MAX_LISTED_IDS = 2**17


class Sampling:
    """Creates SamplingParams from requests, within the server's limits.

    Args:
        defaults: values for fields that a request leaves out, from generation_config.json
        max_model_len: most tokens of prompt and answer together
        tools: the format of tool calls
    """

    def __init__(
        self,
        settings: ServerSettings,
        defaults: Mapping[str, Any],
        max_model_len: int,
        tools: ToolFormat,
    ) -> None:
        self._settings = settings
        self._defaults = defaults
        self._max_model_len = max_model_len
        self._tools = tools

    def of_completion(self, body: CompletionRequest) -> SamplingParams:
        """Raises: APIError 400: a value is out of range, or not supported."""
        if body.best_of not in (None, body.n or 1):
            raise invalid(
                f"best_of={body.best_of} is not supported beyond n={body.n or 1}; leave it out"
            )
        if body.suffix:
            raise invalid("suffix is not supported; leave it out")
        extra = {"logprobs": self._num_logprobs("logprobs", body.logprobs)}
        if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
            extra["prompt_logprobs"] = body.logprobs
        max_tokens = body.max_tokens
        if body.echo and max_tokens == 0:
            max_tokens = 1  # only the prompt is wanted, and the token is dropped
        return self._make(body, extra, max_tokens, 16, len(body.prompt))

    def of_chat(self, body: ChatCompletionRequest) -> SamplingParams:
        """Raises: APIError 400: a value is out of range, or not supported."""
        max_tokens = body.max_completion_tokens
        if max_tokens is None:
            max_tokens = body.max_tokens
        num_top = self._num_logprobs("top_logprobs", body.top_logprobs)
        if num_top and not body.logprobs:
            raise invalid(f"top_logprobs={num_top} needs logprobs=true")
        extra: dict[str, Any] = {"logprobs": (num_top or 0) if body.logprobs else None}
        if body.tools and self._tools.is_special:
            extra["skip_special_tokens"] = False
        return self._make(body, extra, max_tokens, self._defaults.get("max_tokens"))

    def check_length(
        self, body: GenerationRequest, prompt_ids: Sequence[list[int]], params: SamplingParams
    ) -> None:
        """Raise APIError 400 if a prompt, or it and the requested answer, exceed the context."""
        limit, field = self._max_model_len, prompt_field(body)
        asked = _max_tokens_field(body)
        for i, ids in enumerate(prompt_ids):
            place = field if len(prompt_ids) == 1 else f"{field}[{i}]"
            if len(ids) >= limit:
                raise context_exceeded(
                    limit,
                    f"your prompt is too long: the {len(ids)} tokens of {place} leave no room for "
                    f"an answer. Please reduce the length of the {field}",
                    field,
                )
            if asked is not None and len(ids) + (params.max_tokens or 0) > limit:
                raise context_exceeded(
                    limit,
                    f"you requested {len(ids) + (params.max_tokens or 0)} tokens ({len(ids)} in "
                    f"{place}, {params.max_tokens} by {asked}). Please lower {asked}, or reduce "
                    f"the length of the {field}",
                    asked,
                )

    def _num_logprobs(self, name: str, value: int | None) -> int | None:
        limit = self._settings.max_logprobs
        if value is not None and not 0 <= value <= limit:
            raise invalid(f"{name}={value} must be between 0 and {limit}")
        return value

    def _check_lists(self, body: GenerationRequest, num_prompts: int) -> None:
        num_seqs = num_prompts * (body.n or 1)
        num_ids = {
            name: len(getattr(body, name) or ())
            for name in ("stop_token_ids", "logit_bias", "allowed_token_ids")
        }
        num_ids["bad_words"] = most_ids(body.bad_words or ())
        if num_seqs * sum(num_ids.values()) > MAX_LISTED_IDS:
            longest = max(num_ids, key=num_ids.__getitem__)
            raise invalid(
                f"{longest} is too long for a request of {num_seqs} sequences (prompts times n); "
                "shorten it, or send fewer at a time"
            )

    def _make(
        self,
        body: GenerationRequest,
        extra: dict[str, Any],
        max_tokens: int | None,
        default_max_tokens: int | None,
        num_prompts: int = 1,
    ) -> SamplingParams:
        settings = self._settings
        self._num_logprobs("prompt_logprobs", body.prompt_logprobs)
        if body.stream and body.prompt_logprobs is not None:
            raise invalid(
                f"prompt_logprobs={body.prompt_logprobs} is not available in streams; leave stream "
                "out"
            )
        if body.n is not None and body.n > settings.max_n:
            raise invalid(f"n={body.n} must be at most {settings.max_n}")
        self._check_lists(body, num_prompts)
        asked = _max_tokens_field(body) or "max_tokens"
        if max_tokens is not None and max_tokens > self._max_model_len:
            raise context_exceeded(
                self._max_model_len,
                f"you requested {max_tokens} tokens by {asked} alone. Please lower it",
                asked,
            )
        limit = settings.max_output_tokens
        if limit is not None and max_tokens is not None and max_tokens > limit:
            raise invalid(f"{asked}={max_tokens} must be at most {limit}")
        if max_tokens is None:
            max_tokens = min(filter(None, (default_max_tokens, limit)), default=None)
        given = {name: getattr(body, name) for name in SAME_NAME}
        given = {name: value for name, value in (given | extra).items() if value is not None}
        ours = {
            "output_kind": RequestOutputKind.DELTA,
            "max_tokens": max_tokens,
            "structured_outputs": structured_outputs(body, self._tools),
        }
        defaults = dict(self._defaults)
        if (body.n or 1) > 1 and defaults.get("temperature") == 0:
            del defaults["temperature"]  # several greedy answers would be equal
        try:
            return SamplingParams(**{**defaults, **given, **ours})
        except ValueError as error:
            raise from_value_error(error, renamed={"max_tokens": asked}) from None


def prompt_field(body: GenerationRequest) -> str:
    """Return the name of a request's prompt field."""
    return "messages" if isinstance(body, ChatCompletionRequest) else "prompt"


def _max_tokens_field(body: GenerationRequest) -> str | None:
    """Return the field with the maximum length of an answer; None if the request has none."""
    if isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        return "max_completion_tokens"
    if isinstance(body, CompletionRequest) and body.echo and body.max_tokens == 0:
        return None  # only the prompt is wanted
    return None if body.max_tokens is None else "max_tokens"
