import os

import pytest

import tpllm
from tests.cli.stand_in import StandIn


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """The class that stands in for LLM, in this test alone."""
    fresh = type("LLM", (StandIn,), {"made": {}})
    monkeypatch.setattr(tpllm, "LLM", fresh, raising=False)
    return fresh


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests' own environment sets is not for the programs they run."""
    for name in [name for name in os.environ if name.startswith("TPLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
