"""Measures the host's share of a step, which must overlap with the GPU's work or delays it.

"hop": the time from the coordinator's write of a step plan (a decode step of 256 sequences) until
the last of its readers has it; each reader is a process. If the readers still spin, a few system
calls and a copy bound it; if they sleep, the kernel's wake-up does. It is meaningful only if every
process has a core: use fewer readers on a small machine. "idle": CPU use of all processes of an
engine without requests. "schedule": `schedule` and `finish` of a decode step; the cost per sequence
should not grow with the batch. "text": the cost of such a step's tokens in the caller's process:
detokenizing alone, and all work of an `OutputProcessor`, deltas included; behind a server, also
packing and unpacking the updates.

All figures are medians. Prints a table, then one JSON line. Needs psutil (pip install tpllm[dev]).

    python launch/bench_host.py
"""

import argparse
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil

from tpllm import LLM, RequestOutputKind, SamplingParams, __version__
from tpllm.channel.ring import RingDescriptors, RingReader, RingWriter, create_ring
from tpllm.channel.row_record import new_records
from tpllm.channel.step_plan import STEP, PlanLimits, StepPlan, StepResult
from tpllm.config.checkpoint import SHIPPED_MODEL
from tpllm.engine.block_manager import BlockManager
from tpllm.engine.request import AddRequest, RequestUpdate, Sequence
from tpllm.engine.scheduler import Scheduler
from tpllm.supervision import messages
from tpllm.text.output_processor import OutputProcessor
from tpllm.text.tokenizer import Tokenizer

SPIN_S = 100e-6  # as in the workers
GOALS = {"hop_us": 50, "idle_cpu_percent": 1, "schedule_256_ms": 0.5, "detokenize_256_ms": 0.3}


# ---- hop -----------------------------------------------------------------------------------------


def decode_plan(num_seqs: int) -> StepPlan:
    """Return the plan of a step with one token for each of `num_seqs` sequences."""
    ones, empty = np.ones(num_seqs, dtype=np.int32), np.empty(0, dtype=np.int32)
    entering, updates = new_records(0), empty.reshape(0, 2)
    return StepPlan(0, num_seqs, ones, ones, ones, ones, entering, updates, empty, empty)


def open_board(fd: int, num_readers: int) -> np.ndarray:
    """Map the board [readers, records] int64: when each reader had each record, in shared time."""
    return np.frombuffer(mmap.mmap(fd, 0), dtype=np.int64).reshape(num_readers, -1)


def read_records(spec: dict[str, Any]) -> None:
    """Run a reader: note when each record arrives."""
    if spec["core"] is not None:
        os.sched_setaffinity(0, {spec["core"]})
    descriptors = RingDescriptors(spec["memory"], tuple(spec["ready"]), spec["freed"])
    reader = RingReader(descriptors, spec["reader"])
    arrivals = open_board(spec["board"], len(spec["ready"]))[spec["reader"]]
    for i in range(arrivals.size):
        reader.receive(spin_s=spec["spin_s"])
        arrivals[i] = time.monotonic_ns()


