"""tpllm: large language models across the GPUs of one machine, from one Python object.

    from tpllm import LLM, SamplingParams

    with LLM("Qwen/Qwen3-8B", tensor_parallel_size=2) as llm:
        print(llm.generate("The capital of France is")[0].outputs[0].text)

Names are resolved when first used, so `import tpllm` takes milliseconds: it loads no torch, no
transformers and no numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpllm.async_llm import AsyncLLM
    from tpllm.errors import NoNextTokenError, UnknownSettingError, WorkerError
    from tpllm.llm import LLM
    from tpllm.offline.beam_search import BeamSearchParams
    from tpllm.outputs import CompletionOutput, Logprob, RequestOutput
    from tpllm.sampling_params import RequestOutputKind, SamplingParams
    from tpllm.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "Logprob",
    "NoNextTokenError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "UnknownSettingError",
    "WorkerError",
    "__version__",
]

_HOME = {
    "LLM": "tpllm.llm",
    "AsyncLLM": "tpllm.async_llm",
    "BeamSearchParams": "tpllm.offline.beam_search",
    "CompletionOutput": "tpllm.outputs",
    "Logprob": "tpllm.outputs",
    "NoNextTokenError": "tpllm.errors",
    "RequestOutput": "tpllm.outputs",
    "RequestOutputKind": "tpllm.sampling_params",
    "SamplingParams": "tpllm.sampling_params",
    "StructuredOutputsParams": "tpllm.structured_outputs",
    "UnknownSettingError": "tpllm.errors",
    "WorkerError": "tpllm.errors",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module at first use (PEP 562), and keep it."""
    if name not in _HOME:
        raise AttributeError(f"module 'tpllm' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
