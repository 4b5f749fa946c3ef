"""ServerSettings: the settings of the server, besides the engine's."""

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated

from annotated_types import Interval

from tpllm.fields.docs import documented
from tpllm.fields.validation import Must, above, check_fields
from tpllm.sampling_params import MAX_LOGPROBS, MAX_N
from tpllm.server.answer_formats import ReasoningParser, ToolCallParser
from tpllm.vllm_keywords import checks_keywords

SECONDS = above(0, 7 * 24 * 3600)
Address = Annotated[
    str,
    Must(lambda host: host and host == host.strip(), "must be an address, such as '127.0.0.1'"),
]
ApiKey = Annotated[
    str,
    Must(len, "must be a string that is not empty"),
    Must(re.compile("[!-~]+").fullmatch, "must be visible ASCII characters, without spaces"),
]
ModelName = str | tuple[str, ...] | list[str]
Origin = Annotated[
    str,
    Must(
        re.compile(r"\*|[a-z][a-z\d+.-]*://[^/?#]*").fullmatch,
        "is not an origin; give only scheme, host and port, such as 'https://example.org', or '*'",
    ),
]
HostName = Annotated[
    str,
    Must(
        re.compile(r"\*|[\w.-]+").fullmatch,
        "is not a host name; give only the name, without scheme and port, such as "
        "'llm.example.org', or '*'",
    ),
]


@documented
@checks_keywords("ServerSettings", {})
@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The settings of the server.

    Raises:
        ValueError: a value is out of range, or not of its type.
        UnknownSettingError: there is no such keyword.
    """

    host: Address = "127.0.0.1"
    """address to listen on; only this machine can reach the default"""
    port: Annotated[int, Interval(ge=0, le=65535)] = 8000
    """TCP port; 0 takes a free one, which the first line of the log shows"""
    api_key: ApiKey | None = field(default=None, repr=False)
    """key that clients must send as `Authorization: Bearer ...`; None requires no key"""
    served_model_name: (
        Annotated[ModelName, Must(len, "is empty; leave it out, or give a name")] | None
    ) = None  # kept as None or a tuple
    """the model's name in requests and answers, or several names, separated by commas. Answers have
    the first name. None for the model's own
    """
    cors_origins: tuple[Origin, ...] | list[Origin] = ()  # kept as a tuple
    """web origins whose pages may call the server, such as "https://example.org"; "*" is all of
    them
    """
    allowed_hosts: tuple[HostName, ...] | list[HostName] = ()  # kept as a tuple, in lower case
    """allowed host names of the server, besides localhost and IP addresses, such as
    "llm.example.org"; "*" is all of them. Other names are refused if allowed_hosts is given, and on
    a loopback host without api_key
    """
    max_body_bytes: Annotated[int, Interval(ge=1024, le=2**31 - 1)] = 8 * 2**20
    """largest request body"""
    max_queue: Annotated[int, Interval(ge=0, le=2**20)] = 1024
    """most sequences that may wait beyond the `max_num_seqs` that can run; more are refused with
    429
    """
    max_n: Annotated[int, Interval(ge=1, le=MAX_N)] = 128
    """most answers to one prompt"""
    max_logprobs: Annotated[int, Interval(ge=0, le=MAX_LOGPROBS)] = MAX_LOGPROBS
    """most alternatives in log-probabilities"""
    max_output_tokens: Annotated[int | None, Interval(ge=1, le=2**28)] = None
    """most tokens of an answer; None for as many as `max_model_len` leaves room for"""
    request_timeout_s: Annotated[float, SECONDS] = 3600.0
    """longest time for a request, including waiting, in seconds"""
    client_timeout_s: Annotated[float, SECONDS] = 60.0
    """longest time a client may take to send its request, or to read the data sent to it, in
    seconds
    """
    drain_timeout_s: Annotated[float, SECONDS] = 30.0
    """how long running requests may continue after SIGTERM, in seconds"""
    parse_reasoning: bool = True
    """whether chat answers return <think>...</think> separately, as reasoning"""
    reasoning_parser: ReasoningParser = "auto"
    """how reasoning begins: "deepseek_r1", always, even without <think>; "qwen3", only after it;
    "auto" decides by the model's chat template
    """
    tool_call_parser: ToolCallParser = "auto"
    """the format of tool calls: Qwen's ("hermes"), Llama 3's ("llama3_json") or Mistral's; "auto"
    decides by the model's chat template
    """
    page: bool = True
    """whether `/` is the built-in page"""
    log_requests: bool = False
    """whether each request is logged: its path, status and duration, never its text"""

    def __post_init__(self) -> None:
        names = {name: getattr(self, name) for name in ("cors_origins", "allowed_hosts")}
        if self.served_model_name is not None:
            names["served_model_name"] = self.served_model_name
        for name, value in names.items():
            texts = _split(name, value)
            if name == "allowed_hosts":
                texts = tuple(host.lower().removesuffix(".") for host in texts)
            object.__setattr__(self, name, texts)  # the dataclass is frozen
        check_fields(self)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_local_host(self.host)


def is_local_host(host: str) -> bool:
    """Whether a host name or address, in lower case, always is this machine."""
    if host == "localhost" or host.endswith(".localhost"):  # RFC 6761, section 6.3
        return True
    address = address_of(host)  # None for another name, such as 127.0.0.1.example.org
    return address is not None and address.is_loopback


def address_of(host: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address that a text is; None if it is a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def _split(name: str, value: object) -> tuple[str, ...]:
    """Return a tuple of strings; each string of `value` may hold several with commas between."""
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, tuple | list):
        raise ValueError(f"{name}={value!r} must be a string, or a list of strings")
    texts: list[str] = []
    for text in given:
        parts = [part.strip() for part in text.split(",")] if isinstance(text, str) else []
        if not all(parts) or not parts:
            raise ValueError(f"{name} holds {text!r}; give strings that are not empty")
        texts += parts
    return tuple(texts)
