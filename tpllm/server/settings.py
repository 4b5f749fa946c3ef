"""ServerSettings: everything about the server that is not the engine's."""

import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from tpllm.checks import check_bool, check_int, check_number
from tpllm.sampling_params import MAX_LOGPROBS, MAX_N
from tpllm.vllm_keywords import checks_keywords

# Smallest and largest value of each whole number.
RANGES = {
    "port": (0, 65535),
    "max_body_bytes": (1024, 2**31 - 1),
    "max_queue": (0, 2**20),
    "max_n": (1, MAX_N),
    "max_logprobs": (0, MAX_LOGPROBS),
    "max_output_tokens": (1, 2**28),
}
OPTIONAL = ("max_output_tokens",)  # of these, None is a value
SECONDS = ("request_timeout_s", "client_timeout_s", "drain_timeout_s")
SWITCHES = ("parse_reasoning", "page", "log_requests")
MAX_SECONDS = 7 * 24 * 3600.0


@checks_keywords("ServerSettings", {})
@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Every setting of the server, once.

    Attributes:
        host: address to listen on; the default is reached from this machine alone
        port: TCP port; 0 takes a free one, which the first line of the log names
        api_key: what clients must send as `Authorization: Bearer ...`; None lets everyone in
        served_model_name: what the model is called in requests and answers, or several names with
            commas between them, of which answers give the first; None for the model's own
        cors_origins: web origins whose pages may call the server, such as "https://example.org";
            "*" is all of them
        allowed_hosts: host names by which the server may be called, besides localhost and IP
            addresses, such as "llm.example.org"; "*" is all of them. Other names are refused where
            allowed_hosts is given, and on a loopback host without api_key
        max_body_bytes: largest request body
        max_queue: most sequences that may wait beyond the `max_num_seqs` that can run; more are
            refused with 429
        max_n: most answers to one prompt
        max_logprobs: most alternatives that log-probabilities may be asked for
        max_output_tokens: most tokens an answer may be given; None for what `max_model_len` leaves
        request_timeout_s: longest time for a request, waiting included, in seconds
        client_timeout_s: longest time a client may take to send its request, or to take in what
            has been sent to it, in seconds
        drain_timeout_s: how long running requests may go on after SIGTERM, in seconds
        parse_reasoning: whether chat answers give <think>...</think> apart, as reasoning
        page: whether `/` is the built-in page
        log_requests: whether each request is logged: its path, status and duration, never its text

    Raises:
        ValueError: a value is out of range, or not of its type.
        UnknownSettingError: there is no such keyword.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    served_model_name: str | tuple[str, ...] | list[str] | None = None  # kept as None or a tuple
    cors_origins: tuple[str, ...] | list[str] = ()  # kept as a tuple
    allowed_hosts: tuple[str, ...] | list[str] = ()  # kept as a tuple, in lower case
    max_body_bytes: int = 8 * 2**20
    max_queue: int = 1024
    max_n: int = 128
    max_logprobs: int = MAX_LOGPROBS
    max_output_tokens: int | None = None
    request_timeout_s: float = 3600.0
    client_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    parse_reasoning: bool = True
    page: bool = True
    log_requests: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host or self.host != self.host.strip():
            raise ValueError(f"host={self.host!r} must be an address, such as '127.0.0.1'")
        for name, (minimum, maximum) in RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                self._keep(name, check_int(name, value, minimum, maximum))
        for name in SECONDS:
            self._keep(name, _check_seconds(name, getattr(self, name)))
        for name in SWITCHES:
            check_bool(name, getattr(self, name))
        _check_api_key(self.api_key)
        if self.served_model_name is not None:
            names = _check_texts("served_model_name", self.served_model_name)
            if not names:
                raise ValueError("served_model_name=() names nothing; leave it out, or give a name")
            self._keep("served_model_name", names)
        self._keep("cors_origins", _check_origins(self.cors_origins))
        self._keep("allowed_hosts", _check_hosts(self.allowed_hosts))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_local_host(self.host)

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everyone else


def is_local_host(host: str) -> bool:
    """Whether a host's name or address, in lower case, always means the machine itself."""
    if host == "localhost" or host.endswith(".localhost"):  # RFC 6761, section 6.3
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # another name: even 127.0.0.1.example.org is one
        return False


def _check_seconds(name: str, value: object) -> float:
    seconds = check_number(name, value)
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"{name}={seconds} must be more than 0 and at most {MAX_SECONDS:.0f}")
    return seconds


def _check_api_key(value: object) -> None:
    """The value itself never gets into a message: messages get into logs."""
    if value is None:
        return
    if not isinstance(value, str) or not value:
        raise ValueError("api_key must be a text that is not empty")
    if not all("!" <= letter <= "~" for letter in value):
        raise ValueError("api_key must be of visible ASCII letters, without spaces")


def _check_texts(name: str, value: object) -> tuple[str, ...]:
    """Texts from any surface: each may hold several, between commas, as on a command line."""
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, tuple | list):
        raise ValueError(f"{name}={value!r} must be a text, or a list of texts")
    texts: list[str] = []
    for text in given:
        parts = [part.strip() for part in text.split(",")] if isinstance(text, str) else []
        if not all(parts) or not parts:
            raise ValueError(f"{name} holds {text!r}; give texts that are not empty")
        texts += parts
    return tuple(texts)


def _check_origins(value: object) -> tuple[str, ...]:
    origins = _check_texts("cors_origins", value)
    for origin in origins:
        parts = urlsplit(origin)
        if origin != "*" and (not parts.scheme or origin != f"{parts.scheme}://{parts.netloc}"):
            raise ValueError(
                f"cors_origins holds {origin!r}, which is no origin; give scheme, host and port "
                "alone, such as 'https://example.org', or '*'"
            )
    return origins


def _check_hosts(value: object) -> tuple[str, ...]:
    hosts = _check_texts("allowed_hosts", value)
    for host in hosts:
        if host != "*" and not re.fullmatch(r"[\w.-]+", host):
            raise ValueError(
                f"allowed_hosts holds {host!r}, which is no host's name; give the name alone, "
                "without scheme and port, such as 'llm.example.org', or '*'"
            )
    return tuple(host.lower().removesuffix(".") for host in hosts)
