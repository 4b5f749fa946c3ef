"""Answerer: what completions and chat completions have in common."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Generic, TypeVar

from tpllm.outputs import CompletionOutput
from tpllm.sampling_params import SamplingParams
from tpllm.server.generation import Answer, Generation, PromptState
from tpllm.server.protocol import GenerationRequest, StreamOptions
from tpllm.server.service import Service, new_id
from tpllm.server.structured import naming_the_field

B = TypeVar("B", bound=GenerationRequest)


class Answerer(ABC, Generic[B]):
    """A checked request, which can be answered as a whole or as a stream.

    Args:
        make_params: returns the request's sampling parameters

    Attributes:
        num_seqs: the number of its sequences: prompts times n
        streams: whether it asks for a stream

    Raises:
        APIError: the request is refused.
    """

    id_prefix: str
    kind: str  # OpenAI's name of the answer's object
    chunk_kind: str  # and of a stream's

    def __init__(
        self,
        service: Service,
        body: B,
        make_params: Callable[[B], SamplingParams],
        num_prompts: int = 1,
    ) -> None:
        service.check_model(body.model)
        self._service = service
        self._body = body
        self._params = make_params(body)
        self.num_seqs = num_prompts * self._params.n
        self.streams = bool(body.stream)
        self._head: dict[str, Any] = {
            "id": new_id(self.id_prefix),
            "object": self.chunk_kind if self.streams else self.kind,
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer, once it is complete."""
        with naming_the_field(self._body):
            generation = await self._begin()
            async for _ in generation.parts():  # they are added to the answers
                pass
        choices = [
            await self._choice(prompt, answer)
            for prompt in generation.prompts
            for answer in prompt.answers
        ]
        return {**self._head, "choices": choices, "usage": generation.usage()}

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield chunks of one choice. `stream_options` add token counts: at the end, or to each."""
        options = self._body.stream_options or StreamOptions()
        with naming_the_field(self._body):
            generation = await self._begin()
            async for prompt, answer, part in generation.parts():
                for choice in await self._chunks(prompt, answer, part):
                    chunk = {**self._head, "choices": [choice]}
                    if options.continuous_usage_stats:
                        chunk["usage"] = generation.usage()
                    elif options.include_usage:
                        chunk["usage"] = None
                    yield chunk
        if options.include_usage:
            yield {**self._head, "choices": [], "usage": generation.usage()}

    async def _begin(self) -> Generation:
        self._service.check_engine()
        ids = await self._encode()
        self._generation = self._service.generation(ids, self._params, self._head["id"])
        return self._generation

    @abstractmethod
    async def _encode(self) -> list[list[int]]:
        """Return the token ids of the prompts.

        Raises:
            APIError: 400, they cannot be encoded, or are too long.
        """

    @abstractmethod
    async def _choice(self, prompt: PromptState, answer: Answer) -> dict[str, Any]:
        """Return a whole answer as OpenAI's choice."""

    @abstractmethod
    async def _chunks(
        self, prompt: PromptState, answer: Answer, part: CompletionOutput
    ) -> Sequence[dict[str, Any]]:
        """Return the choices of the chunks for a new part of an answer."""
