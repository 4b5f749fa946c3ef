"""Who may come in: a bounded queue in front of the engine, and the way to a quiet end."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tpllm.server.errors import APIError

RATE_WINDOW_S = 30.0
MAX_RETRY_AFTER_S = 60


class Admission:
    """Counts the sequences in the server, and refuses what is beyond the queue.

    Args:
        num_running: sequences that the engine can run at the same time (`max_num_seqs`)
        max_queue: sequences that may wait besides
    """

    def __init__(self, num_running: int, max_queue: int) -> None:
        self._num_running = num_running
        self._max_queue = max_queue
        self._num_seqs = 0
        self.num_answers = 0  # that are being made or sent
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended: deque[tuple[float, int]] = deque()  # when, and how many sequences
        self.draining = False

    @property
    def num_seqs(self) -> int:
        """Sequences that are here: running, waiting, or in an answer that has not left."""
        return self._num_seqs

    @property
    def capacity(self) -> int:
        return self._num_running + self._max_queue

    def check(self, num_seqs: int = 1) -> None:
        """Whether `num_seqs` more may come in now.

        Raises:
            APIError: 503 while the server drains; 429 when the queue is full; 400 when it would
                not take so many if it were empty.
        """
        if self.draining:
            raise APIError(
                503,
                "the server is shutting down and takes no new requests",
                code="shutting_down",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        if num_seqs > self.capacity:
            raise APIError(
                400,
                f"the request comes to {num_seqs} sequences, prompts times n, and this server "
                f"holds at most {self.capacity} at a time; send fewer prompts, or lower n",
            )
        if self._num_seqs + num_seqs > self.capacity:
            raise APIError(
                429,
                f"the queue is full: {self._num_seqs} sequences run or wait, and "
                f"{self.capacity} may; try again later",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after_s())},
            )

    @contextmanager
    def enter(self, num_seqs: int) -> Iterator[None]:
        """Be counted while inside: from a request's first check to its answer's last byte.

        Raises:
            APIError: as `check`.
        """
        self.check(num_seqs)
        self._num_seqs += num_seqs
        self.num_answers += 1
        try:
            yield
        finally:
            self._num_seqs -= num_seqs
            self.num_answers -= 1
            self._ended.append((time.monotonic(), num_seqs))
            self._forget_old()

    @contextmanager
    def ending(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """Have `end_all` cancel `task` while inside."""
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def wait_for_answers(self, timeout_s: float) -> None:
        """Return once all answers have been sent, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.num_answers and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def end_all(self) -> None:
        """End every request that is inside of `ending`, by cancelling its task."""
        for task in self._tasks:
            task.cancel()

    def _retry_after_s(self) -> int:
        """Seconds until a place should be free, from how many became free lately."""
        self._forget_old()
        ended = sum(num_seqs for _, num_seqs in self._ended)
        if not ended:
            return 5
        seconds = max(self._max_queue, 1) / (ended / RATE_WINDOW_S) / 2  # half the queue gone
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(seconds)))

    def _forget_old(self) -> None:
        oldest = time.monotonic() - RATE_WINDOW_S
        while self._ended and self._ended[0][0] < oldest:
            self._ended.popleft()
