"""A new sampling option is a field of the record, its check, and a processor: nothing else."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.reference import shipped_greedy
from tpllm import SamplingParams
from tpllm.channel import row_record
from tpllm.config.engine_config import EngineConfig
from tpllm.engine.request import AddRequest
from tpllm.sampling import token_sampler
from tpllm.sampling.processors import PROCESSORS, ChangedRows, Processor
from tpllm.supervision.start import start_engine

pytestmark = pytest.mark.usefixtures("forked_engines")

LOWEST = 3000


@dataclass(frozen=True, kw_only=True)
class ParamsWithLowestId(SamplingParams):
    lowest_id: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lowest_id < 0:
            raise ValueError(f"lowest_id={self.lowest_id} must be at least 0")


def ban_lower_ids(changed: ChangedRows, where: np.ndarray) -> None:
    ids = changed.vocab_start + torch.arange(changed.scores.shape[1])
    lower = ids < changed.rows.column("lowest_id").unsqueeze(1)
    changed.scores.masked_fill_(lower, -torch.inf)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_new_option_is_a_field_a_check_and_a_processor(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = np.dtype([*row_record.ROW.descr, ("lowest_id", "<i4")])
    monkeypatch.setattr(row_record, "ROW", fields)
    processor = Processor(lambda records: records["lowest_id"] > 0, ban_lower_ids)
    monkeypatch.setattr(token_sampler, "PROCESSORS", (processor, *PROCESSORS))

    with pytest.raises(ValueError, match="lowest_id=-1"):
        ParamsWithLowestId(lowest_id=-1)
    prompts = [each.prompt_ids for each in shipped_greedy()[:3]]
    params = [
        ParamsWithLowestId(seed=1, max_tokens=8, ignore_eos=True, lowest_id=lowest, top_k=top_k)
        for lowest, top_k in ((0, 0), (LOWEST, 0), (LOWEST, 2))
    ]
    config = EngineConfig.resolve(None, device="cpu", tensor_parallel_size=world_size)
    coordinator = start_engine(config)
    try:
        pairs = zip(prompts, params, strict=True)
        coordinator.add([AddRequest(str(i), *pair) for i, pair in enumerate(pairs)])
        tokens: dict[str, list[int]] = {}
        while coordinator.num_unfinished:
            for update in coordinator.step():
                tokens.setdefault(update.request_id, []).extend(update.new_token_ids)
    finally:
        coordinator.close()
    assert min(tokens["0"]) < LOWEST
    assert min(tokens["1"] + tokens["2"]) >= LOWEST
