"""POST /v1/completions: continuations of texts."""

import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from itertools import chain, repeat, starmap
from typing import Any

from starlette.responses import Response

from tpllm.outputs import CompletionOutput
from tpllm.sampling_params import SamplingParams
from tpllm.server.generation import Answer, Generation, PromptState
from tpllm.server.logprob_bodies import Entry, completion_logprobs, prompt_logprobs
from tpllm.server.protocol import CompletionRequest
from tpllm.server.responses import respond
from tpllm.server.service import Service, new_id
from tpllm.server.structured import naming_the_field
from tpllm.server.text_offsets import TextOffsets
from tpllm.server.usage import StreamedUsage


def complete(service: Service, body: CompletionRequest) -> Response:
    """Return the response to a request. The engine starts when the response is sent.

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
        self.num_seqs = len(body.prompt) * params.n
        self._head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }
        self._prompt_texts: list[str] = []  # only with echo
        self._prompt_offsets: list[list[int]] = []  # text offsets, with echo and logprobs
        self._reports: dict[int, _TokenReport] = {}  # by answer, only with logprobs
        self._only_echo = bool(body.echo) and body.max_tokens == 0

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer, once it is complete."""
        with naming_the_field(self._body):
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
        """Yield the answer in chunks."""
        usage = StreamedUsage(self._body.stream_options)
        with naming_the_field(self._body):
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
                if body.logprobs is not None:
                    offsets = await service.prompts.offsets(prompt, each, special)
                    self._prompt_offsets.append(offsets)
        return service.generation(ids, self._params, str(self._head["id"]))

    async def _choice(
        self,
        prompt_index: int,
        prompt: PromptState,
        answer: Answer,
        part: Answer | CompletionOutput,
        is_first: bool,
    ) -> dict[str, Any]:
        """Return a part of an answer, or a whole one, as OpenAI's choice."""
        echoes = bool(self._body.echo) and is_first
        text = self._prompt_texts[prompt_index] if echoes else ""
        logprobs = None
        if self._body.logprobs is not None:
            entries: Iterable[Entry] = self._report(prompt_index, answer).after(part)
            if echoes:
                entries = chain(await self._prompt_entries(prompt_index, prompt), entries)
            logprobs = await completion_logprobs(entries, self._body.logprobs)
        return {
            "index": answer.index,
            "text": text + part.text,
            "logprobs": logprobs,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }

    async def _prompt_entries(self, prompt_index: int, prompt: PromptState) -> Iterator[Entry]:
        """Return the entries of an echoed prompt, whose positions are built when they are read."""
        ids, positions = prompt.token_ids, prompt.logprobs or ()
        first = await self._service.prompts.token_texts(ids[:1])
        texts = chain(first, repeat("", len(ids) - 1))
        offsets = self._prompt_offsets[prompt_index]
        return starmap(Entry, zip(ids, positions, offsets, texts, strict=True))

    def _report(self, prompt_index: int, answer: Answer) -> "_TokenReport":
        if answer.index not in self._reports:
            begin = len(self._prompt_texts[prompt_index]) if self._body.echo else 0
            params = self._params
            offsets = self._service.prompts.text_offsets(
                params.skip_special_tokens, params.spaces_between_special_tokens
            )
            self._reports[answer.index] = _TokenReport(offsets, begin)
        return self._reports[answer.index]


class _TokenReport:
    """Reports an answer's tokens together with their text, which stop strings may delay.

    Args:
        offsets: computes offsets in the answer's text
        begin: number of characters before the answer's text
    """

    def __init__(self, offsets: TextOffsets, begin: int) -> None:
        self._offsets = offsets
        self._begin = begin
        self._num_chars = 0  # of the text so far
        self._held: deque[tuple[Entry, int]] = deque()  # (entry, end of its text)

    def after(self, part: Answer | CompletionOutput) -> list[Entry]:
        """Return the tokens to report with the text of a part."""
        self._num_chars += len(part.text)
        for token_id, position in zip(part.token_ids, part.logprobs or (), strict=True):
            offset = self._offsets.feed(token_id)
            self._held.append((Entry(token_id, position, offset), self._offsets.num_chars))
        reported = []
        while self._held and (part.finish_reason or self._held[0][1] <= self._num_chars):
            entry, _ = self._held.popleft()
            # a token whose text a stop string removed has its offset at the end
            offset = self._begin + min(entry.offset, self._num_chars)
            reported.append(entry._replace(offset=offset))
        return reported


def _drop(answer: Answer, generation: Generation) -> None:
    """Drop the token that was only sampled to get the prompt's log-probabilities."""
    generation.num_new_tokens -= len(answer.token_ids)
    answer.text, answer.token_ids, answer.logprobs = "", [], []
