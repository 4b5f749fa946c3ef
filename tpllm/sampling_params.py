"""SamplingParams: how the tokens of a request are drawn, and when it ends."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

from tpllm.checks import check_bool, check_int, check_number, check_seed
from tpllm.errors import refuse_unknown_settings

# From about 1000 on every token is equally likely; at 1e37 float32 scores would overflow.
MAX_TEMPERATURE = 1e6


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw a request's tokens, and when to stop. Names and defaults are vLLM's.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token (greedy)
        max_tokens: most tokens to generate; None for as many as `max_model_len` leaves room for
        min_tokens: end tokens and `stop_token_ids` cannot be drawn before this many tokens
        ignore_eos: go on past the model's end tokens (to measure speed)
        stop_token_ids: tokens that end the request, besides the model's end tokens
        seed: 64-bit, signed or unsigned; equal seeds draw equal tokens whatever the batch. None
            draws from the engine's seed, differently for each request.

    Raises:
        ValueError: a value is out of range, or not of its type.
        UnknownSettingError: there is no such keyword.
    """

    temperature: float = 1.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] | list[int] = ()  # kept as a tuple
    seed: int | None = None

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        # Before __init__, whose own TypeError would not say which name is the nearest.
        refuse_unknown_settings(cls.__name__, settings, (field.name for field in fields(cls)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._keep("temperature", _check_temperature(self.temperature))
        if self.max_tokens is not None:
            self._keep("max_tokens", check_int("max_tokens", self.max_tokens, minimum=1))
        self._keep("min_tokens", check_int("min_tokens", self.min_tokens, minimum=0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; "
                "lower min_tokens or raise max_tokens"
            )
        check_bool("ignore_eos", self.ignore_eos)
        self._keep("stop_token_ids", _check_token_ids("stop_token_ids", self.stop_token_ids))
        if self.seed is not None:
            self._keep("seed", check_seed("seed", self.seed))

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everyone else


def _check_temperature(value: object) -> float:
    temperature = check_number("temperature", value)
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise ValueError(
            f"temperature={temperature} must be between 0 (greedy) and {MAX_TEMPERATURE:g}"
        )
    return temperature


def _check_token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:  # vLLM's way to say "none"
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r} must be a list of token ids")
    return tuple(check_int(f"{name}[{i}]", id_, minimum=0) for i, id_ in enumerate(value))
