"""SamplingParams: how a request samples its tokens, what it reports, and when it ends."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

import xxhash
from annotated_types import Interval

from tpllm.checks import MAX_INT32, MAX_SEED, MIN_SEED, is_unicode
from tpllm.fields.docs import documented
from tpllm.fields.validation import Must, between, check_fields
from tpllm.structured_outputs import StructuredOutputsParams
from tpllm.vllm_keywords import SAMPLING, checks_keywords

# From about 1000 on all tokens are equally likely; at 1e37 float32 scores would overflow.
MAX_TEMPERATURE = 1e6
# Logits are multiplied or divided by it; beyond this, float32 logits become 0 or infinity.
MAX_REPETITION_PENALTY = 1e6
MAX_N = 16384
# Each reported token costs memory in every result. OpenAI's limit, and vLLM's default limit.
MAX_LOGPROBS = 20
# OpenAI's range: 100 makes a token certain, -100 impossible, against any ordinary logit.
MAX_LOGIT_BIAS = 100.0

Text = Annotated[
    str,
    Must(len, "is empty, and matches everywhere; leave it out"),
    Must(is_unicode, "is not valid Unicode; leave it out"),
]
TokenId = Annotated[int, Interval(ge=0, le=MAX_INT32)]
NumTokens = Annotated[int, Interval(ge=1, le=MAX_INT32)]
NumLogprobs = Annotated[int, Interval(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, between(-2, 2)]
Temperature = Annotated[
    float,
    Must(
        lambda value: 0 <= value <= MAX_TEMPERATURE,
        f"must be between 0 (greedy) and {MAX_TEMPERATURE:g}",
    ),
]
TopP = Annotated[
    float, Must(lambda value: 0 < value <= 1, "must be above 0 and at most 1 (all tokens)")
]
RepetitionPenalty = Annotated[
    float,
    Must(
        lambda value: 1 / MAX_REPETITION_PENALTY <= value <= MAX_REPETITION_PENALTY,
        f"must be above 0: between {1 / MAX_REPETITION_PENALTY:g} and "
        f"{MAX_REPETITION_PENALTY:g}, 1 for none",
    ),
]


class RequestOutputKind(Enum):
    """What each `RequestOutput` of a streamed request holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last one
    FINAL_ONLY = 2  # everything, once the request has ended


