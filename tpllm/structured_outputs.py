"""StructuredOutputsParams: a schema, grammar or other constraint on a whole answer."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import lru_cache
from math import lcm
from typing import Any

from tpllm.checks import check_bool, is_unicode
from tpllm.json_schema.bounds import MAX_EXPONENT
from tpllm.json_schema.rewrite import normalized, to_text
from tpllm.vllm_keywords import STRUCTURED, checks_keywords

# Compiling a constraint of this size takes two seconds at worst.
MAX_CHARS = 100_000
# multipleOf compiles to a regular expression with this many states; 100,000 take a second.
# llguidance multiplies two such numbers in 32 bits without an overflow check.
MAX_MULTIPLE = 2**16 - 1
# llguidance follows a chain of rules or references by recursion in native code: 2,500 of them
# overflow a stack of 8 MiB, and that ends the process.
MAX_RULES = 1000
_REFERENCE = re.compile(r'"\$\w*[rR]ef"')
# Decimal also for whole numbers of more digits than int() accepts
_DECODER = json.JSONDecoder(
    parse_float=Decimal, parse_int=lambda text: int(text) if len(text) < 1000 else Decimal(text)
)
_EMBEDDED = re.compile(r"%json\s*")
CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")


@checks_keywords("StructuredOutputsParams", STRUCTURED)
@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The constraint on a whole answer: exactly one of the first five fields. Names are vLLM's.

    Attributes:
        json: a JSON schema, as a dict or a string, that the JSON answer satisfies; kept as a string
        regex: a regular expression that matches the whole answer
        choice: the answer is one of these strings; kept as a tuple
        grammar: a context-free grammar of the answer, in GBNF (`root ::= ...`) or Lark
            (`start: ...`), which may embed schemas: `%json {...}`
        json_object: True for any JSON object
        disable_any_whitespace: for json and json_object: no whitespace between JSON tokens
        whitespace_pattern: for json and json_object: a regular expression of the whitespace between
            JSON tokens. The default is one space, or a line break and up to 7 spaces or tabs (a
            weak model that may write more can repeat whitespace without end)

    For the same reason there are two limits in JSON by a schema, also within a grammar. A number
    has at most 32 characters, unless the schema asks for more. An object has only the properties
    that its schema names, unless the schema sets `additionalProperties`.

    Raises:
        ValueError: not exactly one constraint is given, or it is too large, or it is not valid
            JSON. The engine compiles the constraint, and refuses a request whose constraint cannot
            be compiled.
        UnknownSettingError: there is no such keyword.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs must have exactly one of {', '.join(CONSTRAINTS)}, and has "
                f"{' and '.join(given) or 'none'}"
            )
        if self.json_object is not None and not check_bool("json_object", self.json_object):
            raise ValueError("json_object=False is no constraint; leave structured_outputs out")
        if self.json is not None:
            object.__setattr__(self, "json", _check_schema(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _check_choice(self.choice))
        for name in ("regex", "grammar", "whitespace_pattern"):
            if (text := getattr(self, name)) is not None:
                _check_text(name, text)
        if self.grammar is not None:
            compilable_grammar(self.grammar)
        check_bool("disable_any_whitespace", self.disable_any_whitespace)
        self._check_whitespace()

    def _check_whitespace(self) -> None:
        name = "whitespace_pattern" if self.whitespace_pattern is not None else None
        if self.disable_any_whitespace:
            if name is not None:
                raise ValueError(
                    "disable_any_whitespace=True contradicts whitespace_pattern; give one of them"
                )
            name = "disable_any_whitespace"
        if name is not None and self.json is None and self.json_object is None:
            raise ValueError(f"{name} needs json or json_object; leave it out")

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments that create an equal object, as plain data."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value not in (None, False)}


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name}={text!r} must be a string that is not empty")
    _check_size(name, len(text))
    if not is_unicode(text):
        raise ValueError(f"{name} holds a lone surrogate, which is not valid Unicode")


def _check_size(name: str, num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise ValueError(
            f"{name} has {num_chars} characters, more than the {MAX_CHARS} that can be compiled in "
            "reasonable time; make it simpler"
        )


def _check_rules(name: str, number: int) -> None:
    if number > MAX_RULES:
        raise ValueError(
            f"{name} has {number} rules or references, more than the {MAX_RULES} that can be "
            "compiled; make it simpler"
        )


def _check_choice(value: object) -> tuple[str, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ValueError(f"choice={value!r} must be a list of strings")
    texts = tuple(value)
    if not texts:
        raise ValueError("choice=[] allows no answer; give at least one string")
    for i, text in enumerate(texts):
        _check_text(f"choice[{i}]", text)
    _check_size("choice", sum(map(len, texts)))
    return tuple(dict.fromkeys(texts))


def _check_schema(value: object) -> str:
    """Return the checked schema as a JSON string."""
    with _prefixed_errors("json"):
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        schema = _DECODER.decode(text)
    _check_text("json", text)
    if not isinstance(schema, dict):
        raise ValueError(f"json={text:.80} must be a JSON schema, which is an object")
    compilable_schema(text)
    return text


@lru_cache(16)  # in one process, the caller's check and the engine's compilation share it
def compilable_schema(text: str) -> str:
    """Return the schema, rewritten so that llguidance compiles it correctly.

    See `tpllm.json_schema.rewrite`.

    Raises:
        ValueError: the text is not a JSON schema, or a keyword in it is not supported.
    """
    with _prefixed_errors("json"):
        schema = _DECODER.decode(text)
    return _compilable("json", schema)


def _compilable(name: str, schema: Any) -> str:
    try:
        # dumped again, since escapes can hide a reference
        _check_rules(name, len(_REFERENCE.findall(json.dumps(schema, default=str))))
        _check_multiples(name, schema)
        return to_text(normalized(schema))
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply; make it simpler") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{name}: {error}") from None


@lru_cache(16)
def compilable_grammar(grammar: str) -> str:
    """Return a grammar whose embedded schemas are rewritten as by `compilable_schema`.

    The number of colons outside of schemas is an upper bound on the number of rules.

    Raises:
        ValueError: an embedded schema is wrong, or the grammar has too many rules.
    """
    outside, pieces, position = [], [], 0
    for found in _EMBEDDED.finditer(grammar):
        if found.start() < position:
            continue  # part of a string within a schema
        with _prefixed_errors("%json in grammar"):
            schema, end = _DECODER.raw_decode(grammar, found.end())
        outside.append(grammar[position : found.start()])
        schema_text = _compilable("%json in grammar", schema)
        pieces += [outside[-1], found.group(), schema_text]
        position = end
    outside.append(grammar[position:])
    _check_rules("grammar", "".join(outside).replace("::=", ":").count(":"))
    return "".join([*pieces, outside[-1]])


@contextmanager
def _prefixed_errors(name: str) -> Iterator[None]:
    """Put the name of the argument before errors of parsing a schema."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply; make it simpler") from None
    except (TypeError, ValueError, ArithmeticError) as error:  # Decimal raises the last
        raise ValueError(f"{name} is not a JSON schema: {error}") from None


