"""Every test and every module must give back what it takes: see leaks.py."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing import forkserver, resource_tracker, set_forkserver_preload
from typing import Any

import pytest

# Test processes side by side (pytest -n) have a core each, and so have the engines they start: the
# threads of two engines on the same cores wait for each other most of the time.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import torch

from tests.forked_engines import engines_are_forked, makes_engines
from tests.leaks import assert_nothing_left, traces

# Without a GPU, kernels run on CPU tensors in Triton's interpreter: to be chosen before its import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        """Scalars as bounds of range(): the interpreter's own way is none since numpy 2.4."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index


@pytest.fixture(scope="session", autouse=True)
def own_temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A temporary directory that no other program uses, here and in child processes."""
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("tmp"))
        patch.setenv("TMPDIR", directory)
        patch.setattr(tempfile, "tempdir", directory)
        patch.setenv("TPLLM_CRASH_DIR", str(tmp_path_factory.mktemp("crashes")))
        # of multiprocessing; both live as long as this process
        set_forkserver_preload(["torch"])
        resource_tracker.ensure_running()
        forkserver.ensure_running()
        assert os.path.samefile(tempfile.gettempdir(), directory)
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_engines(request: pytest.FixtureRequest) -> Iterator[None]:
    """Engines of this process save the seconds of their start; `tests.forked_engines` says how."""
    modules = {item.module for item in request.session.items if isinstance(item, pytest.Function)}
    with engines_are_forked() if any(map(makes_engines, modules)) else nullcontext():
        yield


@pytest.fixture(scope="module", autouse=True)
def module_leaves_nothing(own_temporary_directory: None, forked_engines: None) -> Iterator[None]:
    """What a module's fixtures start ends with the module: an engine lives no longer than that."""
    before = traces()
    yield
    assert_nothing_left(before)


@pytest.fixture(autouse=True)
def nothing_left(module_leaves_nothing: None) -> Iterator[Callable[[], None]]:
    """Checks that a test leaves nothing behind; a test may call it earlier too.

    Fixtures of wider scope are made before it, so an engine that a module shares is no leak.
    """
    before = traces()
    yield lambda: assert_nothing_left(before)
    assert_nothing_left(before)


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """Here and in child processes, also where a shell has started the tests to ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
