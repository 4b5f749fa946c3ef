"""The bodies of requests, with OpenAI's and vLLM's names. Unknown fields of a body are refused.

Inside a body's objects (messages, tools, stream_options) unknown fields are ignored, because
clients store their own data there. A field that is null counts as left out. Only types are checked
here; SamplingParams checks ranges, so they are the same in every interface. Lists and strings have
a maximum length, since other clients wait while they are parsed.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from tpllm.checks import MAX_INT32, are_ints, short
from tpllm.server.foreign_fields import without_foreign_fields
from tpllm.text.conversation import ROLES

T = TypeVar("T")

MAX_FIELDS = 100  # of one object, including unknown ones
MAX_PROMPTS = 16384
MAX_MESSAGES = 4096
MAX_PARTS = 8192  # messages, their parts and calls together
MAX_ENTRIES = 1024  # of other lists of objects or strings
MAX_STOPS = 64
MAX_TEXT_CHARS = 1024  # of a stop string or a bad word

Entries = Annotated[list[T], Field(max_length=MAX_ENTRIES, fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]


def _length(value: object) -> object:
    return None if value == -1 and isinstance(value, int) else value


# llama.cpp's and LM Studio's clients send -1 for no limit.
Length = Annotated[int | None, BeforeValidator(_length)]
ShortText = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


# Tags select an alternative by type, so that an error is about the intended one. A value of another
# type gets the first one, whose tag is used in the message.
TEXT_OR_LIST, LIST = "(a string or a list of strings)", "(list)"
TEXT_OR_OBJECT, OBJECT = "(a string or an object)", "(object)"


Stops = Annotated[
    Annotated[ShortText, Tag(TEXT_OR_LIST)]
    | Annotated[list[ShortText], Field(max_length=MAX_STOPS, fail_fast=True), Tag(LIST)],
    Discriminator(lambda value: LIST if isinstance(value, list) else TEXT_OR_LIST),
]
TextOrObject = Annotated[
    Annotated[str, Tag(TEXT_OR_OBJECT)] | Annotated[dict[str, Any], Tag(OBJECT)],
    Discriminator(lambda value: OBJECT if isinstance(value, dict) else TEXT_OR_OBJECT),
]


class Body(BaseModel):
    """A strict body: "0.7" is not a number, true is not 1, and an unknown field is an error.

    Other servers' fields are accepted at values without effect: see `foreign_fields`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(
                f"the body has {len(value)} fields, more than {MAX_FIELDS}; leave some out"
            )
        return without_foreign_fields(value, cls.model_fields) if isinstance(value, dict) else value


class Inner(BaseModel):
    """An object inside a body: its known fields are strict, and others are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class StreamOptions(Inner):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM: usage so far in every chunk
    include_obfuscation: bool | None = None  # OpenAI; without effect


class Structured(Body):
    """Fields for structured outputs."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: TextOrObject | None = None
    guided_regex: str | None = None
    guided_choice: Entries[str] | None = None
    guided_grammar: str | None = None


class WithoutEffect(Body):
    """OpenAI's fields for accounts, storage and routing, which have no effect here.

    They are accepted because programs for OpenAI send them.
    """

    user: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class GenerationRequest(Structured, WithoutEffect):
    """The common fields of completions and chat completions."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stops | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Length = None
    # vLLM's additions
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Ids | None = None
    bad_words: Entries[ShortText] | None = None
    allowed_token_ids: Ids | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None


def _check_prompt(value: Any) -> list[str | list[int]]:
    """Return a string, token ids, or a list of either as a list of prompts."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("prompt=[] is empty; give a string or token ids")
    if isinstance(value, list) and are_ints(items):
        return _checked_ids([items])
    if len(items) > MAX_PROMPTS:
        raise ValueError(f"prompt has {len(items)} entries, more than {MAX_PROMPTS}; send fewer")
    for i, item in enumerate(items):
        if not isinstance(item, str) and not (isinstance(item, list) and are_ints(item)):
            raise ValueError(
                f"prompt[{i}]={short(item)} must be a string or a list of token ids"
                if isinstance(value, list)
                else f"prompt={short(item)} must be a string, token ids, or a list of these"
            )
    return _checked_ids(items)


def _checked_ids(prompts: list[str | list[int]]) -> list[str | list[int]]:
    """Check that numbers can be token ids; the engine checks them against the vocabulary."""
    for prompt in prompts:
        for token_id in (min(prompt), max(prompt)) if isinstance(prompt, list) and prompt else ():
            if not 0 <= token_id <= MAX_INT32:
                raise ValueError(f"prompt holds {short(token_id)}, which is not a token id")
    return prompts


_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT = {"anyOf": [_TEXT, _IDS, *({"type": "array", "items": each} for each in (_TEXT, _IDS))]}
Prompts = Annotated[Any, BeforeValidator(_check_prompt), WithJsonSchema(_PROMPT)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompts  # list[str | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


def _check_messages(value: Any) -> Any:
    """Check sizes and roles. `text/conversation.py` checks the rest when it renders messages."""
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        return value
    num_splits = len(value)
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            continue
        role = message.get("role")
        if role is not None and role not in ROLES:
            known = ", ".join(map(repr, ROLES[:-1]))
            raise ValueError(f"messages[{i}].role={short(role)} must be {known} or {ROLES[-1]!r}")
        for name in ("content", "tool_calls"):
            num_entries = len(message[name]) if isinstance(message.get(name), list) else 0
            if num_entries > MAX_ENTRIES:
                raise ValueError(
                    f"messages[{i}].{name} has {num_entries} entries, more than {MAX_ENTRIES}"
                )
            num_splits += num_entries
    if num_splits > MAX_PARTS:
        raise ValueError(f"messages have more than {MAX_PARTS} parts and calls; send fewer")
    return value


_OBJECT = {"type": "object"}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _OBJECT}, {"type": "null"}]},
        "name": _TEXT,
        "reasoning_content": _TEXT,
        "tool_calls": {"type": "array", "items": _OBJECT},
        "tool_call_id": _TEXT,
    },
}
Messages = Annotated[
    list[dict[str, Any]],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    BeforeValidator(_check_messages),
    WithJsonSchema({"type": "array", "minItems": 1, "items": _MESSAGE}),
]


class Function(Inner):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Inner):
    type: Literal["function"] = "function"
    function: Function


class TemplateOptions(Body):
    """Inputs of the chat template besides messages."""

    tools: Entries[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None


class ChatCompletionRequest(GenerationRequest, TemplateOptions):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Length = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: TextOrObject | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    modalities: Entries[Literal["text"]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    verbosity: Literal["low", "medium", "high"] | None = None  # without effect
    prediction: dict[str, Any] | None = None  # without effect: it only speeds up OpenAI's server


class TokenizeRequest(TemplateOptions):
    """POST /tokenize: a string or a conversation."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Messages | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response with a status of 400 or more."""

    error: ErrorDetail
