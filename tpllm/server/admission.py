"""Admission: a bounded queue in front of the engine, and the drain at shutdown."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tpllm.server.errors import APIError, invalid

RATE_WINDOW_S = 30.0
MAX_RETRY_AFTER_S = 60


class Admission:
    """Counts the sequences in the server, and refuses requests beyond the queue's limit.

    Args:
        num_running: sequences that the engine can run at the same time (`max_num_seqs`)
        max_queue: further sequences that may wait
    """

    def __init__(self, num_running: int, max_queue: int) -> None:
        self._num_running = num_running
        self._max_queue = max_queue
        self.num_seqs = 0  # that run, wait, or belong to an answer that is being sent
        self.num_answers = 0  # being generated or sent
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended: deque[tuple[float, int]] = deque()  # (time, number of sequences)
        self.draining = False

    @property
    def capacity(self) -> int:
        return self._num_running + self._max_queue

    def check(self, num_seqs: int = 1) -> None:
        """Check that the server accepts `num_seqs` more sequences now.

        Raises:
            APIError: 503 while the server drains; 429 if the queue is full; 400 if even an empty
                queue is too short.
        """
        if self.draining:
            raise APIError(
                503,
                "the server is shutting down and takes no new requests",
                code="shutting_down",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        if num_seqs > self.capacity:
            raise invalid(
                f"the request has {num_seqs} sequences (prompts times n), more than the "
                f"{self.capacity} that this server holds at a time; send fewer prompts, or lower n"
            )
        if self.num_seqs + num_seqs > self.capacity:
            raise APIError(
                429,
                f"the queue is full: {self.num_seqs} of at most {self.capacity} sequences run or "
                "wait; try again later",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after_s())},
            )

    @contextmanager
    def enter(self, num_seqs: int) -> Iterator[None]:
        """`check`, and count a request's sequences until the block ends with its last byte."""
        self.check(num_seqs)
        self.num_seqs += num_seqs
        self.num_answers += 1
        try:
            yield
        finally:
            self.num_seqs -= num_seqs
            self.num_answers -= 1
            self._ended.append((time.monotonic(), num_seqs))
            self._forget_old()

    @contextmanager
    def ending(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """Let `end_all` cancel `task` within the block."""
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def wait_for_answers(self, timeout_s: float) -> None:
        """Wait until all answers have been sent, for at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.num_answers and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def end_all(self) -> None:
        """Cancel the task of every request within `ending`."""
        for task in self._tasks:
            task.cancel()

    def _retry_after_s(self) -> int:
        """Estimate the seconds until the queue has room, from how many sequences ended lately."""
        self._forget_old()
        ended = sum(num_seqs for _, num_seqs in self._ended)
        if not ended:
            return 5
        seconds = max(self._max_queue, 1) / (ended / RATE_WINDOW_S) / 2  # until half is empty
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(seconds)))

    def _forget_old(self) -> None:
        oldest = time.monotonic() - RATE_WINDOW_S
        while self._ended and self._ended[0][0] < oldest:
            self._ended.popleft()
