"""Run the prompts of one HTTP request, each with n answers, and yield their parts."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from tpllm.async_llm import AsyncLLM
from tpllm.outputs import CompletionOutput, RequestOutput
from tpllm.sampling_params import SamplingParams
from tpllm.server.logprob_bodies import Position
from tpllm.server.metrics import Metrics


@dataclass
class Answer:
    """One of n answers to one prompt, with its parts joined so far."""

    index: int  # number among all answers of the HTTP request
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Position] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, part: CompletionOutput) -> None:
        self.text += part.text
        self.token_ids += part.token_ids
        self.logprobs += part.logprobs or []
        self.finish_reason = part.finish_reason
        self.stop_reason = part.stop_reason


@dataclass
class PromptState:
    """One prompt of the request, with its answers so far."""

    index: int
    token_ids: list[int]
    answers: list[Answer]
    logprobs: Sequence[Position | None] | None = None
    num_cached_tokens: int = 0


class Generation:
    """Runs the prompts, and yields new parts of answers as they arrive.

    Args:
        prompts: token ids
        params: the parameters of every prompt; `output_kind` is DELTA
        request_id: the answer's id, from which the ids of engine requests are made
    """

    def __init__(
        self,
        engine: AsyncLLM,
        metrics: Metrics,
        prompts: list[list[int]],
        params: SamplingParams,
        request_id: str,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._params = params
        self._request_id = request_id
        self._num_prompt_tokens = sum(map(len, prompts))
        self._num_cached_tokens = 0
        self.num_new_tokens = 0
        n = params.n
        self.prompts = [
            PromptState(i, ids, [Answer(i * n + k) for k in range(n)])
            for i, ids in enumerate(prompts)
        ]

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens so far, in OpenAI's format."""
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self.num_new_tokens,
            "total_tokens": self._num_prompt_tokens + self.num_new_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens},
        }

    async def parts(
        self,
    ) -> AsyncGenerator[tuple[PromptState, Answer, CompletionOutput], None]:
        """Yield every part of every answer, after adding it to its answer."""
        begin = time.perf_counter()
        streams = [
            self._engine.generate(
                {"prompt_token_ids": prompt.token_ids}, self._params, f"{self._request_id}-{i}"
            )
            for i, prompt in enumerate(self.prompts)
        ]
        last = [begin] * (len(self.prompts) * self._params.n)
        async with aclosing(_merged(streams)) as outputs:
            async for i, output in outputs:
                prompt = self.prompts[i]
                self._num_cached_tokens += output.num_cached_tokens - prompt.num_cached_tokens
                prompt.num_cached_tokens = output.num_cached_tokens
                if prompt.logprobs is None:
                    prompt.logprobs = output.prompt_logprobs
                for part in output.outputs:
                    answer = prompt.answers[part.index]
                    if answer.finish_reason is not None:
                        continue  # it has ended, and the output repeats it
                    now = time.perf_counter()
                    is_first = not answer.token_ids
                    answer.add(part)
                    self.num_new_tokens += len(part.token_ids)
                    if part.token_ids:
                        metrics = self._metrics
                        histogram = metrics.first_token_s if is_first else metrics.between_tokens_s
                        histogram.observe(now - last[answer.index])
                        last[answer.index] = now
                    yield prompt, answer, part
        self._metrics.request_s.observe(time.perf_counter() - begin)


async def _merged(
    streams: list[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Yield the outputs of all streams, with the stream's index, and close all at the end."""
    if len(streams) == 1:  # the usual case needs no task and no queue
        async with aclosing(streams[0]) as stream:
            async for output in stream:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput] | BaseException | None] = asyncio.Queue(
        len(streams)
    )

    async def pump(index: int, stream: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with aclosing(stream):
                async for output in stream:
                    await queue.put((index, output))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
