"""Whether a text matches a structured output, by the grammar of the shipped model's engine."""

from functools import cache

from tpllm import LLM, AsyncLLM, SamplingParams
from tpllm.config.engine_config import EngineConfig
from tpllm.engine.grammars import Grammars, read_tokenizer
from tpllm.structured_outputs import StructuredOutputsParams

# The first request of engines that tests share has a grammar, so that the process that tries
# grammars starts now. Otherwise a later test would seem to leave it behind.
FIRST = SamplingParams(max_tokens=1, structured_outputs=StructuredOutputsParams(regex="a"))


def start_trials(llm: LLM) -> LLM:
    llm.generate([[1]], FIRST, use_tqdm=False)
    return llm


async def start_trials_of(engine: AsyncLLM) -> None:
    async for _ in engine.generate([1], FIRST):
        pass


@cache
def shipped_grammars() -> Grammars:
    """Return grammars that are compiled in this process."""
    config = EngineConfig.resolve(device="cpu")
    return Grammars(lambda: read_tokenizer(config))


def fits(form: StructuredOutputsParams, text: str) -> bool:
    """Whether `text` may be the whole answer, byte by byte."""
    grammar = shipped_grammars().compile(form)
    matcher = grammar.start()
    tokenizer = grammar._tokenizer
    ids = [id_ for byte in text.encode() for id_ in tokenizer.tokenize_bytes(bytes([byte]))]
    return all(matcher.advance(id_) for id_ in ids) and matcher.inner.is_accepting()
