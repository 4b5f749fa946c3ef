"""EngineConfig: the settings of an engine after every "auto" and None is resolved and checked.

The caller's process resolves it once from config.json, safetensors headers and NVML; the workers
get the same object as JSON.
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from tpllm.architectures.spec import Rope
from tpllm.channel.step_plan import PlanLimits
from tpllm.checks import MAX_INT32
from tpllm.config.checkpoint import TOKENIZER_FILES, check_checkpoint, resolve_model
from tpllm.config.devices import Gpu, visible_gpus
from tpllm.config.generation_config import read_generation_defaults
from tpllm.config.model_config import ModelConfig
from tpllm.config.resources import refuse_too_little_shared_memory
from tpllm.config.settings import ModelPath, Settings
from tpllm.sampling_params import MAX_LOGPROBS, SamplingParams

HALF_DTYPES = ("bfloat16", "float16")
STEP_TIMEOUT_S = {"cuda": 60.0, "cpu": 600.0}  # a GPU's longest step takes some seconds
FLASH_ATTN_PAGE = 256  # flash-attn 2 reads the paged cache in blocks of a multiple of this


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Settings):
    """Settings made concrete for one model on this machine.

    Attributes (besides those of Settings):
        device: "cuda" or "cpu"
        dtype: "bfloat16", "float16" or "float32"
        max_model_len: most tokens of prompt and output together
        max_model_len_is_asked_for: whether the caller set it: then the cache must hold it
        kv_block_size: tokens in a block of the KV cache
        attention_backend: "flash-attn", "triton" or "torch"
        folder: the checkpoint, absolute
        step_timeout_s: seconds that a step may take
        tokenizer_folder: the tokenizer's folder; None to work on token ids alone
        model_config: the model, from the checkpoint's config.json and weights
        generation_defaults: arguments of SamplingParams that the checkpoint recommends
    """

    model: str | None = None
    max_model_len: int = field()  # field(): required here, without the default of Settings
    kv_block_size: int = field()
    step_timeout_s: float = field()
    max_model_len_is_asked_for: bool
    folder: Path
    tokenizer_folder: Path | None
    model_config: ModelConfig
    generation_defaults: dict[str, Any]

    @classmethod
    def resolve(cls, model: ModelPath | None = None, **settings: Any) -> Self:
        """Check the keywords of LLM against each other, the model and this machine.

        Raises:
            ValueError, FileNotFoundError: naming the setting or file, its value and the mend.
            UnknownSettingError: there is no such keyword.
        """
        wanted = Settings(**{"model": model, **settings})
        weights = wanted.load_format == "auto"
        folder = resolve_model(wanted.model, weights=weights)
        model_config = ModelConfig.from_folder(folder, _hub_name(wanted.model), wanted.hf_overrides)
        model_config.check_parallel(wanted.tensor_parallel_size)
        if weights:
            model_config = check_checkpoint(folder, model_config)
        device, gpus = _resolve_device(wanted)
        _check_gpu_memory(gpus, wanted, model_config)
        refuse_too_little_shared_memory(len(gpus))
        dtype = _resolve_dtype(wanted, device, gpus, model_config)
        attention_backend = _resolve_attention_backend(wanted, gpus, dtype, model_config.head_dim)
        concrete = {
            "device": device,
            "dtype": dtype,
            "max_model_len": _resolve_max_model_len(wanted, model_config),
            "max_model_len_is_asked_for": wanted.max_model_len is not None,
            "attention_backend": attention_backend,
            "kv_block_size": _resolve_kv_block_size(wanted, device, dtype, attention_backend),
            "step_timeout_s": wanted.step_timeout_s or STEP_TIMEOUT_S[device],
            "folder": folder,
            "tokenizer_folder": _resolve_tokenizer(wanted, folder),
            "model_config": model_config,
            "generation_defaults": (
                read_generation_defaults(folder) if wanted.generation_config == "auto" else {}
            ),
        }
        return cls(**{f.name: getattr(wanted, f.name) for f in fields(Settings)} | concrete)

    def __post_init__(self) -> None:
        # without Settings.__post_init__: `resolve` has checked each setting, and a worker need not
        if (self.num_kv_blocks or 0) * self.kv_block_size > MAX_INT32:
            raise ValueError(
                f"num_kv_blocks={self.num_kv_blocks} of kv_block_size={self.kv_block_size} hold "
                f"more than the {MAX_INT32} tokens that 32-bit slots can count; lower num_kv_blocks"
            )

    @property
    def max_blocks_per_seq(self) -> int:
        """Blocks of a sequence of `max_model_len` tokens: the width of a block table."""
        return -(-self.max_model_len // self.kv_block_size)

    @property
    def plan_limits(self) -> PlanLimits:
        """The limits of a step, for the coordinator and the workers."""
        return PlanLimits(
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.max_blocks_per_seq,
            self.kv_block_size,
            self.model_config.vocab_size,
            MAX_LOGPROBS,
        )

    @property
    def default_sampling_params(self) -> SamplingParams:
        """The parameters of a request that has none."""
        return SamplingParams(**self.generation_defaults)

    def to_json(self) -> str:
        """Return all fields as JSON, for `from_json`."""
        return json.dumps(asdict(self), default=str)  # default: paths

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the object that `to_json` wrote. Nothing is read from disk or checked again."""
        values = json.loads(text)
        model_config = values["model_config"]
        model_config["eos_token_ids"] = tuple(model_config["eos_token_ids"])
        model_config["rope"] = Rope(**model_config["rope"])
        values["model_config"] = ModelConfig(**model_config)
        values["folder"] = Path(values["folder"])
        if values["tokenizer_folder"] is not None:
            values["tokenizer_folder"] = Path(values["tokenizer_folder"])
        return cls(**values)


