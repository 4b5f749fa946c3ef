"""DecodeBatch: requests that decode in lockstep, for scripts that time an engine's steps."""

import statistics
import time

from tpllm.engine.coordinator import Coordinator
from tpllm.engine.request import AddRequest

NUM_REFILL = 3  # steps until the next one is again under way when a result comes


class DecodeBatch:
    """Requests without an end, handed to a coordinator that has no others."""

    def __init__(self, coordinator: Coordinator, requests: list[AddRequest]) -> None:
        self._coordinator = coordinator
        # numbers of tokens, in order of arrival
        self._prompts = {each.request_id: len(each.prompt_token_ids) for each in requests}
        self._outputs = dict.fromkeys(self._prompts, 0)
        coordinator.add(requests)

    @property
    def contexts(self) -> list[int]:
        """How many tokens each request's newest one was drawn from."""
        return [self._prompts[name] + num_out - 1 for name, num_out in self._outputs.items()]

    def warm_up(self, num_tokens: int) -> None:
        """Return when the last request has `num_tokens` tokens more than now."""
        goals = {name: num_out + num_tokens for name, num_out in self._outputs.items()}
        while any(self._outputs[name] < goal for name, goal in goals.items()):
            self._step()

    def time(self, num_steps: int) -> dict[str, float]:
        """Milliseconds of a step: the median from result to result, as a caller sees it, and the
        mean by the device's own clock, which shows where the host is the slower one.
        """
        self._coordinator.worker_times()  # the step in flight may end meanwhile
        for _ in range(NUM_REFILL):
            self._step()
        times_ms = []
        for _ in range(num_steps):
            begin = time.perf_counter()
            self._step()
            times_ms.append((time.perf_counter() - begin) * 1e3)
        decode = self._coordinator.worker_times()["decode"]
        figures = {"step_ms": statistics.median(times_ms)}
        if decode["steps"]:
            figures["gpu_ms"] = decode["gpu_ms"] / decode["steps"]
        return {name: round(value, 4) for name, value in figures.items()}

    def shrink(self, num_seqs: int) -> None:
        """Keep the first `num_seqs` requests alone; the others are gone when this returns."""
        gone = list(self._outputs)[num_seqs:]
        self._coordinator.abort(gone)
        for _ in range(self._coordinator.num_in_flight):  # the steps that still hold them
            self._step()
        for name in gone:
            del self._outputs[name]

    def _step(self) -> None:
        for update in self._coordinator.step():
            self._outputs[update.request_id] += len(update.new_token_ids)
