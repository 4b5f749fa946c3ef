"""The number of blocks that fit, and the error if too few fit."""

import pytest
import torch

from tpllm.config.engine_config import EngineConfig
from tpllm.errors import SettingError
from tpllm.parallel.group import TPGroup
from tpllm.worker import cache_sizing
from tpllm.worker.cache_sizing import cpu_cache_blocks
from tpllm.worker.kv_cache import CacheShape

TP = TPGroup.single(torch.device("cpu"))
SHAPE = CacheShape(num_layers=6, block_size=16, num_kv_heads=4, head_dim=64, dtype=torch.float32)


def blocks_of(monkeypatch: pytest.MonkeyPatch, free_bytes: int, **settings: int) -> int:
    monkeypatch.setattr(cache_sizing, "_host_bytes", lambda: free_bytes)
    config = EngineConfig.resolve(None, device="cpu", **settings)
    return cpu_cache_blocks(config, SHAPE, TP)


def test_a_block_s_bytes_are_those_of_its_tensors() -> None:
    caches = SHAPE.allocate(3, TP.device)
    assert len(caches) == 6
    assert all(k.shape == v.shape == (3, 16, 4, 64) and k.is_contiguous() for k, v in caches)
    assert sum(x.nbytes for pair in caches for x in pair) == 3 * SHAPE.block_bytes
    assert not any(x.any() for pair in caches for x in pair)


def test_half_of_the_free_memory_goes_to_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks_of(monkeypatch, 200 * SHAPE.block_bytes + 1) == 100


def test_no_more_blocks_than_all_rows_can_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks_of(monkeypatch, 2**50, max_num_seqs=3, max_model_len=100) == 3 * 7 + 1


def test_too_little_memory_is_an_error_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"leaves 1 KV blocks of 0\.2 MiB.*free some, or lower"):
        blocks_of(monkeypatch, 3 * SHAPE.block_bytes)


def test_the_host_s_free_memory_is_plausible() -> None:
    assert 2**20 < cache_sizing._host_bytes() < 2**50
