"""Sending of each step's tokens to the coordinator, without delaying the next launch."""

import os
import queue
import threading
import traceback
from dataclasses import dataclass, field

import numpy as np
import torch

from tpllm.channel.step_plan import PlanLimits, StepPlan, StepResult
from tpllm.sampling.token_sampler import LogprobWords, StepOutput
from tpllm.worker.replies import Replies
from tpllm.worker.step_times import StepMarks, StepTimes

_NO_WORDS = np.empty(0, dtype=np.int32)
_NUM_READBACKS = 4  # two steps in flight, the one before them for its times, and a spare one


@dataclass
class Readback:
    """Pinned memory for a step's output, and marks to wait for the copies to it."""

    tokens: torch.Tensor
    marks: StepMarks
    logprobs: list[tuple[LogprobWords, torch.Tensor]] = field(default_factory=list)

    def receive(self, output: StepOutput) -> None:
        """Enqueue copies of a step's output, without waiting for them."""
        self.tokens[: output.tokens.numel()].copy_(output.tokens, non_blocking=True)
        self.logprobs = []
        for each in output.logprobs:
            # allocated per step: torch caches pinned memory, and most steps need none
            host = torch.empty(
                each.words.shape, dtype=torch.int32, pin_memory=self.tokens.is_pinned()
            )
            host.copy_(each.words, non_blocking=True)
            self.logprobs.append((each, host))

    def logprob_records(self) -> np.ndarray:
        """Return the copied log-probabilities as records of a step's result."""
        records = [
            record for each, host in self.logprobs for record in each.to_records(host.numpy())
        ]
        return np.concatenate([_NO_WORDS, *records])


class ResultSender:
    """Waits for each step's tokens in its own thread, and sends them.

    A buffer belongs to its step until the thread has sent its content.
    """

    def __init__(
        self, replies: Replies, times: StepTimes, device: torch.device, limits: PlanLimits
    ) -> None:
        self._replies = replies
        self._times = times
        self._free: queue.SimpleQueue[Readback] = queue.SimpleQueue()
        self._pending: queue.SimpleQueue[tuple[int, np.ndarray, Readback]] = queue.SimpleQueue()
        pinned = device.type == "cuda"
        for _ in range(_NUM_READBACKS):
            tokens = torch.zeros(limits.max_num_seqs, dtype=torch.int32, pin_memory=pinned)
            self._free.put(Readback(tokens, StepMarks(device)))
        threading.Thread(target=self._run, name="tpllm-results", daemon=True).start()

    def next_buffer(self) -> Readback:
        """Return a buffer for the step that is launched next."""
        return self._free.get()

    def send(self, plan: StepPlan, readback: Readback) -> None:
        """Send the result of `plan` when `readback` holds it."""
        self._pending.put((plan.step, plan.samples, readback))

    def _run(self) -> None:
        previous: Readback | None = None
        try:
            while True:
                step, num_sampled, readback = self._pending.get()
                readback.marks.wait_end()
                tokens = readback.tokens.numpy()[: int(num_sampled.sum())]
                logprobs = readback.logprob_records()
                self._replies.result(StepResult(step, num_sampled, tokens, logprobs).buffers())
                self._times.add(readback.marks)
                if previous is not None:  # kept until now: this step's idle time begins at its end
                    self._free.put(previous)
                previous = readback
        except BaseException:
            try:
                self._replies.error(traceback.format_exc())
            finally:
                os._exit(1)
