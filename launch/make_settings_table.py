"""Write docs/settings.md from the settings classes: name, type, default and help of each setting.

A test compares the file with the output of this script; run it after a change to a setting.

    python launch/make_settings_table.py
"""

from pathlib import Path

from tpllm.cli.options import options_of
from tpllm.config.settings import Settings
from tpllm.sampling_params import SamplingParams
from tpllm.server import ServerSettings

TARGET = Path(__file__).resolve().parents[1] / "docs" / "settings.md"

INTRODUCTION = """\
# Settings

<!-- written by launch/make_settings_table.py; change the fields of the classes instead -->

Every setting has one name: the keyword in Python, the key in a YAML file, `--the-name` as a flag
and `TPLLM_THE_NAME` in the environment. A flag overrides the environment, the environment overrides
the file ([command line](cli.md)).
"""
SECTIONS = {
    Settings: (
        "Engine",
        "Keywords of `LLM` and `AsyncLLM`; flags of the commands with an engine.",
    ),
    ServerSettings: ("Server", "Keywords of `tpllm.server`; flags of `tpllm serve`."),
    SamplingParams: (
        "Sampling",
        """\
Keywords of `SamplingParams`; flags of `tpllm generate`, most of them of `tpllm chat`, which have
defaults of their own for temperature and max_tokens. They belong to a request, so neither the
environment nor a file can set them.""",
    ),
}


def settings_page() -> str:
    """Return the whole page."""
    sections = [
        f"\n## {title}\n\n{text}\n\n{table(settings)}"
        for settings, (title, text) in SECTIONS.items()
    ]
    return "".join([INTRODUCTION, *sections])


def table(settings: type) -> str:
    """Return a table with one row for each setting."""
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for option in options_of(settings):
        words = option.help.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        cells = [f"`{option.name}`", option.type_text, f"`{option.default_text}`", words]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    TARGET.write_text(settings_page())
