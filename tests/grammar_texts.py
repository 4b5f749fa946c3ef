"""Whether a text has a form, by the grammar that the shipped model's engine compiles for it."""

from functools import cache

from tpllm import LLM, AsyncLLM, SamplingParams
from tpllm.config.engine_config import EngineConfig
from tpllm.engine.grammars import Grammars, read_tokenizer
from tpllm.structured_outputs import StructuredOutputsParams

# With a form, for the first request of engines that tests share: the process that tries forms
# starts, which would else be left behind by some later test.
FIRST = SamplingParams(max_tokens=1, structured_outputs=StructuredOutputsParams(regex="a"))


def start_trials(llm: LLM) -> LLM:
    llm.generate([[1]], FIRST, use_tqdm=False)
    return llm


async def start_trials_of(engine: AsyncLLM) -> None:
    async for _ in engine.generate([1], FIRST):
        pass


@cache
def shipped_grammars() -> Grammars:
    """These are compiled right here."""
    config = EngineConfig.resolve(device="cpu")
    return Grammars(lambda: read_tokenizer(config))


def fits(form: StructuredOutputsParams, text: str) -> bool:
    """Whether the whole of an answer may be `text`, byte by byte."""
    grammar = shipped_grammars().compile(form)
    matcher = grammar.start()
    tokenizer = grammar._tokenizer
    ids = [id_ for byte in text.encode() for id_ in tokenizer.tokenize_bytes(bytes([byte]))]
    return all(matcher.advance(id_) for id_ in ids) and matcher.inner.is_accepting()
