"""Every dense family against transformers': the same logits, by the blocks that they share."""

from pathlib import Path
from typing import Any

import pytest

from tests.models.test_qwen3 import logits_equal_transformers, save_checkpoint
from tests.ranks import run_ranks

# Changes to the sizes of `save_checkpoint`; None leaves a field to transformers.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5, "vocab_size": 131}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "tied llama": ("Llama", {"tie_word_embeddings": True, "head_dim": None}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": None}),
    "llama3 rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "yarn": (
        "Qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for name, (family, changes) in FAMILIES.items():
        folders.append(tmp_path_factory.mktemp(name.replace(" ", "-")))
        save_checkpoint(folders[-1], changes, sharded=False, family=family)
    return folders


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_logits_equal_transformers(world_size: int, folders: list[Path]) -> None:
    run_ranks(logits_equal_transformers, world_size, folders)
