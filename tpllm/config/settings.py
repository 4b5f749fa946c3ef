"""Settings: the keywords of LLM, each with its type, range, default and help."""

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, get_type_hints

from annotated_types import Interval

from tpllm.checks import MAX_INT32, MAX_SEED, MIN_SEED, short
from tpllm.fields.docs import documented
from tpllm.fields.validation import above, check_fields
from tpllm.vllm_keywords import SETTINGS, checks_keywords

ModelPath = str | os.PathLike[str]  # kept as str
# The largest values are far beyond use. They bound what is allocated for them, and keep every slot
# number an int32.
MAX_CUDA_GRID = 2**16 - 1  # one side of a CUDA grid
SECONDS = above(0, 1e6)  # eleven days; the kernel counts waits in 32-bit milliseconds


@documented
@checks_keywords("LLM", SETTINGS)
@dataclass(frozen=True)
class Settings:
    """Every keyword of LLM. Names and meanings are vLLM's where vLLM has the same thing.

    Raises:
        ValueError: a value is out of range, or not of its type.
        UnknownSettingError: there is no such keyword.
    """

    model: ModelPath | None = None
    """local folder or Hugging Face id; None for the small model that ships with tpllm"""
    _: KW_ONLY
    tensor_parallel_size: Annotated[int, Interval(ge=1, le=1024)] = 1
    """ranks the model is split over, one process and one GPU each"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """ "cuda" or "cpu"; "auto" takes GPUs where there are any"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """of weights and KV cache. "auto" is the checkpoint's on a GPU, float32 on the CPU: 16 bits are
    emulated on most CPUs, slower as well as less exact
    """
    max_model_len: Annotated[int | None, Interval(ge=1, le=2**28)] = None
    """most tokens of prompt and output together; None for the model's limit, or what the KV cache
    holds where that is less
    """
    max_num_seqs: Annotated[int, Interval(ge=1, le=MAX_CUDA_GRID)] = 256
    """most sequences in one step"""
    max_num_batched_tokens: Annotated[int, Interval(ge=1, le=2**22)] = 16384
    """most tokens in one step; longer prompts are computed in chunks"""
    gpu_memory_utilization: Annotated[float, above(0, 1)] = 0.9
    """share of each GPU's memory for weights, KV cache and the rest"""
    num_kv_blocks: Annotated[int | None, Interval(ge=2, le=MAX_INT32)] = None  # one for padding
    """blocks of the KV cache; None for as many as fit"""
    kv_block_size: Annotated[int | None, Interval(ge=1, le=2**16)] = None
    """tokens in a block; None for 256 in half precision on a GPU, otherwise 16"""
    enable_prefix_caching: bool = True
    """whether prompts with the same beginning share its KV"""
    enforce_eager: bool = False
    """whether to run without CUDA graphs: the start is faster, and steps are slower"""
    disable_custom_all_reduce: bool = False
    """whether to leave every all-reduce to NCCL, also those that our own kernels compute over the
    GPUs' peer memory
    """
    disable_custom_matmul: bool = False
    """whether to leave every matmul to torch, also those of one row, which a kernel of our
    own computes, and those for which we have measured a faster algorithm
    """
    attention_backend: Literal["auto", "flash-attn", "triton", "torch"] = "auto"
    """ "flash-attn" computes prompts by flash-attn 2, "triton" by torch, and both decode by a
    kernel of ours; "torch" does both, slowly. "auto" is the first of these that the GPU, the dtype
    and the packages allow, and "torch" on the CPU
    """
    load_format: Literal["auto", "dummy"] = "auto"
    """ "auto" reads the checkpoint's weights, "dummy" makes random ones and needs only
    config.json
    """
    hf_overrides: dict[str, Any] | None = None
    """fields of the model's config.json with other values, such as rope_scaling"""
    tokenizer: ModelPath | None = None
    """local folder or Hugging Face id; None for the model's own"""
    skip_tokenizer_init: bool = False
    """whether to run without a tokenizer: token ids in, token ids out"""
    generation_config: Literal["auto", "vllm"] = "auto"
    """sampling parameters of requests that have none. "auto" takes temperature, top_k, top_p,
    min_p, repetition_penalty and max_new_tokens from the checkpoint's generation_config.json, and
    is greedy if that has do_sample=false; "vllm" takes the defaults of SamplingParams
    """
    seed: Annotated[int, Interval(ge=MIN_SEED, le=MAX_SEED)] = 0
    """64-bit; the seed from which requests without their own seed are sampled"""
    start_timeout_s: Annotated[float, SECONDS] = 600.0
    """seconds without a sign of life after which a worker that starts counts as hung, and the
    engine ends; also for each of the first 16 steps, which compile kernels
    """
    step_timeout_s: Annotated[float, SECONDS] | None = None
    """seconds that any later step may take; None for 60 on a GPU, 600 on the CPU"""

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer"):
            path = getattr(self, name)
            if path == "" or not isinstance(path, str | os.PathLike | None):
                raise ValueError(f"{name}={path!r} must be a folder or a Hugging Face id")
        check_fields(self)
        if self.hf_overrides is not None:
            try:  # as they would stand in config.json
                overrides = json.loads(json.dumps(self.hf_overrides))
            except TypeError as error:
                raise ValueError(f"hf_overrides={short(self.hf_overrides)}: {error}") from None
            object.__setattr__(self, "hf_overrides", overrides)
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs={self.max_num_seqs} is more than "
                f"max_num_batched_tokens={self.max_num_batched_tokens}, and each sequence of a "
                "step needs a token; lower max_num_seqs or raise max_num_batched_tokens"
            )


@checks_keywords("LLM", SETTINGS)
@dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """Arguments of LLM and AsyncLLM: the settings and a callback."""

    on_phase: Callable[[int, str], None] | None = None


_P = ParamSpec("_P")
_Init = Callable[Concatenate[Any, _P], None]


def _taking(arguments: Callable[_P, object]) -> Callable[[Callable[..., None]], _Init[_P]]:
    """Give an `__init__` the signature of `arguments`, for type checkers and for `help()`."""

    def decorate(init: Any) -> Any:
        hints = get_type_hints(arguments)  # without the ranges
        given = inspect.signature(arguments).parameters.values()
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        shown = [this, *(each.replace(annotation=hints[each.name]) for each in given)]
        init.__signature__ = inspect.Signature(shown)
        return init

    return decorate


takes_settings = _taking(Arguments)
