import importlib
from pathlib import Path

REPO = Path(__file__).parents[2]


def test_the_table_of_settings_is_current(monkeypatch) -> None:
    monkeypatch.syspath_prepend(REPO / "launch")
    table = importlib.import_module("make_settings_table")
    assert table.TARGET.read_text() == table.settings_page(), "run launch/make_settings_table.py"
