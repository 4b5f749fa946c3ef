"""Who imports whom, read from the source; and what `import tpllm` loads, seen from outside."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tpllm
from tests.structure import PACKAGE, imports_of

# Plain data and checks, which any part may use except those that must run on their own.
PLAIN = {
    "checks",
    "config",
    "errors",
    "json_schema",
    "outputs",
    "sampling_params",
    "structured_outputs",
    "vllm_keywords",
}
MAY_IMPORT = {
    "parallel": set(),
    "layers": {"parallel"},
    "models": {"layers", "parallel", "config"},
    "channel": set(),
    "sampling": {"channel", "parallel"},
    "worker": PLAIN | {"models", "sampling", "layers", "parallel", "channel"},
    "server": PLAIN | {"async_llm", "text"},
    "engine": PLAIN | {"channel"},
}
WITHOUT_TORCH = {"torch", "triton", "transformers", "flash_attn"}
MAY_USE_TORCH = {"parallel", "layers", "sampling", "models", "worker"}


def files_of(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py"))


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_downward(part):
    assert files_of(part), f"tpllm/{part} has no files"
    used = {
        name.split(".")[1]
        for file in files_of(part)
        for name in imports_of(file)
        if name.startswith("tpllm.")
    }
    assert used - {part} <= MAY_IMPORT[part]


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_torch_stays_in_its_rooms(file):
    part = file.relative_to(PACKAGE).parts[0]
    if part not in MAY_USE_TORCH:
        roots = {name.split(".")[0] for name in imports_of(file, top_level_only=True)}
        assert not roots & WITHOUT_TORCH
    if part != "parallel":
        assert not any(name.startswith("torch.distributed") for name in imports_of(file))


def loaded_by(statement: str) -> set[str]:
    """Packages that a fresh Python has loaded after running `statement`."""
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_tpllm_loads_nothing_heavy():
    assert not loaded_by("import tpllm") & {*WITHOUT_TORCH, "numpy", "huggingface_hub"}


def test_the_configuration_needs_no_torch():
    statement = "from tpllm.config.engine_config import EngineConfig; EngineConfig.resolve()"
    assert not loaded_by(statement) & WITHOUT_TORCH


def test_the_servers_settings_need_none_of_its_packages():
    loaded = loaded_by("from tpllm.server import ServerSettings")
    assert not loaded & {*WITHOUT_TORCH, "fastapi", "uvicorn", "numpy"}


def test_every_public_name_resolves():
    for name in tpllm.__all__:
        if name != "LLM":  # has tests of its own
            assert getattr(tpllm, name) is not None
    assert set(tpllm.__all__) <= set(dir(tpllm))
    with pytest.raises(AttributeError, match="module 'tpllm' has no attribute 'nothing'"):
        _ = tpllm.nothing


def test_the_changelog_begins_with_this_version():
    changelog = (PACKAGE.parent / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == tpllm.__version__
