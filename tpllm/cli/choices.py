"""Choices: what an engine would use on this machine for given settings, and why."""

from tpllm.cli.hardware import Hardware
from tpllm.cli.sources import Given
from tpllm.config.devices import visible_gpus
from tpllm.config.engine_config import EngineConfig, why_no_flash_attn
from tpllm.layers.linear.matmul_algorithms import table_path

Choice = tuple[str, str]  # the choice, and the reason for it
NO_16_BITS = "16 bits are emulated on most CPUs"


def explain(given: Given, hardware: Hardware) -> dict[str, Choice]:
    """Return choice and reason by name.

    Raises:
        ValueError, FileNotFoundError: no engine could start with these settings.
    """
    config = EngineConfig.resolve(**given.values)
    on_gpu = config.device == "cuda"
    pages = config.attention_backend == "flash-attn"
    why_block = "flash-attn reads pages of 256" if pages else "the default here"

    def asked(name: str) -> str | None:
        """Return the origin of a value that overrides the default."""
        if name in given.origins and given.values[name] not in (None, "auto"):
            return f"asked for by {given.origins[name]}"
        return None

    return {
        "model": (config.model_config.name, str(config.folder)),
        "device": _device(config, hardware, asked("device")),
        "dtype": (config.dtype, asked("dtype") or ("the checkpoint's" if on_gpu else NO_16_BITS)),
        "max_model_len": (
            f"{config.max_model_len} tokens",
            asked("max_model_len") or "the model's limit, or less if the cache is smaller",
        ),
        "prefill attention": _prefill_attention(config, on_gpu, asked("attention_backend")),
        "decode attention": _decode_attention(config, on_gpu, asked("attention_backend")),
        "all-reduce": _all_reduce(config, hardware, on_gpu),
        "matmuls": _matmuls(config, hardware, on_gpu),
        "decode steps": _decode_steps(config, on_gpu, asked("enforce_eager")),
        "KV block": (f"{config.kv_block_size} tokens", asked("kv_block_size") or why_block),
    }


def _device(config: EngineConfig, hardware: Hardware, asked: str | None) -> Choice:
    ranks = config.tensor_parallel_size
    if config.device == "cuda":
        why = f"{len(hardware.gpus)} visible"
        return f"GPU 0 to {ranks - 1}" if ranks > 1 else "GPU 0", asked or why
    why = asked or hardware.why_no_gpu or "no GPU is visible"
    return f"cpu, {ranks} process{'es' if ranks > 1 else ''}", why


def _decode_attention(config: EngineConfig, on_gpu: bool, asked: str | None) -> Choice:
    if config.attention_backend == "torch":
        return "torch", (asked if on_gpu and asked else "the CPU has no other")
    return "split kernel (Triton)", asked or "the kernel of our own, for GPUs"


def _prefill_attention(config: EngineConfig, on_gpu: bool, asked: str | None) -> Choice:
    if config.attention_backend == "flash-attn":
        return "flash-attn 2", asked or "the fastest here"
    if asked and on_gpu:
        return "torch", asked
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
    return "peer memory", f"{reach}; tried against NCCL when the workers start"


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


def _decode_steps(config: EngineConfig, on_gpu: bool, asked: str | None) -> Choice:
    if not on_gpu:
        return "eager", "CUDA graphs need a GPU"
    if config.enforce_eager:
        return "eager", asked or "enforce_eager is set"
    return "CUDA graphs", "one launch for a whole step"
