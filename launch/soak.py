"""Serves 200,000 requests of random shape, some of them aborted, and looks for leaks.

Everything but the model is real: scheduler, blocks, prefix cache, preemption, rings and processes.
A worker without a model computes tokens from what its cache holds, so that every output can be
compared with that of a quiet run. Blocks, descriptors, threads, shared memory and resident memory
of the coordinator and its workers are compared with their values after a tenth of the requests.
Prints a table, then one JSON line. The exit code is 1 if anything is wrong.

    python launch/soak.py
"""

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from launch.soak_worker import continuation  # noqa: E402
from tpllm import SamplingParams  # noqa: E402
from tpllm.config.engine_config import EngineConfig  # noqa: E402
from tpllm.engine.request import AddRequest, RequestUpdate  # noqa: E402
from tpllm.supervision.start import start_engine  # noqa: E402

MAX_OUTSTANDING = 300
ABORTED = 0.005  # share of the running requests, whenever some are aborted
SLACK_BYTES = 8 << 20  # of resident memory, for what allocators keep


class Soak:
    """An engine, its requests, and their outputs."""

    def __init__(self, tensor_parallel_size: int, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        config = EngineConfig.resolve(
            device="cpu",
            tensor_parallel_size=tensor_parallel_size,
            skip_tokenizer_init=True,
            max_num_seqs=64,
            max_num_batched_tokens=256,
            max_model_len=160,
            kv_block_size=4,
            num_kv_blocks=600,  # too few for all rows at their longest: some are preempted
        )
        self._vocab_size = config.model_config.vocab_size
        self._ends = set(config.model_config.eos_token_ids)
        self.engine = start_engine(config, module="launch.soak_worker")
        self._num_free = self.engine._blocks.num_free
        self._running: dict[str, tuple[AddRequest, list[int]]] = {}
        self._stems = [[self._rng.randrange(4000) for _ in range(60)] for _ in range(20)]
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._count = 0

    def run(self, num_requests: int) -> None:
        """Serve `num_requests` more requests to their ends."""
        last = self._count + num_requests
        while self._count < last or self.engine.num_unfinished or self.engine.num_in_flight:
            room = min(MAX_OUTSTANDING - len(self._running), last - self._count)
            if room > 0:
                self._add(self._rng.randint(0, room))
            if self._running and self._rng.random() < 0.3:
                self._abort()
            for update in self.engine.step():
                self._receive(update)
        if self.engine._blocks.num_free != self._num_free:
            self.wrong.append(f"{self._num_free - self.engine._blocks.num_free} blocks are gone")

    def _add(self, count: int) -> None:
        requests = [self._request() for _ in range(count)]
        for request in requests:
            self._running[request.request_id] = (request, [])
        self.engine.add(requests)

    def _request(self) -> AddRequest:
        rng = self._rng
        stem = rng.choice(self._stems)[: rng.randint(0, 60)]  # prompts that start alike
        prompt = stem + [rng.randrange(4000) for _ in range(rng.randint(1, 40))]
        self._count += 1
        params = SamplingParams(temperature=0, max_tokens=rng.choice((1, 2, 5, 12, 30, 60)))
        return AddRequest(str(self._count), prompt, params)

    def _abort(self) -> None:
        chosen = [each for each in self._running if self._rng.random() < ABORTED]
        for update in self.engine.abort(chosen):
            self._receive(update)

    def _receive(self, update: RequestUpdate) -> None:
        request, tokens = self._running[update.request_id]
        tokens += update.new_token_ids
        if update.finish_reason is None:
            return
        del self._running[update.request_id]
        self.ended[update.finish_reason] += 1
        quiet = self._quiet_run(request)
        if update.finish_reason == "abort":
            quiet = quiet[: len(tokens)]
        if tokens != quiet:
            self.wrong.append(f"request {update.request_id} gave {tokens}, alone {quiet}")

    def _quiet_run(self, request: AddRequest) -> list[int]:
        """Return the request's tokens by the definition of the worker's model."""
        tokens = []
        limit = request.sampling_params.max_tokens
        for token_id in islice(continuation(request.prompt_token_ids, self._vocab_size), limit):
            tokens.append(token_id)
            if token_id in self._ends:
                break
        return tokens

    def holdings(self) -> dict[str, int]:
        """Return what the engine's processes hold now."""
        pids = [os.getpid(), *self.engine.worker_pids]
        return {
            "processes": len(pids),
            "descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
            "threads": sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids),
            "shared segments": sum(map(num_shared_segments, pids)),
            "resident bytes": sum(map(resident_bytes, pids)),
        }


def num_shared_segments(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("/memfd:tpllm")


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Return what has grown."""
    slack = {"resident bytes": SLACK_BYTES}
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if after[name] > before[name] + slack.get(name, 0)
    ]


def soak(num_requests: int, tensor_parallel_size: int) -> dict[str, Any]:
    """Run the whole soak and return its figures; errors are under "wrong"."""
    begin = time.perf_counter()
    trial = Soak(tensor_parallel_size)
    try:
        trial.run(num_requests // 10)
        before = trial.holdings()
        trial.run(num_requests - num_requests // 10)
        after = trial.holdings()
        stats = trial.engine.stats
    finally:
        trial.engine.close()
    return {
        "requests": sum(trial.ended.values()),
        "ended": dict(trial.ended),
        "steps": stats.num_steps,
        "preemptions": stats.num_preemptions,
        "cached_tokens": stats.num_cached_tokens,
        "seconds": round(time.perf_counter() - begin, 1),
        "before": before,
        "after": after,
        "wrong": trial.wrong[:5] + grown(before, after),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    args = parser.parse_args()
    figures = soak(args.requests, args.tensor_parallel_size)
    for name, before in figures["before"].items():
        print(f"{name:<20}{before:>16}{figures['after'][name]:>16}")
    print(json.dumps(figures))
    return int(bool(figures["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
