import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpllm import LLM, AsyncLLM
from tpllm.config.settings import Settings
from tpllm.errors import UnknownSettingError


def test_numpy_numbers_and_paths_become_plain_ones():
    given: dict[str, Any] = {
        "model": Path("/m"),
        "max_num_seqs": np.int32(8),
        "gpu_memory_utilization": np.float32(0.5),
        "seed": np.uint64(2**64 - 1),
    }
    settings = Settings(**given)
    assert (settings.model, settings.max_num_seqs, settings.seed) == ("/m", 8, 2**64 - 1)
    assert type(settings.gpu_memory_utilization) is float


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("model", "", "model='' must be a folder or a Hugging Face id"),
        ("model", 5, "model=5 must be a folder"),
        ("tokenizer", b"t", "tokenizer=b't' must be a folder"),
        ("tensor_parallel_size", 0, "tensor_parallel_size=0 must be at least 1"),
        ("tensor_parallel_size", True, "tensor_parallel_size=True must be a whole number"),
        ("tensor_parallel_size", "2", "tensor_parallel_size='2' must be a whole number"),
        ("tensor_parallel_size", None, "tensor_parallel_size=None must be a whole number"),
        ("device", "tpu", "device='tpu' must be one of 'auto', 'cuda', 'cpu'"),
        ("device", None, "device=None must be one of"),
        ("dtype", "int8", "dtype='int8' must be one of 'auto', 'bfloat16', 'float16', 'float32'"),
        ("max_model_len", 0, "max_model_len=0 must be at least 1"),
        ("max_num_seqs", 0, "max_num_seqs=0 must be at least 1"),
        ("max_num_seqs", 10**6, "max_num_seqs=1000000 must be at most 65535"),
        ("max_num_batched_tokens", 16, "max_num_seqs=256 is more than max_num_batched_tokens=16"),
        ("max_num_batched_tokens", 16.0, "max_num_batched_tokens=16.0 must be a whole number"),
        ("gpu_memory_utilization", 0, "gpu_memory_utilization=0 must be more than 0 and at most 1"),
        ("gpu_memory_utilization", 1.01, "gpu_memory_utilization=1.01 must be more than 0 and"),
        ("gpu_memory_utilization", float("nan"), "gpu_memory_utilization=nan must be finite"),
        ("num_kv_blocks", 1, "num_kv_blocks=1 must be at least 2"),
        ("kv_block_size", 0, "kv_block_size=0 must be at least 1"),
        ("enable_prefix_caching", 1, "enable_prefix_caching=1 must be True or False"),
        ("enforce_eager", "no", "enforce_eager='no' must be True or False"),
        ("skip_tokenizer_init", None, "skip_tokenizer_init=None must be True or False"),
        ("load_format", "gguf", "load_format='gguf' must be one of 'auto', 'dummy'"),
        (
            "attention_backend",
            "xformers",
            "attention_backend='xformers' must be one of 'auto', 'flash-attn', 'triton', 'torch'",
        ),
        ("start_timeout_s", 0, "start_timeout_s=0 must be more than 0 and at most 1e"),
        ("start_timeout_s", None, "start_timeout_s=None must be a number"),
        ("step_timeout_s", -1, "step_timeout_s=-1 must be more than 0"),
        ("step_timeout_s", float("inf"), "step_timeout_s=inf must be finite"),
        ("seed", None, "seed=None must be a whole number"),
        ("seed", 2**64, "seed=18446744073709551616 must be at most"),
    ],
)
def test_a_wrong_value_is_refused_by_name(setting, value, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{setting: value})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Settings)])
def test_a_typing_error_in_any_keyword_gives_the_right_one(field):
    with pytest.raises(UnknownSettingError, match=f"did you mean '{field}'"):
        Settings(**{field + "x": 1})  # type: ignore[arg-type]


def test_help_explains_every_setting():
    for field in dataclasses.fields(Settings):
        assert f"\n        {field.name}: " in (Settings.__doc__ or "")


def seen_by_type_checkers() -> None:
    """Never run: mypy fails if one of these lines is no error, or if the first is one."""
    LLM(Path("m"), tensor_parallel_size=2, tokenizer=Path("t"), on_phase=print)
    LLM(tensor_parallel_size="2")  # type: ignore[arg-type]
    LLM(device="tpu")  # type: ignore[arg-type]
    LLM(max_num_seq=2)  # type: ignore[call-arg]
    AsyncLLM("m", step_timeout_s="1")  # type: ignore[arg-type]