def measure_hop(
    num_readers: int, spin_s: float, gap_s: float, num_records: int = 2000
) -> dict[str, Any]:
    """Measure the hop in microseconds; a record is sent `gap_s` after the last one was received."""
    buffers = decode_plan(256).buffers()
    ring = create_ring(num_readers, 8, sum(each.nbytes for each in buffers))
    board_fd = os.memfd_create("bench-host")
    os.ftruncate(board_fd, num_readers * num_records * 8)
    arrivals = open_board(board_fd, num_readers)
    before = os.sched_getaffinity(0)
    cores = choose_cores(sorted(before), num_readers + 1)
    readers = []
    try:
        for i in range(num_readers):
            spec = {"memory": ring.memory, "ready": ring.ready, "freed": ring.freed, "reader": i}
            spec |= {"board": board_fd, "core": cores[i], "spin_s": spin_s}
            command = [sys.executable, __file__, "--read", json.dumps(spec)]
            readers.append(subprocess.Popen(command, pass_fds=(*ring.all(), board_fd)))
        if cores[-1] is not None:
            os.sched_setaffinity(0, {cores[-1]})
        sent = send_records(RingWriter(ring), buffers, arrivals, readers, gap_s)
    finally:
        os.sched_setaffinity(0, before)
        for reader in readers:
            reader.kill()
            reader.wait()
        ring.close()
        os.close(board_fd)
    hops_us = (arrivals.max(axis=0) - sent)[num_records // 10 :] / 1e3  # the first ones warm up
    return {
        "median_us": round(float(np.median(hops_us)), 1),
        "p99_us": round(float(np.percentile(hops_us, 99)), 1),
        "a_core_each": None not in cores,
    }


def choose_cores(available: list[int], num_processes: int) -> list[int] | list[None]:
    """Return a core for each process, or None for each if there are too few."""
    if len(available) < num_processes:
        return [None] * num_processes
    # spread over the list, since neighbours may be two threads of one core
    return [available[i * len(available) // num_processes] for i in range(num_processes)]


def send_records(
    writer: RingWriter,
    buffers: list[np.ndarray],
    arrivals: np.ndarray,
    readers: list[subprocess.Popen[bytes]],
    gap_s: float,
) -> np.ndarray:
    """Send one record after the other and return when each was sent: [records], in ns."""
    sent = np.zeros(arrivals.shape[1], dtype=np.int64)
    for i in range(sent.size):
        sent[i] = time.monotonic_ns()
        assert writer.try_send(STEP, buffers)
        while not arrivals[:, i].all():
            if any(reader.poll() not in (None, 0) for reader in readers):
                raise RuntimeError("a reader of the hop has failed")
            os.sched_yield()
        pause(gap_s)
    return sent


def pause(seconds: float) -> None:
    """Wait: asleep if it is long, and otherwise spinning, since a sleep would take much longer."""
    if seconds >= 1e-3:
        time.sleep(seconds)
        return
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        os.sched_yield()


# ---- idle ----------------------------------------------------------------------------------------


def measure_idle(seconds: float) -> dict[str, Any]:
    """Measure the CPU time of this process and its workers while a CPU engine has no requests."""
    with LLM(device="cpu") as llm:
        llm.generate("1 + 1 =", SamplingParams(max_tokens=4), use_tqdm=False)
        me = psutil.Process()
        processes = [me, *me.children(recursive=True)]
        time.sleep(1.0)
        before = [cpu_seconds(process) for process in processes]
        time.sleep(seconds)
        used = [cpu_seconds(each) - b for each, b in zip(processes, before, strict=True)]
    return {
        "cpu_percent": round(100 * sum(used) / seconds, 3),
        "processes": len(processes),
        "seconds": seconds,
    }


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


# ---- schedule ------------------------------------------------------------------------------------


def measure_schedule(num_seqs: int, num_steps: int = 300) -> dict[str, Any]:
    """Time a decode step of `num_seqs` sequences, scheduled one step ahead as in the engine."""
    block_size, prompt_length = 256, 100
    blocks_per_seq = -(-(prompt_length + num_steps + 8) // block_size)
    limits = PlanLimits(
        num_seqs, max(16384, num_seqs), blocks_per_seq, block_size, 8, max_logprobs=20
    )
    scheduler = Scheduler(BlockManager(num_seqs * blocks_per_seq + 1, block_size), limits)
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    for i in range(num_seqs):
        request = AddRequest(str(i), [i, *range(prompt_length - 1)], params)
        limit = blocks_per_seq * block_size
        scheduler.add(Sequence(request, seed=i, eos_token_ids=(0,), max_total_tokens=limit))
    plan = scheduler.schedule()
    assert plan is not None
    while plan.num_decode < num_seqs:  # until every prompt is prefilled
        plan = next_step(scheduler, plan)
    times_ms = []
    for _ in range(num_steps):
        begin = time.perf_counter()
        plan = next_step(scheduler, plan)
        times_ms.append((time.perf_counter() - begin) * 1e3)
        assert plan.num_decode == num_seqs
    step_ms = statistics.median(times_ms)
    return {"step_ms": round(step_ms, 4), "us_per_seq": round(step_ms * 1e3 / num_seqs, 3)}


def next_step(scheduler: Scheduler, plan: StepPlan) -> StepPlan:
    """Schedule the step after `plan`, then process the result of `plan`."""
    planned = scheduler.schedule()
    assert planned is not None
    token_ids = np.full(int(plan.samples.sum()), 7, dtype=np.int32)
    scheduler.finish(StepResult(plan.step, plan.samples, token_ids, token_ids[:0]))
    return planned


# ---- text ----------------------------------------------------------------------------------------


def measure_text(num_seqs: int, num_steps: int = 300) -> dict[str, Any]:
    """Time one token more for each of `num_seqs` streams, with the shipped tokenizer."""
    tokenizer = Tokenizer(SHIPPED_MODEL)
    ids = tokenizer.encode_batch(["The LORD is my shepherd; naïve — 日本 🙂\n" * 4])[0]
    sampled_ids = [
        [ids[(step + i) % len(ids)] for i in range(num_seqs)] for step in range(num_steps)
    ]
    detokenizers = [tokenizer.detokenizer() for _ in range(num_seqs)]
    processor = OutputProcessor(tokenizer)
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    requests = [processor.add(None, [1], params) for _ in range(num_seqs)]
    names = [each.engine_requests[0].request_id for each in requests]
    times: dict[str, list[float]] = {"detokenize_ms": [], "process_ms": [], "pack_ms": []}
    for tokens in sampled_ids:
        begin = time.perf_counter()
        for detokenizer, token_id in zip(detokenizers, tokens, strict=True):
            detokenizer.feed((token_id,))
        read = time.perf_counter()
        step = [RequestUpdate(n, [t], None, None, 0) for n, t in zip(names, tokens, strict=True)]
        made = time.perf_counter()
        for request in processor.process(step).changed:
            request.take()
        processed = time.perf_counter()
        messages.read_updates(msgpack.unpackb(msgpack.packb(messages.updates(step))))
        packed = time.perf_counter()
        times["detokenize_ms"].append((read - begin) * 1e3)
        times["process_ms"].append((processed - made) * 1e3)
        times["pack_ms"].append((packed - processed) * 1e3)
    medians = {name: statistics.median(each) for name, each in times.items()}
    per_token = medians["detokenize_ms"] * 1e3 / num_seqs
    return {
        **{name: round(value, 4) for name, value in medians.items()},
        "detokenize_us_per_token": round(per_token, 3),
    }


# ---- all together --------------------------------------------------------------------------------


def print_table(name: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{name}")
    for row, figures in rows.items():
        print(f"  {row:<28}" + "   ".join(f"{key} {value}" for key, value in figures.items()))


def environment() -> dict[str, Any]:
    def output_of(*command: str) -> str | None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None

    repo = str(Path(__file__).resolve().parents[1])
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "tpllm": __version__,
        "commit": output_of("git", "-C", repo, "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", choices=("hop", "idle", "schedule", "text"), help="only one measurement"
    )
    parser.add_argument("--num-readers", type=int, default=4, help="of the hop")
    parser.add_argument(
        "--idle-s", type=float, default=10.0, help="duration of the idle measurement"
    )
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 64, 256, 1024, 4096])
    parser.add_argument("--read", help=argparse.SUPPRESS)  # a reader's own process
    args = parser.parse_args()
    if args.read:
        read_records(json.loads(args.read))
        return
    readers = args.num_readers
    measurements: dict[str, Callable[[], dict[str, dict[str, Any]]]] = {
        "hop": lambda: {
            f"{readers} readers spinning": measure_hop(readers, SPIN_S, gap_s=SPIN_S / 2),
            f"{readers} readers asleep": measure_hop(readers, spin_s=0.0, gap_s=2e-3),
        },
        "idle": lambda: {"LLM(device='cpu')": measure_idle(args.idle_s)},
        "schedule": lambda: {f"{n} sequences": measure_schedule(n) for n in args.num_seqs},
        "text": lambda: {f"{n} streams": measure_text(n) for n in args.num_seqs},
    }
    result: dict[str, Any] = {"arguments": sys.argv[1:], **environment(), "goals": GOALS}
    for name, measure in measurements.items():
        if args.only in (None, name):
            result[name] = measure()
            print_table(name, result[name])
    print(f"\ngoals {GOALS}, {result['cores']} cores of {result['cpu']}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