def why_no_flash_attn(gpus: list[Gpu], dtype: str, head_dim: int) -> str | None:
    """Return the reason why flash-attn 2 cannot compute the prefill; None if it can."""
    if not gpus:
        return "it needs a GPU"
    for gpu in gpus:
        if gpu.compute_capability < (8, 0):
            return f"{gpu.name} has compute capability {gpu.capability}, and it needs 8.0"
    if dtype not in HALF_DTYPES:
        return f"it knows no {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"head_dim={head_dim} is no multiple of 8 up to 256"
    return None if find_spec("flash_attn") is not None else "the package flash-attn is missing"


def _hub_name(model: ModelPath | None) -> str | None:
    """Return the model's part of a Hugging Face id, whose folder is named after a commit."""
    return None if model is None or os.path.isdir(os.path.expanduser(model)) else Path(model).name


def _resolve_device(wanted: Settings) -> tuple[str, list[Gpu]]:
    """Return "cuda" with the GPUs of the ranks in order, or "cpu" with none."""
    if wanted.device == "cpu":
        return "cpu", []
    gpus = visible_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    if not gpus:
        if wanted.device == "auto":
            return "cpu", []
        raise ValueError(
            f"device='cuda' finds no GPU{hint}: it needs an NVIDIA driver and a build of torch "
            "with CUDA; use device='cpu'"
        )
    ranks = wanted.tensor_parallel_size
    if ranks > len(gpus):
        raise ValueError(
            f"tensor_parallel_size={ranks} is more than the number of visible GPUs, "
            f"{len(gpus)}{hint}; use at most {len(gpus)}, or device='cpu'"
        )
    return "cuda", gpus[:ranks]


def _check_gpu_memory(gpus: list[Gpu], wanted: Settings, model_config: ModelConfig) -> None:
    """Refuse GPUs that cannot hold the weights, before a worker fails on them slowly."""
    width = 4 if wanted.dtype == "float32" else 2  # the smallest dtype of "auto"
    needed = model_config.spec.local_size(max(1, len(gpus))) * width
    for rank, gpu in enumerate(gpus):
        if gpu.free_bytes is not None and gpu.free_bytes < needed:
            raise ValueError(
                f"tensor_parallel_size={len(gpus)} puts {needed / 2**30:.1f} GiB of weights on GPU "
                f"{rank} ({gpu.name}), which has {gpu.memory_text()}; free its memory (nvidia-smi "
                "shows who holds it), use another GPU, or raise tensor_parallel_size"
            )


