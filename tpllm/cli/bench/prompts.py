"""Prompts of random words with a known number of tokens, for any tokenizer that can count."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from tpllm.cli.bench.client import HTTPStatusError, Server
from tpllm.config.checkpoint import resolve_model
from tpllm.text.tokenizer import Tokenizer

Count = Callable[[str], Awaitable[int]]  # tokens of a text

# Short and common: one token each in almost any vocabulary, also the small ones.
_COMMON = (
    "the of and to in is that he was for it with as his on be at by had not are but from or have "
    "an they which one you were all her she there would their we him been has when who will no "
    "more if out so said what up its about into than them can only other time new some could "
    "these two may first then do any like my now over such our man me even most made after also "
    "well many must before through back years where much your way down should because long each"
)
WORDS = _COMMON.split()
ENOUGH = 8  # words; 24 of them make one of 2**72 prompts
REPEATS = 16  # of a word, to see that it stays one token beside others


def token_counter(server: Server, model: str, tokenizer: str | None) -> Count:
    """Return a function that counts with a local tokenizer, or with the server's /tokenize."""
    if tokenizer is not None:
        local = Tokenizer(resolve_model(tokenizer, setting="tokenizer", weights=False))

        async def count_here(text: str) -> int:
            return len(local.encode_batch([text], add_special_tokens=False)[0])

        return count_here

    async def count_there(text: str) -> int:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            answer = await server.call("POST", "/tokenize", body)
            return int(answer["count"])
        except HTTPStatusError as error:
            if error.status in (404, 405):
                raise ValueError(
                    f"{server.url} has no /tokenize to count tokens with; name the model's "
                    "tokenizer with --tokenizer"
                ) from error
            raise
        except (KeyError, TypeError, ValueError):
            raise OSError(f"/tokenize of {server.url} answers without a `count`") from None

    return count_there


async def single_token_words(count: Count) -> list[str]:
    """Return those of `WORDS` that are one token each, together with a space before them.

    Raises:
        ValueError: there are too few.
    """
    counts = await asyncio.gather(*(count(f" {word}" * REPEATS) for word in WORDS))
    single = [word for word, n in zip(WORDS, counts, strict=True) if n == REPEATS]
    if len(single) < ENOUGH:
        raise ValueError(
            f"only {len(single)} of {len(WORDS)} common English words are one token in this "
            f"model's vocabulary, and prompts of a known length take {ENOUGH}"
        )
    return single


def random_prompt(words: list[str], num_tokens: int, rng: random.Random) -> str:
    """Return a text of `num_tokens` random words, which no prefix cache holds."""
    return "".join(f" {word}" for word in rng.choices(words, k=num_tokens))
