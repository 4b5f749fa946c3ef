"""docs/cli.md is complete; that its commands run is tested in tests/docs."""

from tests.docs.pages import blocks_of
from tests.scripts import ROOT
from tpllm.cli.sources import collect
from tpllm.config.settings import Settings

BLOCKS = blocks_of(ROOT / "docs" / "cli.md")
LINES = [line for block in BLOCKS if block.kind == "bash" for line in block.commands]
[YAML] = [block.code for block in BLOCKS if block.kind == "yaml"]


def test_the_page_has_every_command():
    for command in (
        "generate",
        "chat",
        "serve",
        "bench seed",
        "bench latency",
        "bench serve",
        "info",
    ):
        assert any(f"tpllm {command}" in line for line in LINES), command


def test_the_file_of_the_page_is_one(tmp_path):
    path = tmp_path / "engine.yaml"
    path.write_text(YAML)
    assert collect(Settings, {}, str(path), {}).values == {
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
    }
