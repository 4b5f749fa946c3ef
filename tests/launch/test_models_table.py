import importlib
from pathlib import Path

REPO = Path(__file__).parents[2]


def test_the_table_of_models_is_current(monkeypatch) -> None:
    monkeypatch.syspath_prepend(REPO / "launch")
    table = importlib.import_module("make_models_table")
    assert table.TARGET.read_text() == table.models_page(), "run launch/make_models_table.py"
