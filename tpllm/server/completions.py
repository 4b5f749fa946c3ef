"""POST /v1/completions: continuations of texts."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, repeat, starmap
from typing import Any

from tpllm.outputs import CompletionOutput
from tpllm.server.answerer import Answerer
from tpllm.server.generation import Answer, PromptState
from tpllm.server.logprob_bodies import Entry, completion_logprobs, prompt_logprobs
from tpllm.server.protocol import CompletionRequest
from tpllm.server.service import Service
from tpllm.server.text_offsets import TextOffsets


class Completion(Answerer[CompletionRequest]):
    """The continuations of one or many prompts."""

    id_prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        super().__init__(service, body, service.sampling.of_completion, len(body.prompt))
        self._prompt_texts: list[str] = []  # only with echo
        self._prompt_offsets: list[list[int]] = []  # text offsets, with echo and logprobs
        self._reports: dict[int, _TokenReport] = {}  # by answer, only with logprobs
        self._begun: set[int] = set()  # answers that have had a part
        self._only_echo = bool(body.echo) and body.max_tokens == 0

    async def _encode(self) -> list[list[int]]:
        service, body = self._service, self._body
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
        return ids

    async def _choice(self, prompt: PromptState, answer: Answer) -> dict[str, Any]:
        choice = await self._next(prompt, answer, answer)
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(prompt.logprobs or [])
        return choice

    async def _chunks(
        self, prompt: PromptState, answer: Answer, part: CompletionOutput
    ) -> list[dict[str, Any]]:
        return [await self._next(prompt, answer, part)]

    async def _next(
        self, prompt: PromptState, answer: Answer, part: Answer | CompletionOutput
    ) -> dict[str, Any]:
        """Return the next part of an answer, or a whole one, as OpenAI's choice."""
        if self._only_echo:
            # the token was only sampled to get the prompt's log-probabilities
            self._generation.num_new_tokens -= len(answer.token_ids)
            answer.text, answer.token_ids, answer.logprobs = "", [], []
            part = answer
        echoes = bool(self._body.echo) and answer.index not in self._begun
        self._begun.add(answer.index)
        text = self._prompt_texts[prompt.index] if echoes else ""
        logprobs = None
        if self._body.logprobs is not None:
            entries: Iterable[Entry] = self._report(prompt, answer).after(part)
            if echoes:
                entries = chain(await self._prompt_entries(prompt), entries)
            logprobs = await completion_logprobs(entries, self._body.logprobs)
        return {
            "index": answer.index,
            "text": text + part.text,
            "logprobs": logprobs,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }

    async def _prompt_entries(self, prompt: PromptState) -> Iterator[Entry]:
        """Return the entries of an echoed prompt, whose positions are built when they are read."""
        ids, positions = prompt.token_ids, prompt.logprobs or ()
        first = await self._service.prompts.token_texts(ids[:1])
        texts = chain(first, repeat("", len(ids) - 1))
        offsets = self._prompt_offsets[prompt.index]
        return starmap(Entry, zip(ids, positions, offsets, texts, strict=True))

    def _report(self, prompt: PromptState, answer: Answer) -> "_TokenReport":
        if answer.index not in self._reports:
            begin = len(self._prompt_texts[prompt.index]) if self._body.echo else 0
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
