"""Every test and every module must release what it takes: see leaks.py."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker, set_forkserver_preload
from pathlib import Path
from typing import Any

import pytest

# With pytest -n, each test process and its engines keep to one core: the threads of two engines on
# the same cores would wait for each other most of the time.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import torch

from tests.forked_engines import engines_are_forked
from tests.leaks import assert_nothing_left, traces

# Without a GPU, kernels run on CPU tensors in Triton's interpreter; it is chosen before the import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        """Allow scalars as bounds of range(); the interpreter's own code fails since numpy 2.4."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index

    from tests.gpu_instructions import interpret_gpu_instructions

    interpret_gpu_instructions()


# The slowest files come first, so that parallel test processes end together. The very first forks
# hundreds of processes, which is cheaper the less its process has imported.
LONGEST_FIRST = [
    "faults/test_product.py",
    "engine/test_scheduler.py",
    "test_equality.py",
    "sampling/test_thresholds.py",
    "server/test_end_to_end.py",
    "docs/test_code_blocks.py",
    "examples/test_examples.py",
    "supervision/test_launcher.py",
    "supervision/test_launcher_programs.py",
    "test_lifecycle.py",
    "test_structured_llm.py",
    "test_sampling_options.py",
    "faults/test_real_workers.py",
    "test_async_llm.py",
    "test_llm.py",
    "launch/test_benchmarks.py",
    "cli/test_chat.py",
    "sampling/test_sampler.py",
]


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would start with the files with the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session", autouse=True)
def own_temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A temporary directory that no other program uses, here and in child processes."""
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("tmp"))
        patch.setenv("TMPDIR", directory)
        patch.setattr(tempfile, "tempdir", directory)
        patch.setenv("TPLLM_CRASH_DIR", str(tmp_path_factory.mktemp("crashes")))
        # multiprocessing's two servers live as long as this process
        set_forkserver_preload(["torch"])
        resource_tracker.ensure_running()
        forkserver.ensure_running()
        assert os.path.samefile(tempfile.gettempdir(), directory)
        yield


@pytest.fixture(scope="session")
def forked_engines(own_temporary_directory: None) -> Iterator[None]:
    """From the first use on, engines of this process start within half a second."""
    with engines_are_forked():
        yield


@pytest.fixture(scope="module", autouse=True)
def module_leaves_nothing(own_temporary_directory: None) -> Iterator[None]:
    """Check that everything a module's fixtures start ends with the module."""
    before = traces()
    yield
    assert_nothing_left(before)


@pytest.fixture(autouse=True)
def nothing_left(module_leaves_nothing: None) -> Iterator[Callable[[], None]]:
    """Check that a test leaves nothing behind; a test may also call the check earlier.

    Fixtures of wider scope are set up before it, so an engine that a module shares is not a leak.
    """
    before = traces()
    yield lambda: assert_nothing_left(before)
    assert_nothing_left(before)


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """Make SIGINT raise here and in child processes, even if the shell had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
