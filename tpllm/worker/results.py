"""Sends what each step drew to the coordinator, without holding up the next launch."""

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
_NUM_READBACKS = 4  # two steps in flight, the one before them for its times, and one to spare


@dataclass
class Readback:
    """Pinned memory that receives what a step yields, and the marks that say when it has."""

    tokens: torch.Tensor
    marks: StepMarks
    logprobs: list[tuple[LogprobWords, torch.Tensor]] = field(default_factory=list)

    def receive(self, output: StepOutput) -> None:
        """Copy what the device will have computed, without waiting for it."""
        self.tokens[: output.tokens.numel()].copy_(output.tokens, non_blocking=True)
        self.logprobs = []
        for each in output.logprobs:
            # torch keeps pinned memory for reuse, and most steps need none of this
            host = torch.empty(
                each.words.shape, dtype=torch.int32, pin_memory=self.tokens.is_pinned()
            )
            host.copy_(each.words, non_blocking=True)
            self.logprobs.append((each, host))

    def logprob_records(self) -> np.ndarray:
        """What has arrived, as a step's result carries it."""
        records = [
            record for each, host in self.logprobs for record in each.to_records(host.numpy())
        ]
        return np.concatenate([_NO_WORDS, *records])


class ResultSender:
    """Waits for each step's tokens in a thread of its own, and sends them.

    A buffer belongs to its step until the thread has sent it.
    """

    def __init__(
        self, replies: Replies, times: StepTimes, device: torch.device, limits: PlanLimits
    ) -> None:
        self._replies = replies
        self._times = times
        self._free: queue.SimpleQueue[Readback] = queue.SimpleQueue()
        self._sent: queue.SimpleQueue[tuple[int, np.ndarray, Readback]] = queue.SimpleQueue()
        pinned = device.type == "cuda"
        for _ in range(_NUM_READBACKS):
            tokens = torch.zeros(limits.max_num_seqs, dtype=torch.int32, pin_memory=pinned)
            self._free.put(Readback(tokens, StepMarks(device)))
        threading.Thread(target=self._run, name="tpllm-results", daemon=True).start()

    def next_buffer(self) -> Readback:
        """A buffer for the step about to be launched."""
        return self._free.get()

    def send(self, plan: StepPlan, readback: Readback) -> None:
        """Send the result of `plan` once `readback` holds it."""
        self._sent.put((plan.step, plan.samples, readback))

    def _run(self) -> None:
        previous: Readback | None = None
        try:
            while True:
                step, num_yielded, readback = self._sent.get()
                readback.marks.wait_end()
                tokens = readback.tokens.numpy()[: int(num_yielded.sum())]
                logprobs = readback.logprob_records()
                self._replies.result(StepResult(step, num_yielded, tokens, logprobs).parts())
                self._times.add(readback.marks)
                if previous is not None:  # its end is where this step's idle time began
                    self._free.put(previous)
                previous = readback
        except BaseException:
            try:
                self._replies.error(traceback.format_exc())
            finally:
                os._exit(1)
