"""Schemas as llguidance gets them: they leave a weak model nothing to write without end."""

import json
import re
from typing import Any

from tpllm.json_schema.closed_objects import close_objects

# As JSON is written on a line, or indented. A weak model writes all that it may: where it may write
# any 8 characters, the shipped one's answers have 2.4 times as many tokens, and with 40 no end.
WHITESPACE = r" |\n[ \t]{0,7}"
# What a schema in a Lark grammar begins with, and what only looks like it: texts, comments, regexes
_SCHEMA_IN_LARK = re.compile(
    r""""(?:\\.|[^"\\])*" | (?:\#|//)[^\n]* | /(?:\\.|[^/\\])+/ | %json\s*(?=\{)""", re.VERBOSE
)


def bounded_schema(schema: dict[str, Any], **options: Any) -> str:
    """A schema as text, its objects closed; with llguidance's options, unless it has its own."""
    close_objects(schema)
    return json.dumps({"x-guidance": options, **schema} if options else schema, allow_nan=False)


def bounded_grammar(grammar: str) -> str:
    """A grammar whose schemas allow no more than one that stands alone."""
    parts, position = [], 0
    while found := _SCHEMA_IN_LARK.search(grammar, position):
        parts.append(grammar[position : found.end()])
        position = found.end()
        if found[0].startswith("%json"):
            schema, position = json.JSONDecoder().raw_decode(grammar, position)
            parts.append(bounded_schema(schema, whitespace_pattern=WHITESPACE))
    return "".join([*parts, grammar[position:]])
