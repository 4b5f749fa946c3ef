"""Engines whose workers are forked from the tests' process, where torch is imported once for all.

A start takes half a second that way instead of four to ten, and what runs is the same. Started, as
ever, are the workers of programs that tests run, and those of `AsyncLLM`'s own process, which is no
fork either: libraries that it shares with the tests have threads of their own, which a fork lacks.
On a machine with GPUs nothing is forked: a GPU is lost to a process's forks.
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

    All that these import is imported here first, some five seconds: once rather than in every fork,
    and not by the thread that reads an engine's tokenizer while another one forks.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            import tpllm.models.qwen3
            import tpllm.worker.worker  # noqa: F401

            Tokenizer(SHIPPED_MODEL).load()
            patch.setattr(processes, "_start", _forked)
        yield


@contextmanager
def engines_are_started() -> Iterator[None]:
    """Within the block they are started, as ever: for tests of the start itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_start", _started)
        yield


def _forked(command: processes.Command, environment: dict[str, str], output: int) -> Any:
    start = forked_workers.start if "tpllm.worker" in command[0] else _started
    return start(command, environment, output)
