import os
from pathlib import Path

import pytest


@pytest.fixture
def stub_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the module `stub_worker` importable for workers, for programs and for their workers."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
