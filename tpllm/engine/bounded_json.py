"""Schemas for llguidance, bounded so that a weak model cannot generate JSON without end."""

import json
import re
from typing import Any

from tpllm.json_schema.closed_objects import close_objects

# The whitespace of JSON on one line or indented. A weak model writes as much whitespace as it may:
# any 8 characters made the shipped model's outputs 2.4 times as long; with 40 they did not end.
WHITESPACE = r" |\n[ \t]{0,7}"
# a string, comment or regex of a Lark grammar, or the beginning of a schema in it
_SCHEMA_IN_LARK = re.compile(
    r""""(?:\\.|[^"\\])*" | (?:\#|//)[^\n]* | /(?:\\.|[^/\\])+/ | %json\s*(?=\{)""", re.VERBOSE
)


def bounded_schema(schema: dict[str, Any], **options: Any) -> str:
    """Return a schema as JSON, its objects closed, with llguidance's options unless it has some."""
    close_objects(schema)
    return json.dumps({"x-guidance": options, **schema} if options else schema, allow_nan=False)


def bounded_grammar(grammar: str) -> str:
    """Return a Lark grammar whose JSON schemas are bounded as `bounded_schema` bounds one."""
    pieces, position = [], 0
    while found := _SCHEMA_IN_LARK.search(grammar, position):
        pieces.append(grammar[position : found.end()])
        position = found.end()
        if found[0].startswith("%json"):
            schema, position = json.JSONDecoder().raw_decode(grammar, position)
            pieces.append(bounded_schema(schema, whitespace_pattern=WHITESPACE))
    return "".join([*pieces, grammar[position:]])
