"""Choices: what an engine would use on this machine for given settings, and why."""

from tpllm.cli.hardware import Hardware
from tpllm.cli.sources import Given
from tpllm.config.devices import visible_gpus
from tpllm.config.engine_config import EngineConfig, why_no_flash_attn
from tpllm.layers.linear.matmul_algorithms import table_path

Choice = tuple[str, str]  # the choice, and the reason for it


def explain(given: Given, hardware: Hardware) -> dict[str, Choice]:
    """Return choice and reason by name.

    Raises:
        ValueError, FileNotFoundError: no engine could start with these settings.
    """
    config = EngineConfig.resolve(**given.values)
    on_gpu = config.device == "cuda"
    return {
        "model": (config.model_config.name, str(config.folder)),
        "device": _device(config, given, hardware),
        "dtype": _dtype(config, given, on_gpu),
        "max_model_len": (
            f"{config.max_model_len} tokens",
            _origin("max_model_len", given) or "the model's limit, or less if the cache is smaller",
        ),
        "prefill attention": _prefill_attention(config, given, on_gpu),
        "decode attention": _decode_attention(config, given, on_gpu),
        "all-reduce": _all_reduce(config, hardware, on_gpu),
        "matmuls": _matmuls(config, hardware, on_gpu),
        "decode steps": _decode_steps(config, given, on_gpu),
        "KV block": (
            f"{config.kv_block_size} tokens",
            _origin("kv_block_size", given)
            or (
                "flash-attn reads pages of 256"
                if config.attention_backend == "flash-attn"
                else "the default here"
            ),
        ),
    }


def _origin(name: str, given: Given) -> str | None:
    """Return the origin of a value that overrides the default."""
    if name in given.origins and given.values[name] not in (None, "auto"):
        return f"asked for by {given.origins[name]}"
    return None


def _device(config: EngineConfig, given: Given, hardware: Hardware) -> Choice:
    ranks = config.tensor_parallel_size
    if config.device == "cuda":
        why = f"{len(hardware.gpus)} visible"
        return f"GPU 0 to {ranks - 1}" if ranks > 1 else "GPU 0", _origin("device", given) or why
    why = _origin("device", given) or hardware.why_no_gpu or "no GPU is visible"
    return f"cpu, {ranks} process{'es' if ranks > 1 else ''}", why


def _dtype(config: EngineConfig, given: Given, on_gpu: bool) -> Choice:
    default = "the checkpoint's" if on_gpu else "16 bits are emulated on most CPUs"
    return config.dtype, _origin("dtype", given) or default


def _decode_attention(config: EngineConfig, given: Given, on_gpu: bool) -> Choice:
    origin = _origin("attention_backend", given)
    if config.attention_backend == "torch":
        return "torch", (origin if on_gpu and origin else "the CPU has no other")
    return "split kernel (Triton)", origin or "the kernel of our own, for GPUs"


def _prefill_attention(config: EngineConfig, given: Given, on_gpu: bool) -> Choice:
    origin = _origin("attention_backend", given)
    if config.attention_backend == "flash-attn":
        return "flash-attn 2", origin or "the fastest here"
    if origin and on_gpu:
        return "torch", origin
    gpus = visible_gpus()[: config.tensor_parallel_size] if on_gpu else []
    why = why_no_flash_attn(gpus, config.dtype, config.model_config.head_dim)
    return "torch", f"no flash-attn: {why}"


def _all_reduce(config: EngineConfig, hardware: Hardware, on_gpu: bool) -> Choice:
    ranks = config.tensor_parallel_size
    if ranks == 1:
        return "none", "one rank has it all"
    if not on_gpu:
        return "Gloo", "the CPU has no other"
    if config.disable_custom_all_reduce:
        return "NCCL", "disable_custom_all_reduce is set"
    links = [link for link in hardware.links if max(link.ranks) < ranks]
    for link in links:
        if link.peer_access is False:
            a, b = link.ranks
            return "NCCL", f"GPU {a} and GPU {b} do not reach each other's memory"
    reach = "the GPUs reach each other's memory"
    if any(link.peer_access is None for link in links):
        reach = f"if {reach}, which NVML does not report"
    return (
        "peer memory",
        f"{reach}; tried against NCCL when the workers start",
    )


def _matmuls(config: EngineConfig, hardware: Hardware, on_gpu: bool) -> Choice:
    if not on_gpu:
        return "torch", "the CPU has no other"
    if config.disable_custom_matmul:
        return "torch", "disable_custom_matmul is set"
    ours = "one row by a kernel of our own"
    gpu = hardware.gpus[0].name
    if config.dtype == "float32":
        return f"{ours}, torch", "only half precision has been measured"
    if table_path(gpu).exists():
        why = f"there is a table for {gpu}; torch's where it is of another cuBLASLt"
        return f"{ours}, measured algorithms of cuBLASLt", why
    return f"{ours}, torch", f"launch/tune_matmuls.py has not measured {gpu} yet"


def _decode_steps(config: EngineConfig, given: Given, on_gpu: bool) -> Choice:
    if not on_gpu:
        return "eager", "CUDA graphs need a GPU"
    if config.enforce_eager:
        return "eager", _origin("enforce_eager", given) or "enforce_eager is set"
    return "CUDA graphs", "one launch for a whole step"
