"""StructuredOutputsParams: the form that an answer must have."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import lru_cache
from math import lcm
from typing import Any

from tpllm.checks import check_bool
from tpllm.json_schema.bounds import MAX_EXPONENT
from tpllm.json_schema.rewrite import normalized, to_text
from tpllm.vllm_keywords import STRUCTURED, checks_keywords

# Compiling this much takes some two seconds at worst.
MAX_CHARS = 100_000
# A regular expression of multiples has as many states; 100,000 of them are compiled in a second.
# The compiler multiplies two of them in 32 bits, whether or not that fits.
MAX_MULTIPLE = 2**16 - 1
# The compiler follows a chain of rules or references by recursion in native code: 2,500 of them
# overflow a stack of 8 MiB, and that ends the process.
MAX_RULES = 1000
_REFERENCE = re.compile(r'"\$\w*[rR]ef"')
# Decimal also for whole numbers that are too long for an int
_DECODER = json.JSONDecoder(
    parse_float=Decimal, parse_int=lambda text: int(text) if len(text) < 1000 else Decimal(text)
)
_EMBEDDED = re.compile(r"%json\s*")
FORMS = ("json", "regex", "choice", "grammar", "json_object")


@checks_keywords("StructuredOutputsParams", STRUCTURED)
@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the whole answer must be: exactly one of the first five. Names are vLLM's.

    Attributes:
        json: a JSON schema, as a dict or as text, that the answer, which is JSON, satisfies; kept
            as text
        regex: a regular expression that matches the whole answer
        choice: the answer is one of these texts; kept as a tuple
        grammar: a context-free grammar of the answer, in GBNF (`root ::= ...`) or Lark
            (`start: ...`), which may hold schemas: `%json {...}`
        json_object: True for any JSON object
        disable_any_whitespace: for the two kinds of JSON: no whitespace between its parts
        whitespace_pattern: for the two kinds of JSON: a regular expression of the whitespace that
            may stand there, instead of a blank, or a line break and up to 7 blanks or tabs (a weak
            model that may write more might never write anything else)

    For the same reason, in JSON by a schema, also within a grammar, a number has no more digits
    once it has 32 characters, unless the schema asks for them, and an object has the properties
    alone that its schema names, unless the schema has a word on `additionalProperties`.

    Raises:
        ValueError: none or several forms are given, or one is too large, or no JSON. Whether it can
            be compiled is found when a request comes with it.
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
        given = [name for name in FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs must have exactly one of {', '.join(FORMS)}, and has "
                f"{' and '.join(given) or 'none'}"
            )
        if self.json_object is not None and not check_bool("json_object", self.json_object):
            raise ValueError("json_object=False asks for nothing; leave structured_outputs out")
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
                    "disable_any_whitespace=True leaves nothing for whitespace_pattern; give one "
                    "of the two"
                )
            name = "disable_any_whitespace"
        if name is not None and self.json is None and self.json_object is None:
            raise ValueError(f"{name} is about json and json_object; leave it out")

    def to_dict(self) -> dict[str, Any]:
        """The arguments that make the same again, as plain data."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value not in (None, False)}


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name}={text!r} must be a text that is not empty")
    _check_size(name, len(text))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds a lone surrogate, which is not valid Unicode") from None


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
            "followed; make it simpler"
        )


def _check_references(name: str, schema: object) -> None:
    text = json.dumps(schema, default=str)  # without escapes that would hide a reference
    _check_rules(name, len(_REFERENCE.findall(text)))


def _check_choice(value: object) -> tuple[str, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ValueError(f"choice={value!r} must be a list of texts")
    texts = tuple(value)
    if not texts:
        raise ValueError("choice is empty, so there is no answer; give at least one text")
    for i, text in enumerate(texts):
        _check_text(f"choice[{i}]", text)
    _check_size("choice", sum(map(len, texts)))
    return tuple(dict.fromkeys(texts))


def _check_schema(value: object) -> str:
    """The schema as text."""
    with _naming("json"):
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        schema = _DECODER.decode(text)
    _check_text("json", text)
    if not isinstance(schema, dict):
        raise ValueError(f"json={text:.80} must be a JSON schema, which is an object")
    compilable_schema(text)
    return text


@lru_cache(16)  # a server checks what its engine compiles: both want it
def compilable_schema(text: str) -> str:
    """A schema in the words that the compiler gets right: see `tpllm.json_schema.rewrite`.

    Raises:
        ValueError: it is none, or has something that is not supported.
    """
    with _naming("json"):
        schema = _DECODER.decode(text)
    return _compilable("json", schema)


def _compilable(name: str, schema: Any) -> str:
    try:
        _check_references(name, schema)
        _check_multiples(name, schema)
        return to_text(normalized(schema))
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply; make it simpler") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{name}: {error}") from None


@lru_cache(16)
def compilable_grammar(grammar: str) -> str:
    """A grammar, with the schemas within as `compilable_schema` gives them.

    Raises:
        ValueError: a schema in it is none, or it has too many rules: no more than it has colons
            outside of schemas.
    """
    outside, pieces, position = [], [], 0
    for found in _EMBEDDED.finditer(grammar):
        if found.start() < position:
            continue  # part of a text within a schema
        with _naming("%json in grammar"):
            schema, end = _DECODER.raw_decode(grammar, found.end())
        outside.append(grammar[position : found.start()])
        schema_text = _compilable("%json in grammar", schema)
        pieces += [outside[-1], found.group(), schema_text]
        position = end
    outside.append(grammar[position:])
    _check_rules("grammar", "".join(outside).replace("::=", ":").count(":"))
    return "".join([*pieces, outside[-1]])


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Have errors of reading a schema name where it stands."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply; make it simpler") from None
    except (TypeError, ValueError, ArithmeticError) as error:  # Decimal raises the last
        raise ValueError(f"{name} is no JSON schema: {error}") from None


def _check_multiples(name: str, schema: object) -> None:
    """Refuse a multipleOf that would be compiled for ever."""
    numbers = {Decimal(number).copy_abs() for number in _multiples(schema)} - {Decimal(0)}
    if not numbers:
        return
    for number in numbers:  # before any arithmetic, which would overflow
        if abs(number.adjusted()) > MAX_EXPONENT:
            raise ValueError(f"multipleOf={number} is out of the range of numbers")
    # a power of ten that makes whole numbers of them all
    exponents = [int(number.normalize().as_tuple().exponent) for number in numbers]
    digits = -min(0, *exponents)
    # compared before they are multiplied out: 1e999999 is a number of JSON, too
    too_large = max(number.adjusted() for number in numbers) + digits > 6
    if too_large or lcm(*(int(number.scaleb(digits)) for number in numbers)) > MAX_MULTIPLE:
        shown = ", ".join(map(str, sorted(numbers)[:5]))
        raise ValueError(
            f"{name} asks for multipleOf {shown}; their least common multiple, in units of their "
            f"last digit, must be at most {MAX_MULTIPLE}"
        )


def _multiples(schema: object) -> Iterator[Any]:
    """Every number that some part of the schema gives as its multipleOf."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            number = part.get("multipleOf")
            if isinstance(number, int | Decimal) and not isinstance(number, bool):
                yield number
            left += part.values()
        elif isinstance(part, list):
            left += part
