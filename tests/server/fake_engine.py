"""A stand-in for AsyncLLM in plain Python: its answers are scripted, and it can be slow or fail.

Its tokenizer makes each character a token, whose id is its code point.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from types import SimpleNamespace
from typing import Any

import tpllm
from tpllm import SamplingParams, WorkerError
from tpllm.engine.stats import EngineStats
from tpllm.outputs import CompletionOutput, Logprob, RequestOutput
from tpllm.text.conversation import plain_messages, plain_tools

MAX_MODEL_LEN = 2000
NUM_CODE_POINTS = 0x110000


class CharTokenizer:
    """Characters are tokens; a chat is lines of <role>text. `template_end` ends each prompt."""

    def __init__(self) -> None:
        self.has_chat_template = True
        self.chat_template = ""
        self.template_end = ""
        self.rendered: list[dict[str, Any]] = []  # what render_chat was asked for

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
            raise ValueError("prompt 0 holds a lone surrogate, which is not valid Unicode")
        return [[ord(char) for char in text] for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(each) for each in ids if each < NUM_CODE_POINTS)

    def decode_one(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id]).encode(errors="surrogatepass")

    def token_offsets(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(range(len(text)))

    def detokenizer(
        self, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> Any:
        return SimpleNamespace(feed=self.decode, finish=str)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        plain = plain_messages(messages)
        if any(message["content"] == "refuse" for message in plain):
            raise ValueError("the chat template of fake cannot render these messages: no")
        tools = plain_tools(options.pop("tools", None))
        self.rendered.append({"messages": plain, "tools": tools, **options})
        lines = [f"<{message['role']}>{message['content']}\n" for message in plain]
        return "".join(lines) + self.template_end


@dataclass
class FakeEngine:
    """Gives `reply` to every prompt, `chars_per_step` at a time.

    Attributes:
        reply: the text of every answer; None for the reversed prompt
        hold: an answer waits before each part while this is not set
        gone: requests whose generator was closed before its end: aborted
        seen: prompts and parameters, in the order in which they came
    """

    reply: str | None = None
    chars_per_step: int = 3
    step_s: float = 0.0
    max_num_seqs: int = 4
    defaults: dict[str, Any] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    seen: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    dead_error: BaseException | None = None
    num_running: int = 0
    num_generated: int = 0
    is_closed: bool = False

    def __post_init__(self) -> None:
        self.hold = asyncio.Event()
        self.hold.set()
        self.tokenizer = CharTokenizer()
        self.config: Any = SimpleNamespace(
            model="fake",
            generation_defaults=self.defaults,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=self.max_num_seqs,
            model_config=SimpleNamespace(name="fake"),
        )

    def get_tokenizer(self) -> CharTokenizer:
        return self.tokenizer

    def die(self) -> None:
        self.dead_error = WorkerError("worker rank 1 died in step 7\nTraceback: secret", rank=1)
        self.hold.set()

    async def close(self) -> None:
        self.is_closed = True

    async def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=0,
            num_running=self.num_running,
            num_preemptions=2,
            num_steps=100,
            kv_cache_usage=0.25,
            num_prompt_tokens=200,
            num_cached_tokens=50,
            num_generated_tokens=self.num_generated,
            schedule_s=0.1,
            broadcast_s=0.2,
            wait_s=0.3,
            collect_s=0.4,
            step_s=1.25,
            step_buckets=[(0.01, 60), (1.0, 99), (inf, 99)],
            health=[{"rank": i, "pid": 7 + i, "phase": "serving", "alive": True} for i in (0, 1)],
        )

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        ids: list[int] = prompt["prompt_token_ids"]
        params = sampling_params
        self.seen.append((ids, params))
        assert params.output_kind is tpllm.RequestOutputKind.DELTA
        if not ids:
            raise ValueError("prompt 0 has no tokens")
        reply = self.reply
        if reply is None:
            reply = self.tokenizer.decode(ids)[::-1]
        limit = MAX_MODEL_LEN - len(ids) if params.max_tokens is None else params.max_tokens
        self.num_running += params.n
        ended = False
        try:
            async for output in self._outputs(request_id, ids, params, reply, limit):
                ended = output.finished
                yield output
        finally:
            self.num_running -= params.n
            if not ended and self.dead_error is None:
                self.gone.append(request_id)

    async def _outputs(
        self, request_id: str, ids: list[int], params: SamplingParams, reply: str, limit: int
    ) -> AsyncGenerator[RequestOutput, None]:
        shown, reason, stop_reason = reply[:limit], "stop", None
        if limit < len(reply):
            reason = "length"
        for stop in params.stop:
            if stop in shown:
                shown, reason, stop_reason = shown[: shown.index(stop)], "stop", stop
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            entries = [self._position(each, params.prompt_logprobs) for each in ids[1:]]
            prompt_logprobs = [None, *entries]
        size = self.chars_per_step
        pieces = [shown[i : i + size] for i in range(0, len(shown), size)] or [""]
        for i, index in itertools.product(range(len(pieces)), range(params.n)):
            await self.hold.wait()
            if self.dead_error is not None:
                raise self.dead_error
            await asyncio.sleep(self.step_s)
            is_last = i == len(pieces) - 1
            token_ids = [ord(char) for char in pieces[i]]
            self.num_generated += len(token_ids)
            part = CompletionOutput(
                index=index,
                text=pieces[i],
                token_ids=token_ids,
                cumulative_logprob=None,
                logprobs=None
                if params.logprobs is None
                else [self._position(each, params.logprobs) for each in token_ids],
                finish_reason=reason if is_last else None,  # type: ignore[arg-type]
                stop_reason=stop_reason if is_last else None,
            )
            yield RequestOutput(
                request_id=request_id,
                prompt=None,
                prompt_token_ids=ids,
                prompt_logprobs=prompt_logprobs if i == 0 else None,
                outputs=[part],
                finished=is_last and index == params.n - 1,
                num_cached_tokens=2,
            )

    def _position(self, token_id: int, num_top: int) -> dict[int, Logprob]:
        """The token itself is the second likeliest, after the character that follows it."""
        ranked = [token_id + 1, token_id, *range(token_id + 2, token_id + 2 + num_top)]
        entries = {
            each: Logprob(-1.0 * rank, rank, self.tokenizer.decode_one(each))
            for rank, each in enumerate(ranked[: max(2, num_top)], 1)
        }
        if num_top == 0:
            return {token_id: entries[token_id]}
        return {token_id: entries.pop(token_id), **entries}
