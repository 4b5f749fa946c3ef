"""POST /v1/completions: texts continued."""

import time
from collections.abc import AsyncGenerator, Iterable
from itertools import chain
from typing import Any

from starlette.responses import Response

from tpllm.outputs import CompletionOutput
from tpllm.sampling_params import SamplingParams
from tpllm.server.generation import Answer, Generation, PromptState
from tpllm.server.logprobs import Position, completion_logprobs, prompt_logprobs
from tpllm.server.protocol import CompletionRequest
from tpllm.server.responses import respond
from tpllm.server.service import Service, new_id
from tpllm.server.structured import naming_the_field
from tpllm.server.usage import StreamedUsage


def complete(service: Service, body: CompletionRequest) -> Response:
    """The answer to a checked request; its work begins when the answer is sent.

    Raises:
        APIError: the request is refused.
    """
    service.check_model(body.model)
    params = service.sampling.of_completion(body)
    return respond(service, _Completion(service, body, params), bool(body.stream))


class _Completion:
    def __init__(self, service: Service, body: CompletionRequest, params: SamplingParams) -> None:
        self._service = service
        self._body = body
        self._params = params
        self._num_seqs = len(body.prompt) * params.n
        self._head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }
        self._prompt_texts: list[str] = []  # when they are echoed
        self._first_texts: list[str] = []  # of the first token of each, when they are echoed
        self._offsets: dict[int, int] = {}  # by answer: letters before its next token
        self._only_echo = bool(body.echo) and body.max_tokens == 0

    async def whole(self) -> dict[str, Any]:
        """The answer, once all of it is there."""
        with self._service.admission.enter(self._num_seqs), naming_the_field(self._body):
            generation = await self._begin()
            await generation.run()
        choices = []
        for i, prompt in enumerate(generation.prompts):
            for answer in prompt.answers:
                if self._only_echo:
                    _drop(answer, generation)
                choice = await self._choice(i, prompt, answer, answer, is_first=True)
                if self._body.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(prompt.logprobs or [])
                choices.append(choice)
        return {**self._head, "choices": choices, "usage": generation.usage()}

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in chunks."""
        usage = StreamedUsage(self._body.stream_options)
        with self._service.admission.enter(self._num_seqs), naming_the_field(self._body):
            generation = await self._begin()
            indices = {id(prompt): i for i, prompt in enumerate(generation.prompts)}
            begun: set[int] = set()
            async for prompt, answer, part in generation.parts():
                is_first = answer.index not in begun
                begun.add(answer.index)
                if self._only_echo:
                    _drop(answer, generation)
                shown = answer if self._only_echo else part
                choice = await self._choice(indices[id(prompt)], prompt, answer, shown, is_first)
                yield usage.chunk(self._head, choice, generation)
        for chunk in usage.last(self._head, generation):
            yield chunk

    async def _begin(self) -> Generation:
        service, body = self._service, self._body
        service.check_engine()
        special = body.add_special_tokens is not False
        ids = await service.prompts.encode(body.prompt, special)
        service.sampling.check_length(body, ids, self._params)
        if body.echo:
            for prompt, each in zip(body.prompt, ids, strict=True):
                is_text = isinstance(prompt, str)
                self._prompt_texts.append(prompt if is_text else await service.prompts.decode(each))
            self._first_texts = [
                (await service.prompts.token_texts(each[:1]) or [""])[0] for each in ids
            ]
        return service.generation(ids, self._params, str(self._head["id"]))

    async def _choice(
        self,
        prompt_index: int,
        prompt: PromptState,
        answer: Answer,
        part: Answer | CompletionOutput,
        is_first: bool,
    ) -> dict[str, Any]:
        """`part` of an answer, or all of it, as OpenAI has it."""
        echoes = bool(self._body.echo) and is_first
        text = self._prompt_texts[prompt_index] if echoes else ""
        logprobs = None
        if self._body.logprobs is not None:
            ids: Iterable[int] = part.token_ids
            positions: Iterable[Position | None] = part.logprobs or ()
            if echoes:
                ids = chain(prompt.token_ids, ids)
                positions = chain(prompt.logprobs or (), positions)
            first = self._first_texts[prompt_index] if echoes else ""
            offset = self._offsets.get(answer.index, 0)
            logprobs, self._offsets[answer.index] = await completion_logprobs(
                ids, positions, self._body.logprobs, offset, first
            )
        return {
            "index": answer.index,
            "text": text + part.text,
            "logprobs": logprobs,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }


def _drop(answer: Answer, generation: Generation) -> None:
    """Forget the one token that was drawn for the sake of the prompt's log-probabilities."""
    generation.num_new_tokens -= len(answer.token_ids)
    answer.text, answer.token_ids, answer.logprobs = "", [], []
