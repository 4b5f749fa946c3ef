"""Load: the times at which requests arrive, and a record of each request."""

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tpllm.cli.bench.client import HTTPStatusError, Server

HEAD_BYTES = 1000


@dataclass
class Record:
    """The times and counts of one request. Times are those of time.perf_counter(), in seconds.

    Attributes:
        start: when it was sent, on a connection that was open already
        late_s: how much later than planned this client reached it, without the wait for one of
            the `max_concurrency`
        piece_times: when each piece of text came
        end: when the answer was complete
        num_prompt_tokens, num_output_tokens: as the server counts them; a server without
            counts leaves the numbers that were asked for, and the number of pieces
        error: what went wrong, or None
    """

    num_prompt_tokens: int
    start: float = 0.0
    late_s: float = 0.0
    piece_times: list[float] = field(default_factory=list)
    end: float = 0.0
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.piece_times[0] - self.start

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latency: between a piece and the next."""
        return [b - a for a, b in pairwise(self.piece_times)]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an output of one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.piece_times[-1] - self.piece_times[0]) / (self.num_output_tokens - 1)

    @property
    def e2el_s(self) -> float:
        """End-to-end latency: from the request to the last piece of text."""
        return self.piece_times[-1] - self.start


@dataclass(frozen=True)
class Job:
    """A request to send: the path it goes to, its JSON, and how many tokens its prompt has."""

    path: str
    body: dict[str, Any]
    num_prompt_tokens: int


@dataclass(frozen=True)
class Load:
    """The result of a run.

    Attributes:
        records: one for each job, in their order
        duration_s: from the first request to the end of the last
        cpu_s: processor time of this client
    """

    records: list[Record]
    duration_s: float
    cpu_s: float


def arrival_times(rate: float, num_requests: int, seed: int) -> list[float]:
    """Return the seconds after the start at which requests arrive: a Poisson process.

    Args:
        rate: requests per second; infinity for all at once
        seed: of the random times; the first request always comes at once
    """
    if rate == float("inf"):
        return [0.0] * num_requests
    rng = random.Random(seed)
    times = [0.0]
    while len(times) < num_requests:
        times.append(times[-1] + rng.expovariate(rate))
    return times[:num_requests]


async def run_load(
    server: Server,
    jobs: list[Job],
    arrivals: list[float],
    max_concurrency: int | None = None,
    timeout_s: float = 3600.0,
    on_end: Callable[[], object] = lambda: None,
) -> Load:
    """Send every job at its time, or later if `max_concurrency` others run.

    `on_end` is called at the end of each, with or without an error.
    """
    records = [Record(job.num_prompt_tokens) for job in jobs]
    # without a limit, each job has a slot
    slots = asyncio.Semaphore(max_concurrency or max(1, len(jobs)))
    begin, cpu = time.perf_counter(), time.process_time()

    async def one(job: Job, record: Record, planned: float) -> None:
        record.late_s = time.perf_counter() - planned
        async with slots:
            await _send(server, job, record, timeout_s)
        on_end()

    async with asyncio.TaskGroup() as tasks:
        for job, record, arrival in zip(jobs, records, arrivals, strict=True):
            if (wait_s := begin + arrival - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            tasks.create_task(one(job, record, begin + arrival))
    duration_s = max(record.end for record in records) - min(record.start for record in records)
    return Load(records, duration_s, time.process_time() - cpu)


async def _send(server: Server, job: Job, record: Record, timeout_s: float) -> None:
    """Run one request; its record gets the error, if there is one."""
    pieces = _Pieces(record)
    record.start = record.end = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            exchange = await server.connect(pieces.on_data)
            try:
                request = server.request("POST", job.path, job.body)
                record.start = time.perf_counter()
                status = await exchange.run(request)
            finally:
                exchange.close()
        if status != 200:
            raise HTTPStatusError(job.path, status, pieces.head)
        if pieces.error is not None:
            record.error = pieces.error
        elif not record.piece_times:
            record.error = "the stream brought no text"
    except TimeoutError:
        record.error = f"no complete answer within {timeout_s:g} s"
    except OSError as error:
        record.error = str(error)
    record.end = time.perf_counter()


class _Pieces:
    """Reads a stream of server-sent events into a record."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._counted = False  # whether the server has said how many tokens there were
        self._unread = b""  # the beginning of a line
        self.head = b""  # of the answer, for an error message if it is no event stream
        self.error: str | None = None

    def on_data(self, data: bytes, now: float) -> None:
        if len(self.head) < HEAD_BYTES:
            self.head += data
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                payload = line[5:].strip()
                if payload != b"[DONE]":
                    self._take(payload, now)

    def _take(self, payload: bytes, now: float) -> None:
        record = self._record
        try:
            event = json.loads(payload)
            choices = event.get("choices") or []
            if error := event.get("error"):
                self.error = str(error.get("message") if isinstance(error, dict) else error)
            if any(_has_text(choice) for choice in choices):
                record.piece_times.append(now)
                if not self._counted:
                    record.num_output_tokens += 1
            if usage := event.get("usage"):
                self._counted = True
                record.num_output_tokens = usage["completion_tokens"]
                record.num_prompt_tokens = usage["prompt_tokens"]
        except (ValueError, AttributeError, KeyError, TypeError):
            self.error = f"the stream brought {payload[:100]!r}, which is no completion"


def _has_text(choice: dict[str, Any]) -> bool:
    """Whether a choice of an event brings text: answer or reasoning, under any of their names."""
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text"))
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning"))
