"""The part of AsyncLLM that the server needs, as protocols, so that tests can replace it."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from tpllm.outputs import RequestOutput
from tpllm.sampling_params import SamplingParams
from tpllm.text.detokenizer import Detokenizer


class ModelFacts(Protocol):
    @property
    def name(self) -> str: ...


class Config(Protocol):
    """The part of EngineConfig that the server needs."""

    @property
    def model(self) -> str | None: ...
    @property
    def generation_defaults(self) -> dict[str, Any]: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def model_config(self) -> ModelFacts: ...


class Tokenizer(Protocol):
    """The part of `text.Tokenizer` that the server needs. Several threads use it at a time."""

    @property
    def has_chat_template(self) -> bool: ...

    def encode_batch(
        self, texts: list[str], add_special_tokens: bool = True
    ) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def decode_one(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_offsets(self, text: str, add_special_tokens: bool = True) -> list[int] | None: ...

    def detokenizer(
        self, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> Detokenizer: ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str: ...


class Engine(Protocol):
    @property
    def config(self) -> Config: ...

    @property
    def dead_error(self) -> BaseException | None: ...

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]: ...

    def get_tokenizer(self) -> Tokenizer: ...

    async def stats(self) -> Any: ...

    async def close(self) -> None: ...
