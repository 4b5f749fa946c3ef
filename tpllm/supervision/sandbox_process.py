"""The process that tries grammars: `python -m tpllm.supervision.sandbox_process FD`.

`supervision.sandbox` starts it. It reads a grammar (the fields of StructuredOutputsParams) from
each line, and replies with a line that holds the error, or null if the grammar can be used. A
grammar that exceeds a limit ends the process.
"""

import json
import resource
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tpllm.channel.child_process import begin_child
from tpllm.config.engine_config import EngineConfig
from tpllm.engine.grammar_source import source_of
from tpllm.engine.grammars import (
    NOTHING_LEFT,
    NOTHING_SATISFIES,
    Grammar,
    fill_masks,
    read_tokenizer,
)
from tpllm.errors import panics_as_errors
from tpllm.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# half of a thread's usual stack: a grammar that passes here does not overflow the engine's stack
_STACK_BYTES = 4 << 20
_SHOWN_CHARS = 60
# outputs to try: texts that they prefer to the lowest allowed id, and their number of tokens
_WALKS = [
    (('"', ":", ","), 64),  # property after property
    (("}", "]", '"'), 32),  # to an end
    ((), 24),
]


def main() -> None:
    """Try grammars until the parent closes the connection."""
    spec = begin_child()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = read_tokenizer(EngineConfig.from_json(spec["config"]))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + spec["memory_bytes"])
    threading.stack_size(_STACK_BYTES)
    threading.Thread(target=_serve, args=(spec, tokenizer)).start()


def _limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _serve(spec: dict[str, Any], tokenizer: "LLTokenizer") -> None:
    with socket.socket(fileno=spec["socket"]) as opened, opened.makefile("rwb") as lines:
        _send(lines, {"error": None})  # ready
        for line in lines:
            _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + spec["cpu_s"])
            _send(lines, {"error": try_grammar(tokenizer, json.loads(line))})


def _send(lines: Any, reply: dict[str, str | None]) -> None:
    lines.write(json.dumps(reply).encode() + b"\n")
    lines.flush()


def try_grammar(tokenizer: "LLTokenizer", params: dict[str, Any]) -> str | None:
    """Return why a grammar cannot be used; None if it compiles and outputs can follow it."""
    try:
        with panics_as_errors("the compiler fails on it"):
            grammar = Grammar(tokenizer, source_of(StructuredOutputsParams(**params)))
            for texts, num_tokens in _WALKS:
                preferred = [id_ for text in texts for id_ in tokenizer.tokenize_str(text)[:1]]
                _walk(tokenizer, grammar, preferred, num_tokens)
    except (ValueError, MemoryError) as error:
        return str(error) or "it takes too much memory; make it simpler"
    return None


def _walk(
    tokenizer: "LLTokenizer", grammar: Grammar, preferred: list[int], num_tokens: int
) -> None:
    """Follow an output to its end, or for `num_tokens` tokens.

    Raises:
        ValueError: the output can neither continue nor end.
    """
    matcher, tokens = grammar.start(), list[int]()
    num_words = (tokenizer.vocab_size + 31) // 32
    for _ in range(num_tokens):
        (row,) = fill_masks([matcher], [()], num_words)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        if matcher.failure is not None or not allowed.size:
            raise ValueError(_dead_end(matcher.failure, tokenizer.decode_str(tokens)))
        next_id = next((id_ for id_ in preferred if id_ in allowed), int(allowed[0]))
        if not matcher.advance(next_id):
            raise ValueError(_dead_end(matcher.failure, tokenizer.decode_str(tokens)))
        if next_id in grammar.end_token_ids:
            return
        tokens.append(next_id)


def _dead_end(failure: str | None, text: str) -> str:
    """Return the error of a grammar whose output cannot continue after `text`."""
    text = text.rstrip()  # without the optional whitespace of JSON
    shown = repr(text if len(text) <= _SHOWN_CHARS else "..." + text[-_SHOWN_CHARS:])
    if failure in (None, NOTHING_LEFT, NOTHING_SATISFIES):
        return f"nothing that fits can follow {shown}"
    return f"{failure} after {shown}"


if __name__ == "__main__":
    main()
