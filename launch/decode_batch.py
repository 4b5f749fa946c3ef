"""DecodeBatch: requests that decode in lockstep, for scripts that time an engine's steps."""

import statistics
import time

from tpllm.engine.coordinator import Coordinator
from tpllm.engine.request import AddRequest

NUM_REFILL = 3  # steps until the engine is again one step ahead of the results


class DecodeBatch:
    """Requests without an end, added to a coordinator that has no other requests."""

    def __init__(self, coordinator: Coordinator, requests: list[AddRequest]) -> None:
        self._coordinator = coordinator
        # numbers of tokens, in order of arrival
        self._prompts = {each.request_id: len(each.prompt_token_ids) for each in requests}
        self._outputs = dict.fromkeys(self._prompts, 0)
        coordinator.add(requests)

    @property
    def contexts(self) -> list[int]:
        """The number of tokens before each request's newest token."""
        return [self._prompts[name] + num_out - 1 for name, num_out in self._outputs.items()]

    def warm_up(self, num_tokens: int) -> None:
        """Return when every request has at least `num_tokens` tokens more than now."""
        goals = {name: num_out + num_tokens for name, num_out in self._outputs.items()}
        while any(self._outputs[name] < goal for name, goal in goals.items()):
            self._step()

    def time(self, num_steps: int) -> dict[str, float]:
        """Time `num_steps` steps and return milliseconds of a step.

        `step_ms` is the median from result to result, as a caller sees it. `gpu_ms` is the mean by
        the device's own clock; if it is lower, the host is the slower one.
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
        """Keep only the first `num_seqs` requests; the others have ended when this returns."""
        gone = list(self._outputs)[num_seqs:]
        self._coordinator.abort(gone)
        for _ in range(self._coordinator.num_in_flight):  # the steps that still hold them
            self._step()
        for name in gone:
            del self._outputs[name]

    def _step(self) -> None:
        for update in self._coordinator.step():
            self._outputs[update.request_id] += len(update.new_token_ids)
