"""Encode texts and conversations of requests without blocking the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel

from tpllm.server.errors import APIError, context_exceeded, from_value_error, invalid
from tpllm.server.protocol import ChatCompletionRequest, TokenizeRequest
from tpllm.server.text_offsets import TextOffsets
from tpllm.text.tokenizer import Tokenizer

T = TypeVar("T")

# Encoding fewer characters or ids takes less than a millisecond, about as long as using a thread.
SHORT = 4096
NUM_THREADS = 4
PIECE_CHARS = 2**18  # encoding takes half a kilobyte of memory for each
SPLIT_TOKENS = 64  # more tokens than splitting a text can add to a piece
CHARS_PER_TOKEN = 32  # more than any meaningful text has on average


class Prompts:
    """The tokenizer with a few threads for long texts.

    Args:
        max_model_len: most tokens of a prompt; longer texts are refused before they are encoded
    """

    def __init__(self, tokenizer: Tokenizer, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._threads = ThreadPoolExecutor(NUM_THREADS, "tpllm-server-tokenizer")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(
        self, prompts: Sequence[str | list[int]], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the token ids of texts. Prompts of token ids stay as they are.

        Raises:
            APIError: 400, a text is not valid Unicode, or far too long.
        """
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if not texts:
            return [prompt for prompt in prompts if not isinstance(prompt, str)]
        size = sum(map(len, texts)) + SHORT // 64 * len(texts)
        encoded = iter(await self._run(size, self._encode, texts, add_special_tokens))
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Encode texts in batches of limited size, which limits memory."""
        ids: list[list[int]] = []
        batch: list[str] = []
        num_chars = 0
        for text in texts:
            if len(text) > PIECE_CHARS:
                self._refuse_too_long(text)
            if num_chars + len(text) > PIECE_CHARS:
                ids += self.tokenizer.encode_batch(batch, add_special_tokens)
                batch, num_chars = [], 0
            batch.append(text)
            num_chars += len(text)
        return ids + self.tokenizer.encode_batch(batch, add_special_tokens)

    def _refuse_too_long(self, text: str) -> None:
        """Refuse a text with too many tokens without encoding all of it at once.

        The tokens are counted piece by piece. A piece that ends within a word has a few more.
        """
        limit = self._max_model_len
        num_tokens = 0
        too_long = len(text) > CHARS_PER_TOKEN * limit
        for number, begin in enumerate(range(0, len(text), PIECE_CHARS), 1):
            if too_long:
                break
            piece = text[begin : begin + PIECE_CHARS]
            num_tokens += len(self.tokenizer.encode_batch([piece], False)[0])
            too_long = num_tokens > limit + SPLIT_TOKENS * number
        if too_long:
            raise context_exceeded(
                limit,
                f"your prompt is too long: a text has {len(text)} characters. Please reduce it",
                "prompt",
            )

    async def render(self, body: ChatCompletionRequest | TokenizeRequest) -> tuple[str, list[int]]:
        """Return a conversation as rendered by the chat template, and its token ids.

        Raises:
            APIError: 400, the template cannot render it.
        """
        options = dict(body.chat_template_kwargs or {})
        if body.enable_thinking is not None:
            options["enable_thinking"] = body.enable_thinking
        goes_on = bool(body.continue_final_message)
        begins = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
        if goes_on and begins:
            raise invalid("continue_final_message=true needs add_generation_prompt=false")

        def render() -> tuple[str, list[int]]:
            text = self.tokenizer.render_chat(
                body.messages or [],
                tools=None if body.tools is None else [tool.model_dump() for tool in body.tools],
                add_generation_prompt=begins,
                continue_final_message=goes_on,
                chat_template_kwargs=options,
            )
            # the template's text includes every special token
            return text, self._encode([text], False)[0]

        try:
            return await self._run(_size(body), render)
        except APIError as error:
            if error.param in (None, "prompt"):
                error.param = "messages"  # the prompt is made of the messages
            raise

    async def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, including special tokens."""
        return await self._run(len(ids), self.tokenizer.decode, ids, False)

    async def token_texts(self, ids: list[int]) -> list[str]:
        """Return the text of each token."""
        return await self._run(len(ids), lambda: list(map(self.tokenizer.decode_one, ids)))

    async def offsets(
        self, prompt: str | list[int], ids: list[int], add_special_tokens: bool
    ) -> list[int]:
        """Return the character offsets of a prompt's tokens in the prompt's text."""

        def compute() -> list[int]:
            if isinstance(prompt, str):
                known = self.tokenizer.token_offsets(prompt, add_special_tokens)
                if known is not None:
                    return known
            offsets = self.text_offsets(skip_special_tokens=False)
            return [offsets.feed(token_id) for token_id in ids]

        return await self._run(len(ids), compute)

    def text_offsets(
        self, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> TextOffsets:
        """Return a TextOffsets for the detokenizer with these settings."""
        detokenizer = self.tokenizer.detokenizer(skip_special_tokens, spaces_between_special_tokens)
        return TextOffsets(detokenizer, self.tokenizer.decode_one)

    async def _run(self, size: int, function: Callable[..., T], *args: Any) -> T:
        try:
            if size < SHORT:
                return function(*args)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, function, *args)
        except ValueError as error:
            raise from_value_error(error) from None


def _size(body: ChatCompletionRequest | TokenizeRequest) -> int:
    """Estimate the number of characters in a conversation, counting up to SHORT."""
    size = 0
    rest: list[object] = [body.messages, body.tools, body.chat_template_kwargs]
    while rest and size < SHORT:
        value = rest.pop()
        if isinstance(value, BaseModel):
            rest += vars(value).values()
        elif isinstance(value, str):
            size += len(value)
        elif isinstance(value, list | dict):
            size += 8 * len(value)
            if size < SHORT:
                rest += value
                rest += value.values() if isinstance(value, dict) else ()
    return size