@documented
@checks_keywords("SamplingParams", SAMPLING)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample a request's tokens, what to report, and when to stop.

    Names, defaults and meanings are vLLM's. They change the logits in this order:
    structured_outputs, allowed_token_ids, bad_words, min_tokens, logit_bias, repetition_penalty,
    frequency_penalty and presence_penalty; then temperature, min_p, top_k and top_p. Greedy
    requests ignore the last three.

    Raises:
        ValueError: a value is out of range, not of its type, or contradicts another.
        UnknownSettingError: there is no such keyword.
    """

    n: Annotated[int, Interval(ge=1, le=MAX_N)] = 1
    """continuations of the prompt, sampled independently"""
    temperature: Temperature = 1.0
    """divides the logits; 0 always takes the likeliest token (greedy)"""
    top_p: TopP = 1.0
    """sample from the smallest set of likeliest tokens whose probabilities add up to this; in
    (0, 1]
    """
    top_k: Annotated[int, Interval(ge=-1, le=MAX_INT32)] = 0
    """sample from this many likeliest tokens; 0 or -1 for all"""
    min_p: Annotated[float, between(0, 1)] = 0.0
    """sample from tokens whose probability is at least this fraction of the likeliest token's; in
    [0, 1]
    """
    presence_penalty: Penalty = 0.0
    """subtracted from the logits of tokens generated before; in [-2, 2]"""
    frequency_penalty: Penalty = 0.0
    """subtracted for each time a token has been generated; in [-2, 2]"""
    repetition_penalty: RepetitionPenalty = 1.0
    """divides the positive logits of tokens of the prompt or generated before, and multiplies the
    negative ones; 1 for none
    """
    seed: Annotated[int, Interval(ge=MIN_SEED, le=MAX_SEED)] | None = None
    """64-bit, signed or unsigned; equal seeds sample equal tokens in any batch. None (or -1, as in
    vLLM) uses the engine's seed, differently for each request.
    """
    stop: str | tuple[Text, ...] | list[Text] = ()  # kept as a tuple
    """one or several strings that end the request where they appear"""
    stop_token_ids: tuple[TokenId, ...] | list[TokenId] = ()  # kept as a tuple
    """tokens that end the request, besides the model's end tokens"""
    bad_words: tuple[Text, ...] | list[Text] = ()  # kept as a tuple
    """words that the output never contains, alone or after a space. The token that would complete
    one cannot be sampled, however the word is divided into tokens (a long word only in the fewest
    tokens; a request's words share 4,096 token ids). A longer token may contain one: "not" does not
    ban the token "nothing"
    """
    logit_bias: dict[TokenId, float] | None = field(default=None, hash=False)
    """added to the logits of these token ids; clamped to [-100, 100]"""
    allowed_token_ids: tuple[TokenId, ...] | list[TokenId] | None = None  # kept as a tuple
    """only these can be sampled; None for all"""
    max_tokens: NumTokens | None = 16
    """most tokens to generate; None for as many as `max_model_len` leaves room for"""
    min_tokens: Annotated[int, Interval(ge=0, le=MAX_INT32)] = 0
    """end tokens and `stop_token_ids` cannot be sampled before this many tokens"""
    ignore_eos: bool = False
    """continue past the model's end tokens (to measure speed)"""
    logprobs: NumLogprobs | None = None
    """report the log-probabilities of each generated token and of this many likeliest tokens, at
    most 20, from the model's unchanged logits. None for none
    """
    prompt_logprobs: NumLogprobs | None = None
    """the same for the prompt's tokens except the first. Such a request computes its whole prompt,
    even if the prefix cache holds it
    """
    detokenize: bool = True
    """whether to decode token ids into text"""
    skip_special_tokens: bool = True
    """leave special tokens out of the text"""
    spaces_between_special_tokens: bool = True
    """put spaces between special tokens in the text"""
    include_stop_str_in_output: bool = False
    """keep the `stop` string that ended the request in its output"""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """what each output of a streamed request holds"""
    structured_outputs: StructuredOutputsParams | None = None
    """the constraint on the whole answer, such as a JSON schema. End tokens can be sampled only
    where the answer is complete. Where no other token can follow, an end token ends the request
    despite min_tokens and ignore_eos.
    """

    def __post_init__(self) -> None:
        self._normalize()
        check_fields(self)
        if self.seed == -1:
            self._keep("seed", None)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids=[] allows no token; use None for all")
            self._keep("allowed_token_ids", tuple(dict.fromkeys(self.allowed_token_ids)))
        if self.logit_bias is not None:
            clamped = {
                id_: min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, bias))
                for id_, bias in self.logit_bias.items()
            }
            self._keep("logit_bias", clamped)
        self._check_together()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that nothing is sampled."""
        return self.temperature == 0

    def of_continuation(self, index: int) -> "SamplingParams":
        """Return the parameters of one of the n continuations.

        Each has its own seed, since equal seeds sample equal tokens. Only the first reports
        `prompt_logprobs`.
        """
        if index == 0 or (self.seed is None and self.prompt_logprobs is None):
            return self
        params = copy.copy(self)  # skips the checks, which have passed and may be slow
        if self.seed is not None:
            params._keep("seed", xxhash.xxh64_intdigest(f"{self.seed}/{index}".encode()))
        params._keep("prompt_logprobs", None)
        return params

    def _normalize(self) -> None:
        """Bring values to their fields' types where vLLM and JSON have others."""
        for name in ("stop", "stop_token_ids", "bad_words"):
            if getattr(self, name) is None:
                self._keep(name, ())
        if isinstance(self.stop, str):
            self._keep("stop", (self.stop,))
        if isinstance(self.logit_bias, Mapping):  # JSON's keys are strings
            numbers = {
                int(key) if isinstance(key, str) and key.isdecimal() else key: bias
                for key, bias in self.logit_bias.items()
            }
            self._keep("logit_bias", numbers)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) == -1:
                raise ValueError(
                    f"{name}=-1, the whole vocabulary, is not supported; ask for at most "
                    f"{MAX_LOGPROBS}"
                )
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(
                f"output_kind={self.output_kind!r} must be a RequestOutputKind: "
                f"{', '.join(kind.name for kind in RequestOutputKind)}"
            )

    def _check_together(self) -> None:
        if self.is_greedy and self.n > 1:
            raise ValueError(
                f"n={self.n} with temperature=0 would give the same continuation {self.n} times; "
                "use n=1, or a temperature above 0"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; "
                "lower min_tokens or raise max_tokens"
            )
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop={list(self.stop)!r} needs the text, and detokenize=False makes none; use "
                "detokenize=True, or stop_token_ids"
            )

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen
