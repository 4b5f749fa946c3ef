"""Settings: the keywords of LLM as a caller writes them, each with its default and its check."""

import os
from dataclasses import dataclass, fields
from inspect import Parameter, Signature
from typing import TypedDict

from tpllm.checks import (
    MAX_INT32,
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_seed,
)
from tpllm.vllm_keywords import SETTINGS, checks_keywords

DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "dummy")
ATTENTION_BACKENDS = ("auto", "flash-attn", "triton", "torch")
GENERATION_CONFIGS = ("auto", "vllm")

# Smallest and largest value of each whole number. The largest are far beyond use, and keep what is
# allocated for them (and every slot number, an int32) within bounds.
RANGES = {
    "tensor_parallel_size": (1, 1024),
    "max_model_len": (1, 2**28),
    "max_num_seqs": (1, 2**16 - 1),  # a side of a CUDA grid
    "max_num_batched_tokens": (1, 2**22),
    "num_kv_blocks": (2, MAX_INT32),  # one block takes the writes of padding
    "kv_block_size": (1, 2**16),
}
SWITCHES = (
    "enable_prefix_caching",
    "enforce_eager",
    "disable_custom_all_reduce",
    "disable_custom_matmul",
    "skip_tokenizer_init",
)
TIMEOUTS = ("start_timeout_s", "step_timeout_s")
MAX_TIMEOUT_S = 1e6  # eleven days; the kernel counts waits in milliseconds of 32 bits
OPTIONAL = ("max_model_len", "num_kv_blocks", "kv_block_size")  # of these, None is a value


class SettingsKeywords(TypedDict, total=False):
    """The fields of `Settings` but the model, for the type checkers of those who call LLM."""

    tensor_parallel_size: int
    device: str
    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    num_kv_blocks: int | None
    kv_block_size: int | None
    enable_prefix_caching: bool
    enforce_eager: bool
    disable_custom_all_reduce: bool
    disable_custom_matmul: bool
    attention_backend: str
    load_format: str
    tokenizer: str | os.PathLike[str] | None
    skip_tokenizer_init: bool
    generation_config: str
    seed: int
    start_timeout_s: float
    step_timeout_s: float | None


@checks_keywords("LLM", SETTINGS)
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every keyword of LLM. Names and meanings are vLLM's where vLLM has the same thing.

    Attributes:
        model: local folder or Hugging Face id; None for the small model that ships with tpllm
        tensor_parallel_size: ranks the model is split over, one process and one GPU each
        device: "cuda" or "cpu"; "auto" takes GPUs where there are any
        dtype: of weights and KV cache. "auto" is the checkpoint's on a GPU, float32 on the CPU:
            16 bits are emulated on most CPUs, slower as well as less exact
        max_model_len: most tokens of prompt and output together; None for the model's limit, or
            what the KV cache holds where that is less
        max_num_seqs: most sequences in one step
        max_num_batched_tokens: most tokens in one step; longer prompts are computed in chunks
        gpu_memory_utilization: share of each GPU's memory for weights, KV cache and the rest
        num_kv_blocks: blocks of the KV cache; None for as many as fit
        kv_block_size: tokens in a block; None for 256 in half precision on a GPU, otherwise 16
        enable_prefix_caching: whether prompts that start alike share the KV of their start
        enforce_eager: whether to do without CUDA graphs, which start slower and then run faster
        disable_custom_all_reduce: whether to leave every all-reduce to NCCL, also those that
            kernels of our own do over the GPUs' peer memory
        disable_custom_matmul: whether to leave every matrix product to torch, also those of one row
            that a kernel of our own does, and those for which we have measured a faster algorithm
        attention_backend: "flash-attn" computes prompts by flash-attn 2, "triton" by torch, and
            both decode by a kernel of ours; "torch" does both, slowly. "auto" is the first of these
            that the GPU, the dtype and the packages allow, and "torch" on the CPU
        load_format: "auto" reads the checkpoint's weights, "dummy" draws random ones and needs
            only config.json
        tokenizer: local folder or Hugging Face id; None for the model's own
        skip_tokenizer_init: whether to do without a tokenizer: token ids in, token ids out
        generation_config: what requests without sampling parameters get. "auto" takes temperature,
            top_k, top_p, min_p, repetition_penalty and max_new_tokens from the checkpoint's
            generation_config.json, and is greedy where it says do_sample=false; "vllm" takes the
            defaults of SamplingParams
        seed: 64-bit; what requests without a seed of their own are drawn from
        start_timeout_s: seconds without a sign of life after which a worker that starts counts as
            hung, and the engine ends; also for each of the first 16 steps, which compile kernels
        step_timeout_s: seconds that any later step may take; None for 60 on a GPU, 600 on the CPU

    Raises:
        ValueError: a value is out of range, or not of its type.
        UnknownSettingError: there is no such keyword.
    """

    model: str | None = None
    tensor_parallel_size: int = 1
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 16384
    gpu_memory_utilization: float = 0.9
    num_kv_blocks: int | None = None
    kv_block_size: int | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    disable_custom_all_reduce: bool = False
    disable_custom_matmul: bool = False
    attention_backend: str = "auto"
    load_format: str = "auto"
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    generation_config: str = "auto"
    seed: int = 0
    start_timeout_s: float = 600.0
    step_timeout_s: float | None = None

    def __post_init__(self) -> None:
        self._keep("model", _check_path("model", self.model))
        self._keep("tokenizer", _check_path("tokenizer", self.tokenizer))
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("load_format", self.load_format, LOAD_FORMATS)
        check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        check_choice("generation_config", self.generation_config, GENERATION_CONFIGS)
        for name in SWITCHES:
            check_bool(name, getattr(self, name))
        for name, (minimum, maximum) in RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                self._keep(name, check_int(name, value, minimum, maximum))
        self._keep("seed", check_seed("seed", self.seed))
        share = check_number("gpu_memory_utilization", self.gpu_memory_utilization)
        if not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization={share} must be more than 0 and at most 1")
        self._keep("gpu_memory_utilization", share)
        for name in TIMEOUTS:
            value = getattr(self, name)
            if value is not None or name != "step_timeout_s":
                self._keep(name, _check_timeout(name, value))
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs={self.max_num_seqs} is more than "
                f"max_num_batched_tokens={self.max_num_batched_tokens}, and each sequence of a "
                "step needs a token; lower max_num_seqs or raise max_num_batched_tokens"
            )

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everyone else


def _check_timeout(name: str, value: object) -> float:
    seconds = check_number(name, value)
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise ValueError(f"{name}={seconds:g} must be more than 0 and at most {MAX_TIMEOUT_S:g} s")
    return seconds


def signature() -> Signature:
    """`LLM(model=None, *, tensor_parallel_size=1, ...)`, for help() and notebooks."""
    model = Parameter("model", Parameter.POSITIONAL_OR_KEYWORD, default=None)
    keywords = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Settings)
        if field.name != "model"
    ]
    on_phase = Parameter("on_phase", Parameter.KEYWORD_ONLY, default=None)
    return Signature([model, *keywords, on_phase])


def _check_path(name: str, value: object) -> str | None:
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path:
        raise ValueError(f"{name}={value!r} must be a folder or a Hugging Face id")
    return path
