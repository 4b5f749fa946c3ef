import os
from pathlib import Path

import pytest


@pytest.fixture
def stub_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the module `stub_worker` be found: by our workers, by programs, and by their workers."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
