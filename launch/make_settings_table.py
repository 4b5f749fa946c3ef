"""Writes docs/settings.md from the settings classes: names, types, defaults and words of each.

A test compares the file with what this would write; run it after a change to a setting.

    python launch/make_settings_table.py
"""

from pathlib import Path

from tpllm.cli.options import Option, options_of
from tpllm.cli.sampling import UNTYPED
from tpllm.cli.sources import SETTINGS_CLASSES
from tpllm.sampling_params import SamplingParams

TARGET = Path(__file__).resolve().parents[1] / "docs" / "settings.md"

INTRODUCTION = """\
# Settings

<!-- written by launch/make_settings_table.py; change the docstrings of the classes instead -->

Every setting has one name: the keyword in Python, the key in a YAML file, `--the-name` as a flag
and `TPLLM_THE_NAME` in the environment. A flag goes before the environment, the environment before
the file ([command line](cli.md)).
"""
TITLES = {
    "Settings": (
        "Engine",
        "Keywords of `LLM` and `AsyncLLM`; flags of the commands with an engine.",
    ),
    "ServerSettings": ("Server", "Keywords of `tpllm.server`; flags of `tpllm serve`."),
}
SAMPLING = """\

## Sampling

Keywords of `SamplingParams`; flags of `tpllm generate`, most of them of `tpllm chat`, which have
defaults of their own for temperature and max_tokens. A request's own, so neither in the environment
nor in a file.
"""


def settings_page() -> str:
    """The whole file."""
    parts = [INTRODUCTION]
    for settings in SETTINGS_CLASSES:
        title, words = TITLES[settings.__name__]
        parts.append(f"\n## {title}\n\n{words}\n\n{table(options_of(settings))}")
    parts.append(SAMPLING + "\n" + table(options_of(SamplingParams, leave_out=UNTYPED)))
    return "".join(parts)


def table(options: list[Option]) -> str:
    """One row for each setting."""
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for option in options:
        words = option.help.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        cells = [f"`{option.name}`", option.type_text, f"`{option.default_text}`", words]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    TARGET.write_text(settings_page())
