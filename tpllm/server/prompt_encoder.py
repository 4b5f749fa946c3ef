"""Requests' texts and conversations as token ids, without holding up the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel

from tpllm.server.engine import Tokenizer
from tpllm.server.errors import APIError, context_exceeded, from_value_error
from tpllm.server.protocol import Conversation
from tpllm.server.text_offsets import TextOffsets

T = TypeVar("T")

# Below this many letters or ids, encoding takes less than a millisecond: a thread costs as much.
SHORT = 4096
NUM_THREADS = 4
PIECE_CHARS = 2**18  # encoding takes half a kilobyte for each, until it is done
SPLIT_TOKENS = 64  # of a piece, more than where it is not cut out: far more than there can be
LETTERS_PER_TOKEN = 32  # of a whole text, more than any has that says something


class Prompts:
    """The tokenizer behind a few threads, which long texts go through.

    Args:
        max_model_len: most tokens of a prompt; texts of clearly more are not encoded to their end
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
        """Token ids of texts; ids stay as they are.

        Raises:
            APIError: 400: a text is no valid Unicode, or far too long.
        """
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if not texts:
            return [prompt for prompt in prompts if not isinstance(prompt, str)]
        size = sum(map(len, texts)) + SHORT // 64 * len(texts)
        encoded = iter(await self._run(size, self._encode, texts, add_special_tokens))
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """As the tokenizer would, but for the memory: some pieces' at a time."""
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
        """Refuse a long text without encoding all of it at once.

        Its tokens are counted piece by piece. Where a piece ends in the middle of a word, that
        makes a few more.
        """
        limit = self._max_model_len
        num_tokens = 0
        too_long = len(text) > LETTERS_PER_TOKEN * limit
        for number, begin in enumerate(range(0, len(text), PIECE_CHARS), 1):
            if too_long:
                break
            piece = text[begin : begin + PIECE_CHARS]
            num_tokens += len(self.tokenizer.encode_batch([piece], False)[0])
            too_long = num_tokens > limit + SPLIT_TOKENS * number
        if too_long:
            raise context_exceeded(
                limit,
                f"your prompt is too long: a text has {len(text)} letters. Please reduce it",
                "prompt",
            )

    async def render(self, body: Conversation) -> tuple[str, list[int]]:
        """A conversation as the chat template writes it, and its token ids.

        Raises:
            APIError: 400: the template does not take it.
        """
        options = dict(body.chat_template_kwargs or {})
        if body.enable_thinking is not None:
            options["enable_thinking"] = body.enable_thinking
        goes_on = bool(body.continue_final_message)
        begins = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
        if goes_on and begins:
            raise APIError(
                400,
                "continue_final_message=true needs add_generation_prompt=false: an answer is "
                "either continued or begun",
                param="continue_final_message",
            )

        def render() -> tuple[str, list[int]]:
            text = self.tokenizer.render_chat(
                body.messages,
                tools=None if body.tools is None else [tool.model_dump() for tool in body.tools],
                add_generation_prompt=begins,
                continue_final_message=goes_on,
                chat_template_kwargs=options,
            )
            # the template spells out every special token
            return text, self._encode([text], False)[0]

        try:
            return await self._run(_size(body), render)
        except APIError as error:
            if error.param in (None, "prompt"):
                error.param = "messages"  # there is no prompt here but that of the messages
            raise

    async def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included."""
        return await self._run(len(ids), self.tokenizer.decode, ids, False)

    async def token_texts(self, ids: list[int]) -> list[str]:
        """Each token's own text."""
        return await self._run(len(ids), lambda: list(map(self.tokenizer.decode_one, ids)))

    async def offsets(
        self, prompt: str | list[int], ids: list[int], add_special_tokens: bool
    ) -> list[int]:
        """Where the tokens of a prompt begin in its text: itself, or that of its ids."""
        return await self._run(len(ids), self._offsets, prompt, ids, add_special_tokens)

    def _offsets(
        self, prompt: str | list[int], ids: list[int], add_special_tokens: bool
    ) -> list[int]:
        if isinstance(prompt, str):
            told = self.tokenizer.token_offsets(prompt, add_special_tokens)
            if told is not None:
                return told
        offsets = self.text_offsets(skip_special_tokens=False)
        return [offsets.feed(token_id) for token_id in ids]

    def text_offsets(
        self, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> TextOffsets:
        """Follows a text as the detokenizer of these settings makes it."""
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


def _size(body: Conversation) -> int:
    """Letters of a conversation, roughly, or where they end to be few."""
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
