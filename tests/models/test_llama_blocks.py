"""A family that is not in the package: its blocks on its spec give transformers' logits."""

from pathlib import Path
from typing import Any

import pytest

from tests.architectures.llama import LLAMA
from tests.models.test_qwen3 import logits_equal_transformers, save_checkpoint
from tests.ranks import run_ranks
from tpllm.architectures import registry
from tpllm.parallel.group import TPGroup

CHANGES: dict[str, Any] = {"rms_norm_eps": 1e-5, "vocab_size": 131}


def llamas_logits_equal_transformers(tp: TPGroup, folder: Path) -> None:
    families = registry.FAMILIES
    registry.FAMILIES = [*families, LLAMA]
    try:
        logits_equal_transformers(tp, [folder])
    finally:
        registry.FAMILIES = families


@pytest.mark.parametrize("world_size", [1, 2])
def test_logits_equal_transformers(world_size: int, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CHANGES, sharded=False, family="Llama")
    run_ranks(llamas_logits_equal_transformers, world_size, tmp_path)
