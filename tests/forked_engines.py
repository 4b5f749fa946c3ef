"""Engines whose workers are forked from the tests' process, which has imported torch once.

A start then takes half a second instead of four to ten, and the same code runs. Two kinds of worker
are still started: those of programs that tests run, and those of `AsyncLLM`'s own process, since
libraries in the tests' process have threads, which a fork would lack. On a machine with GPUs
nothing is forked, since a forked process cannot use CUDA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from launch import forked_workers
from tpllm.config.checkpoint import SHIPPED_MODEL
from tpllm.supervision import processes
from tpllm.text.tokenizer import Tokenizer

_started = processes._start


@contextmanager
def engines_are_forked() -> Iterator[None]:
    """Within the block, real workers are forks of this process.

    Everything that workers import is imported here first (five seconds): once instead of in every
    fork, and not by the thread that reads an engine's tokenizer while another thread forks.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            import tpllm.models.dense
            import tpllm.worker.worker  # noqa: F401

            Tokenizer(SHIPPED_MODEL).load()
            patch.setattr(processes, "_start", _forked)
        yield


@contextmanager
def engines_are_started() -> Iterator[None]:
    """Within the block, workers are started as usual: for tests of the start itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_start", _started)
        yield


def _forked(command: processes.Command, environment: dict[str, str], output: int) -> Any:
    start = forked_workers.start if "tpllm.worker" in command[0] else _started
    return start(command, environment, output)