def _resolve_dtype(
    wanted: Settings, device: str, gpus: list[Gpu], model_config: ModelConfig
) -> str:
    dtype: str = wanted.dtype
    if dtype == "auto":
        dtype = model_config.dtype or "float32" if device == "cuda" else "float32"
    for rank, gpu in enumerate(gpus):
        if dtype == "bfloat16" and gpu.compute_capability < (8, 0):
            raise ValueError(
                f"dtype='bfloat16' needs compute capability 8.0, and GPU {rank} ({gpu.name}) has "
                f"{gpu.capability}; use dtype='float16' or dtype='float32'"
            )
    return dtype


def _resolve_max_model_len(wanted: Settings, model_config: ModelConfig) -> int:
    limit, window = model_config.longest_context, model_config.sliding_window
    length = limit if wanted.max_model_len is None else wanted.max_model_len
    if length > limit:
        rope = model_config.rope
        scaled = f" scaled by {rope.rope_type}" * (rope.rope_type in ("linear", "yarn"))
        raise ValueError(
            f"max_model_len={length} is more than max_position_embeddings={limit}{scaled} of "
            f"{model_config.name}; use at most {limit}"
        )
    if window is not None and length > window:
        raise ValueError(
            f"sliding_window={window} of {model_config.name} is not implemented, and it is less "
            f"than max_model_len={length}; use max_model_len={window}, where full attention is "
            "the same"
        )
    return length


def _resolve_attention_backend(wanted: Settings, gpus: list[Gpu], dtype: str, head_dim: int) -> str:
    obstacle = why_no_flash_attn(gpus, dtype, head_dim)
    if wanted.attention_backend == "auto":
        fastest = "flash-attn" if obstacle is None else "triton"
        return fastest if gpus else "torch"
    if wanted.attention_backend == "flash-attn" and obstacle is not None:
        raise ValueError(
            f"attention_backend='flash-attn' does not serve here: {obstacle}; "
            "use attention_backend='auto'"
        )
    if wanted.attention_backend == "triton" and not gpus:
        raise ValueError(
            "attention_backend='triton' needs a GPU; on the CPU use attention_backend='auto'"
        )
    return wanted.attention_backend


def _resolve_kv_block_size(
    wanted: Settings, device: str, dtype: str, attention_backend: str
) -> int:
    size = wanted.kv_block_size
    if size is None:
        return FLASH_ATTN_PAGE if device == "cuda" and dtype in HALF_DTYPES else 16
    if attention_backend == "flash-attn":
        if size % FLASH_ATTN_PAGE:
            raise ValueError(
                f"kv_block_size={size} is no multiple of {FLASH_ATTN_PAGE}, which flash-attn needs "
                f"for dtype={dtype!r} on a GPU; use kv_block_size={FLASH_ATTN_PAGE}"
            )
    elif size & (size - 1):
        raise ValueError(
            f"kv_block_size={size} is no power of two; use kv_block_size={1 << size.bit_length()}"
        )
    return size


def _resolve_tokenizer(wanted: Settings, folder: Path) -> Path | None:
    if wanted.skip_tokenizer_init:
        return None
    if wanted.tokenizer is not None:
        folder = resolve_model(wanted.tokenizer, setting="tokenizer", weights=False)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return folder
    if wanted.tokenizer is None and wanted.load_format == "dummy":
        return None  # the output of dummy weights has no meaning: config.json alone is enough
    raise FileNotFoundError(
        f"{folder} has no tokenizer ({TOKENIZER_FILES[0]}); name its folder with tokenizer=, "
        "or pass token ids and skip_tokenizer_init=True"
    )