def _check_multiples(name: str, schema: object) -> None:
    """Refuse a multipleOf whose compilation would not end in reasonable time."""
    numbers = {Decimal(number).copy_abs() for number in _multiples(schema)} - {Decimal(0)}
    if not numbers:
        return
    for number in numbers:  # before any arithmetic, which would overflow
        if abs(number.adjusted()) > MAX_EXPONENT:
            raise ValueError(f"multipleOf={number} is out of the range of double-precision numbers")
    # 10**digits is the smallest power of ten that makes all of them whole numbers
    exponents = [int(number.normalize().as_tuple().exponent) for number in numbers]
    digits = -min(0, *exponents)
    # compare exponents first: 1e999999 is a valid JSON number
    too_large = max(number.adjusted() for number in numbers) + digits > 6
    if too_large or lcm(*(int(number.scaleb(digits)) for number in numbers)) > MAX_MULTIPLE:
        shown = ", ".join(map(str, sorted(numbers)[:5]))
        raise ValueError(
            f"{name} has multipleOf {shown}; their least common multiple, in units of their last "
            f"digit, must be at most {MAX_MULTIPLE}; use smaller ones"
        )


def _multiples(schema: object) -> Iterator[Any]:
    """Yield the value of every multipleOf in the schema."""
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            number = node.get("multipleOf")
            if isinstance(number, int | Decimal) and not isinstance(number, bool):
                yield number
            pending += node.values()
        elif isinstance(node, list):
            pending += node
