"""Whether a text has a form, by the grammar that the shipped model's engine compiles for it."""

from functools import cache

from tpllm.config import EngineConfig
from tpllm.engine.grammars import Grammars
from tpllm.structured_outputs import StructuredOutputsParams


@cache
def shipped_grammars() -> Grammars:
    return Grammars.of_engine(EngineConfig.resolve(device="cpu"))


def fits(form: StructuredOutputsParams, text: str) -> bool:
    """Whether the whole of an answer may be `text`, byte by byte."""
    grammar = shipped_grammars().compile(form)
    matcher = grammar.start()
    tokenizer = grammar._tokenizer
    ids = [id_ for byte in text.encode() for id_ in tokenizer.tokenize_bytes(bytes([byte]))]
    return all(matcher.advance(id_) for id_ in ids) and matcher.inner.is_accepting()
