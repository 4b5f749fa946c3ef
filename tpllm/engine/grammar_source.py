"""The source text from which llguidance compiles the constraint of a request.

JSON in it is bounded, so that a weak model cannot generate it without end.
"""

import json
import re
from typing import Any

from tpllm.checks import short
from tpllm.json_schema.closed_objects import close_objects
from tpllm.structured_outputs import (
    StructuredOutputsParams,
    compilable_grammar,
    compilable_schema,
)

# The whitespace of JSON on one line or indented. A weak model writes as much whitespace as it may:
# any 8 characters made the shipped model's outputs 2.4 times as long; with 40 they did not end.
WHITESPACE = r" |\n[ \t]{0,7}"
# a string, comment or regex of a Lark grammar, or the beginning of a schema in it
_SCHEMA_IN_LARK = re.compile(
    r""""(?:\\.|[^"\\])*" | (?:\#|//)[^\n]* | /(?:\\.|[^/\\])+/ | %json\s*(?=\{)""", re.VERBOSE
)


def source_of(params: StructuredOutputsParams) -> str:
    """Return the grammar as llguidance's source text.

    Raises:
        ValueError: it is not a valid grammar.
    """
    from llguidance import LLMatcher, grammar_from

    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # one terminal: as alternatives of a rule, many choices exceeded _MAX_ITEMS_IN_ROW
        words = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
        words = words.replace("\x7f", "\\u007f")  # the one letter that Lark wants escaped, too
        # without no_forcing a text that spells a special token would become that token
        options = '%llguidance {"no_forcing": true}'
        return LLMatcher.grammar_from_lark(f"{options}\nstart: CHOICE\nCHOICE: {words}")
    if params.grammar is not None:
        return grammar_from("grammar", _bounded_grammar(compilable_grammar(params.grammar)))
    spaces: dict[str, Any] = {"whitespace_pattern": params.whitespace_pattern or WHITESPACE}
    if params.disable_any_whitespace:
        spaces = {"whitespace_flexible": False}
    schema = {"type": "object"}
    if params.json is not None:
        schema = json.loads(compilable_schema(str(params.json)))
    text = _bounded_schema(schema)
    return LLMatcher.grammar_from_json_schema(text, overrides=spaces)  # type: ignore[arg-type]


def has_json(params: StructuredOutputsParams) -> bool:
    """Whether the output, or a piece of it, is JSON."""
    if params.grammar is not None:
        return "%json" in params.grammar
    return params.json is not None or params.json_object is not None


def setting_of(params: StructuredOutputsParams) -> str:
    """Return the field of `params` that is set, with its value, for an error message."""
    for name in ("regex", "choice", "grammar"):
        if (value := getattr(params, name)) is not None:
            return f"{name}={short(value)}"
    return "json" if params.json is not None else "json_object"


def _bounded_schema(schema: dict[str, Any], **options: Any) -> str:
    """Return a schema as JSON, its objects closed, with llguidance's options unless it has some."""
    close_objects(schema)
    return json.dumps({"x-guidance": options, **schema} if options else schema, allow_nan=False)


def _bounded_grammar(grammar: str) -> str:
    """Return a Lark grammar whose JSON schemas are bounded as `_bounded_schema` bounds one."""
    pieces, position = [], 0
    while found := _SCHEMA_IN_LARK.search(grammar, position):
        pieces.append(grammar[position : found.end()])
        position = found.end()
        if found[0].startswith("%json"):
            schema, position = json.JSONDecoder().raw_decode(grammar, position)
            pieces.append(_bounded_schema(schema, whitespace_pattern=WHITESPACE))
    return "".join([*pieces, grammar[position:]])
