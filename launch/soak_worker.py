"""A worker without a model, for soak.py: a token is a function of the sequence before it.

Its cache holds for every slot a digest of the tokens up to that slot, and each token is computed
from the digest in the cache. A block that was shared wrongly, freed too early or left stale gives
another token than `continuation`, which uses no cache.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from tpllm.channel.progress import Progress
from tpllm.channel.ring import RingReader
from tpllm.channel.step_plan import CONTROL, StepPlan, StepResult
from tpllm.config.engine_config import EngineConfig
from tpllm.worker.__main__ import Spec, main
from tpllm.worker.replies import Replies

_MASK = 2**64 - 1

_NO_WORDS = np.empty(0, dtype=np.int32)


def extend(digest: int, token_id: int) -> int:
    """Return the digest of a sequence (0 if empty) and one more token."""
    return (digest * 6364136223846793005 + token_id + 1442695040888963407) & _MASK


def sample(digest: int, vocab_size: int) -> int:
    """Return the token that follows."""
    return (digest >> 33) % vocab_size


def continuation(prompt: Iterable[int], vocab_size: int) -> Iterator[int]:
    """Yield what follows a prompt, without end."""
    digest = 0
    for token_id in prompt:
        digest = extend(digest, token_id)
    while True:
        token_id = sample(digest, vocab_size)
        yield token_id
        digest = extend(digest, token_id)


class SoakWorker:
    """Runs step plans on a cache of digests."""

    def __init__(self, config: EngineConfig, num_blocks: int) -> None:
        limits = config.plan_limits
        self._vocab_size = config.model_config.vocab_size
        self._block_size = config.kv_block_size
        self._tables = np.zeros((limits.max_num_seqs, limits.max_blocks_per_seq), dtype=np.int32)
        self._last_tokens = [0] * limits.max_num_seqs
        self._cache = [0] * (num_blocks * config.kv_block_size)

    def run(self, plan: StepPlan) -> StepResult:
        flat = self._tables.reshape(-1)
        flat[plan.block_updates[:, 0]] = plan.block_updates[:, 1]
        prompt_ids = iter(plan.token_ids.tolist())
        rows = zip(plan.rows.tolist(), plan.starts.tolist(), plan.num_tokens.tolist(), strict=True)
        sampled_ids = []
        for i, (row, start, count) in enumerate(rows):
            decodes = i < plan.num_decode
            tokens = [self._last_tokens[row]] if decodes else list(islice(prompt_ids, count))
            digest = self._store(row, start, tokens)
            if plan.samples[i]:
                self._last_tokens[row] = sample(digest, self._vocab_size)
                sampled_ids.append(self._last_tokens[row])
        return StepResult(
            plan.step, plan.samples.copy(), np.array(sampled_ids, dtype=np.int32), _NO_WORDS
        )

    def _store(self, row: int, start: int, tokens: Sequence[int]) -> int:
        digest = self._cache[self._slot(row, start - 1)] if start else 0
        for position, token_id in enumerate(tokens, start):
            digest = extend(digest, token_id)
            self._cache[self._slot(row, position)] = digest
        return digest

    def _slot(self, row: int, position: int) -> int:
        block, offset = divmod(position, self._block_size)
        return int(self._tables[row, block]) * self._block_size + offset


def serve(spec: Spec, plans: RingReader, replies: Replies) -> None:
    config = EngineConfig.from_json(spec["settings"]["config"])
    progress = Progress(spec["board"], spec["local_rank"])
    assert config.num_kv_blocks is not None
    worker = SoakWorker(config, config.num_kv_blocks)
    replies.control({"type": "ready", "num_kv_blocks": config.num_kv_blocks, "info": {}})
    while True:
        record = plans.receive()
        assert record is not None
        if record.kind == CONTROL:
            if json.loads(record.payload.tobytes())["type"] == "shutdown":
                return
            continue
        plan = StepPlan.decode(record.payload)
        progress.begin(plan.step)
        if spec["rank"] == 0:
            replies.result(worker.run(plan).buffers())
        progress.launch(plan.step)


if __name__ == "__main__":
    main(serve)
