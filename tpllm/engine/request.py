"""Requests and their updates as callers see them, and the engine's record of a request."""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from tpllm.channel.logprob_records import LogprobBlock
from tpllm.channel.row_record import TOKEN_READERS
from tpllm.engine.grammars import Grammar, Matcher
from tpllm.engine.row_options import asks_for, row_fields
from tpllm.engine.token_rules import TokenRules
from tpllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class AddRequest:
    """A request to continue a prompt. It is plain data that may come from another process.

    Attributes:
        bad_word_ids: the token ids of each of `sampling_params.bad_words`, which the process with
            the tokenizer computes: see `Tokenizer.bad_word_ids`
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    bad_word_ids: list[list[int]] = field(default_factory=list)


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: first its token, then the likeliest tokens in order.

    The token itself may occur again among the likeliest. All three lists have the same length.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]  # 1 for the likeliest token of all


class PackedLogprobs(NamedTuple):
    """Log-probabilities at n successive positions, with the k likeliest tokens of each.

    The fields are the bytes of arrays. A long prompt has a million numbers: as Python objects they
    took 1 s to make and 0.5 s to send to another process.

    Attributes:
        ranks: [n] int32, how likely each token is: 1 for the likeliest
        token_ids: [n, 1 + k] int32, the token itself, then the likeliest ones
        logprobs: [n, 1 + k] float32
    """

    ranks: bytes
    token_ids: bytes
    logprobs: bytes

    @classmethod
    def from_block(cls, block: LogprobBlock) -> "PackedLogprobs":
        return cls(*(each.tobytes() for each in (block.ranks, block.token_ids, block.logprobs)))

    @property
    def num_positions(self) -> int:
        return len(self.ranks) // 4

    def position(self, index: int) -> TokenLogprobs:
        """Return the log-probabilities at one position, 0 <= index < num_positions."""
        width = len(self.token_ids) // len(self.ranks)
        begin, end = index * width, (index + 1) * width
        return TokenLogprobs(
            list(memoryview(self.token_ids).cast("i")[begin:end]),
            list(memoryview(self.logprobs).cast("f")[begin:end]),
            [memoryview(self.ranks).cast("i")[index], *range(1, width)],
        )

    def unpack(self) -> list[TokenLogprobs]:
        """Return the log-probabilities at all positions."""
        return [self.position(index) for index in range(self.num_positions)]


class RequestUpdate(NamedTuple):
    """What is new of one request: tokens sampled since the last update, and how it ended."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None  # "stop", "length", "abort" or "error" (no next token); None: runs
    # the id from `stop_token_ids` that ended it, or the text of the error
    stop_reason: int | str | None
    num_cached_tokens: int  # prompt tokens found in the prefix cache at first admission
    logprobs: list[TokenLogprobs] | None = None  # one for each new token, if requested
    # if requested, complete with the first new token: those of all prompt tokens but the first
    prompt_logprobs: PackedLogprobs | None = None


