import importlib
import sys
from pathlib import Path

import pytest

from launch import forked_workers
from tpllm.supervision import failure, launcher, processes

HERE = Path(__file__).parent


@pytest.fixture
def fault_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `fault_worker` importable, fork it, and report its end at once."""
    if "fault_worker" not in sys.modules:  # import it once rather than in every fork
        monkeypatch.syspath_prepend(HERE)
        importlib.import_module("fault_worker")
    monkeypatch.setattr(processes, "_start", forked_workers.start)
    monkeypatch.setattr(failure, "GRACE_S", 0.05)  # no test here has a second cause
    monkeypatch.setattr(launcher, "CLOSE_TIMEOUT_S", 0.3)
