"""Service: the engine and the server's objects, which all endpoints share."""

import secrets
import time
from dataclasses import replace

from tpllm.async_llm import AsyncLLM
from tpllm.sampling_params import SamplingParams
from tpllm.server.admission import Admission
from tpllm.server.answer_formats import always_reasons, tool_format
from tpllm.server.errors import APIError, engine_failed, invalid
from tpllm.server.generation import Generation
from tpllm.server.metrics import Metrics
from tpllm.server.prompt_encoder import Prompts
from tpllm.server.sampling import Sampling
from tpllm.server.settings import ServerSettings

MAX_LOGPROB_ENTRIES = 2**21  # of one answer: about 300 bytes each, including JSON


class Service:
    """The engine, its tokenizer, the queue, the metrics and the settings of one server."""

    def __init__(self, engine: AsyncLLM, settings: ServerSettings) -> None:
        config = engine.config
        self.engine = engine
        self.settings = settings
        self.created = int(time.time())
        own_name = config.model or config.model_config.name
        self.model_names = tuple(settings.served_model_name or (own_name,))
        self.admission = Admission(config.max_num_seqs, settings.max_queue)
        self.metrics = Metrics()
        self.prompts = Prompts(engine.get_tokenizer(), config.max_model_len)
        template = self.prompts.tokenizer.chat_template
        self.tool_format = tool_format(settings.tool_call_parser, template)
        self.always_reasons = always_reasons(settings.reasoning_parser, template)
        self.sampling = Sampling(
            settings, config.generation_defaults, config.max_model_len, self.tool_format
        )

    @property
    def model_name(self) -> str:
        """The model's name in answers."""
        return self.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Raise APIError 404 if a request names another model than the served one."""
        if name is not None and name not in self.model_names:
            known = ", ".join(map(repr, self.model_names))
            raise APIError(
                404,
                f"the model {name[:100]!r} is not served here; use {known}",
                param="model",
                code="model_not_found",
            )

    def check_engine(self) -> None:
        """Raise APIError 503 if the engine has failed."""
        if self.engine.dead_error is not None:
            raise engine_failed(self.engine.dead_error)

    def generation(
        self, prompts: list[list[int]], params: SamplingParams, request_id: str
    ) -> Generation:
        """Return a Generation for a request; it has not started.

        Raises:
            APIError: 400, the request's log-probabilities would take too much memory.
        """
        params = self._within_logprob_limit(prompts, params)
        return Generation(self.engine, self.metrics, prompts, params, request_id)

    def _within_logprob_limit(
        self, prompts: list[list[int]], params: SamplingParams
    ) -> SamplingParams:
        """Return the parameters, with max_tokens set so that the log-probabilities fit the limit.

        A max_tokens of the request is not changed, but checked.
        """
        num_entries = sum(map(len, prompts)) * _entries_per_token(params.prompt_logprobs)
        per_token = params.n * _entries_per_token(params.logprobs)
        rooms = [self.engine.config.max_model_len - len(ids) for ids in prompts]
        if params.max_tokens is not None:
            num_entries += per_token * sum(min(params.max_tokens, room) for room in rooms)
        elif per_token * sum(rooms) > (left := MAX_LOGPROB_ENTRIES - num_entries):
            share = left // (per_token * len(prompts))
            num_entries += per_token * len(prompts) * max(1, share)
            params = replace(params, max_tokens=max(1, share))
        if num_entries > MAX_LOGPROB_ENTRIES:
            raise invalid(
                f"logprobs of this request may have {num_entries} entries (prompts x n x "
                "max_tokens x (top_logprobs + 1), plus those of the prompts), more than this "
                f"server's limit of {MAX_LOGPROB_ENTRIES}; lower max_tokens, n or top_logprobs"
            )
        return params


def _entries_per_token(num_top: int | None) -> int:
    return 0 if num_top is None else num_top + 1


def new_id(prefix: str) -> str:
    """Return an id that cannot be guessed, even from other ids."""
    return f"{prefix}{secrets.token_hex(12)}"