_NO_IDS: frozenset[int] = frozenset()
_NOTHING_LEFT = (
    "the request's settings leave no next token: allowed_token_ids, bad_words or min_tokens "
    "exclude every token that structured_outputs or allowed_token_ids allows; relax one of them"
)


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The engine's record of a request.

    `tokens` holds the prompt and every token that results have returned. Steps in flight may have
    sampled more tokens, whose ids only the GPU knows. `num_computed_tokens` counts the tokens whose
    keys and values are stored, or will be stored by a step in flight. Once it has reached
    `prefill_target`, one more token is known or in flight, and it is the next input.
    """

    __slots__ = (
        "block_digests",
        "block_table",
        "end_token_ids",
        "grammar",
        "ignores_eos",
        "lists",
        "matcher",
        "max_total_tokens",
        "min_total_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_steps_in_flight",
        "prefill_target",
        "prompt_logprobs",
        "reads_tokens",
        "request_id",
        "row",
        "row_fields",
        "rules",
        "seed",
        "status",
        "stop_token_ids",
        "tokens",
    )

    def __init__(
        self,
        request: AddRequest,
        *,
        seed: int,
        eos_token_ids: tuple[int, ...],
        max_total_tokens: int,
        grammar: Grammar | None = None,
    ) -> None:
        params = request.sampling_params
        self.request_id = request.request_id
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.tokens)
        self.seed = seed
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self.grammar = grammar
        self.matcher: Matcher | None = None  # follows the output from the first mask on
        eos = () if params.ignore_eos else eos_token_ids
        if grammar is not None:
            eos = tuple(grammar.end_token_ids)
        self.ignores_eos = params.ignore_eos
        self.end_token_ids = self.stop_token_ids.union(eos)
        self.min_total_tokens = self.num_prompt_tokens + params.min_tokens
        self.rules = TokenRules.from_params(params, request.bad_word_ids, self.end_token_ids)
        # with a grammar, its masks exclude end tokens
        masked = sorted(self.end_token_ids) if params.min_tokens and grammar is None else []
        self.row_fields, self.lists = row_fields(
            params, self.num_prompt_tokens, seed, request.bad_word_ids, masked
        )
        self._note_readers()
        # also None once they have been returned
        self.prompt_logprobs: LogprobBlock | None = None
        if (k := params.prompt_logprobs) is not None:
            self.prompt_logprobs = LogprobBlock.blank(0, 1, self.num_prompt_tokens - 1, k)
        limit = max_total_tokens
        if params.max_tokens is not None:
            limit = min(limit, self.num_prompt_tokens + params.max_tokens)
        self.max_total_tokens = limit

        self.status = Status.WAITING
        self.num_cached_tokens = -1  # -1: not admitted yet
        self.num_steps_in_flight = 0
        self.block_digests: list[bytes] = []
        self.reset()

    def get_matcher(self) -> Matcher:
        """Return the matcher of the sequence's grammar; start it at the first call."""
        if self.matcher is None:
            assert self.grammar is not None
            self.matcher = self.grammar.start()
        return self.matcher

    def refuse(self, token_id: int) -> str | None:
        """Return why a sampled token is excluded, or None if it is not.

        The workers sample an excluded token only if no token is left.
        """
        if self.rules is not None and self.rules.excludes(
            token_id, self.tokens, self.num_prompt_tokens
        ):
            return _NOTHING_LEFT
        if self.matcher is None or self.matcher.advance(token_id):
            return None
        return f"structured_outputs: {self.matcher.failure}"

    def held_back_ids(self) -> frozenset[int]:
        """Return the tokens that a sequence with a grammar samples only if no other is left."""
        if len(self.tokens) < self.min_total_tokens:
            return self.end_token_ids
        if self.ignores_eos and self.grammar is not None:
            return self.grammar.end_token_ids
        return _NO_IDS

    def ends_at_end_token(self) -> bool:
        """Whether the sequence ends if its newest token is an end token."""
        # with a grammar, an end token before `min_tokens` means that no other token was left
        return self.grammar is not None or len(self.tokens) > self.min_total_tokens

    def take_prompt_logprobs(self) -> PackedLogprobs:
        """Return the prompt's complete log-probabilities, and stop computing them."""
        complete, self.prompt_logprobs = self.prompt_logprobs, None
        assert complete is not None
        self.row_fields["num_prompt_logprobs"] = -1
        self._note_readers()
        return PackedLogprobs.from_block(complete)

    def _note_readers(self) -> None:
        readers = asks_for(self.row_fields, TOKEN_READERS)
        self.reads_tokens = readers or "bad_word_ids" in self.lists

    def reset(self) -> None:
        """Return to the state of a waiting sequence, with nothing in the KV cache."""
        self.row = -1
        self.block_table: list[int] = []
        self.num_computed_tokens = 0
        self.num_registered_blocks = 0
        self.prefill_target = 0
