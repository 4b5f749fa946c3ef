"""SamplingParams: how a request samples its tokens, what it reports, and when it ends."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import xxhash

from tpllm.checks import check_bool, check_int, check_number, check_seed, is_unicode
from tpllm.fields.docs import documented
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

    n: int = 1
    """continuations of the prompt, sampled independently"""
    temperature: float = 1.0
    """divides the logits; 0 always takes the likeliest token (greedy)"""
    top_p: float = 1.0
    """sample from the smallest set of likeliest tokens whose probabilities add up to this; in
    (0, 1]
    """
    top_k: int = 0
    """sample from this many likeliest tokens; 0 or -1 for all"""
    min_p: float = 0.0
    """sample from tokens whose probability is at least this fraction of the likeliest token's; in
    [0, 1]
    """
    presence_penalty: float = 0.0
    """subtracted from the logits of tokens generated before; in [-2, 2]"""
    frequency_penalty: float = 0.0
    """subtracted for each time a token has been generated; in [-2, 2]"""
    repetition_penalty: float = 1.0
    """divides the positive logits of tokens of the prompt or generated before, and multiplies the
    negative ones; 1 for none
    """
    seed: int | None = None
    """64-bit, signed or unsigned; equal seeds sample equal tokens in any batch. None (or -1, as in
    vLLM) uses the engine's seed, differently for each request.
    """
    stop: str | tuple[str, ...] | list[str] = ()  # kept as a tuple
    """one or several strings that end the request where they appear"""
    stop_token_ids: tuple[int, ...] | list[int] = ()  # kept as a tuple
    """tokens that end the request, besides the model's end tokens"""
    bad_words: tuple[str, ...] | list[str] = ()  # kept as a tuple
    """words that the output never contains, alone or after a space. The token that would complete
    one cannot be sampled, however the word is divided into tokens (a long word only in the fewest
    tokens; a request's words share 4,096 token ids). A longer token may contain one: "not" does not
    ban the token "nothing"
    """
    logit_bias: dict[int, float] | None = field(default=None, hash=False)
    """added to the logits of these token ids; clamped to [-100, 100]"""
    allowed_token_ids: tuple[int, ...] | list[int] | None = None  # kept as a tuple
    """only these can be sampled; None for all"""
    max_tokens: int | None = 16
    """most tokens to generate; None for as many as `max_model_len` leaves room for"""
    min_tokens: int = 0
    """end tokens and `stop_token_ids` cannot be sampled before this many tokens"""
    ignore_eos: bool = False
    """continue past the model's end tokens (to measure speed)"""
    logprobs: int | None = None
    """report the log-probabilities of each generated token and of this many likeliest tokens, at
    most 20, from the model's unchanged logits. None for none
    """
    prompt_logprobs: int | None = None
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
        self._check_sampling()
        self._check_token_lists()
        self._check_ends()
        self._check_reports()

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

    def _check_sampling(self) -> None:
        self._keep("n", check_int("n", self.n, minimum=1, maximum=MAX_N))
        self._keep("temperature", _check_temperature(self.temperature))
        top_p = check_number("top_p", self.top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must be above 0 and at most 1 (all tokens)")
        self._keep("top_p", top_p)
        self._keep("top_k", check_int("top_k", self.top_k, minimum=-1))
        self._keep("min_p", _check_range("min_p", self.min_p, 0, 1))
        for name in ("presence_penalty", "frequency_penalty"):
            self._keep(name, _check_range(name, getattr(self, name), -2, 2))
        self._keep("repetition_penalty", _check_repetition_penalty(self.repetition_penalty))
        if self.seed is not None:
            seed = check_seed("seed", self.seed)
            self._keep("seed", None if seed == -1 else seed)
        if self.is_greedy and self.n > 1:
            raise ValueError(
                f"n={self.n} with temperature=0 would give the same continuation {self.n} times; "
                "use n=1, or a temperature above 0"
            )

    def _check_token_lists(self) -> None:
        self._keep("stop_token_ids", _check_token_ids("stop_token_ids", self.stop_token_ids))
        self._keep("bad_words", _check_texts("bad_words", self.bad_words))
        self._keep("logit_bias", _check_logit_bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = _check_token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise ValueError("allowed_token_ids=[] allows no token; use None for all")
            self._keep("allowed_token_ids", tuple(dict.fromkeys(allowed)))

    def _check_ends(self) -> None:
        if self.max_tokens is not None:
            self._keep("max_tokens", check_int("max_tokens", self.max_tokens, minimum=1))
        self._keep("min_tokens", check_int("min_tokens", self.min_tokens, minimum=0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; "
                "lower min_tokens or raise max_tokens"
            )
        check_bool("ignore_eos", self.ignore_eos)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self._keep("stop", _check_texts("stop", stop))
        check_bool("detokenize", self.detokenize)
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop={list(self.stop)!r} needs the text, and detokenize=False makes none; use "
                "detokenize=True, or stop_token_ids"
            )

    def _check_reports(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            self._keep(name, _check_logprobs(name, getattr(self, name)))
        check_bool("skip_special_tokens", self.skip_special_tokens)
        check_bool("spaces_between_special_tokens", self.spaces_between_special_tokens)
        check_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(
                f"output_kind={self.output_kind!r} must be a RequestOutputKind: "
                f"{', '.join(kind.name for kind in RequestOutputKind)}"
            )
        structured = self.structured_outputs
        if structured is not None and not isinstance(structured, StructuredOutputsParams):
            raise ValueError(f"structured_outputs={structured!r} must be a StructuredOutputsParams")

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen


def _check_range(name: str, value: object, minimum: float, maximum: float) -> float:
    number = check_number(name, value)
    if not minimum <= number <= maximum:
        raise ValueError(f"{name}={number} must be between {minimum} and {maximum}")
    return number


def _check_temperature(value: object) -> float:
    temperature = check_number("temperature", value)
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise ValueError(
            f"temperature={temperature} must be between 0 (greedy) and {MAX_TEMPERATURE:g}"
        )
    return temperature


def _check_repetition_penalty(value: object) -> float:
    penalty = check_number("repetition_penalty", value)
    if not 1 / MAX_REPETITION_PENALTY <= penalty <= MAX_REPETITION_PENALTY:
        raise ValueError(
            f"repetition_penalty={penalty} must be above 0: between "
            f"{1 / MAX_REPETITION_PENALTY:g} and {MAX_REPETITION_PENALTY:g}, 1 for none"
        )
    return penalty


def _check_logprobs(name: str, value: object) -> int | None:
    if value is None:
        return None
    if value == -1:
        raise ValueError(
            f"{name}=-1, the whole vocabulary, is not supported; ask for at most {MAX_LOGPROBS}"
        )
    return check_int(name, value, minimum=0, maximum=MAX_LOGPROBS)


def _check_logit_bias(value: object) -> dict[int, float] | None:
    """Return token ids as ints, also where JSON has them as strings, and clamped biases."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias={value!r} must be a dict from token ids to numbers")
    bias = {}
    for key, number in value.items():
        token_id = int(key) if isinstance(key, str) and key.isdecimal() else key
        token_id = check_int("logit_bias key", token_id, minimum=0)
        number = check_number(f"logit_bias[{token_id}]", number)
        bias[token_id] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, number))
    return bias


def _check_texts(name: str, value: object) -> tuple[str, ...]:
    if value is None:  # vLLM allows it
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r} must be a list of strings")
    texts = tuple(value)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{i}]={text!r} must be a string")
        if not text:
            raise ValueError(f"{name}[{i}] is empty, and matches everywhere; leave it out")
        if not is_unicode(text):
            raise ValueError(f"{name}[{i}]={text!r} is not valid Unicode; leave it out")
    return texts


def _check_token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:  # vLLM allows it
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r} must be a list of token ids")
    return tuple(check_int(f"{name}[{i}]", id_, minimum=0) for i, id_ in enumerate(value))
