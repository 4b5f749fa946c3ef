"""Who imports whom, read from the source; and what `import tpllm` loads, seen from outside."""

import re
import subprocess
import sys

import pytest

import tpllm
from tests.structure import (
    FILES,
    PACKAGE,
    folder_imports,
    folder_of,
    imports_of,
    repeated_names,
    root_modules,
    two_way_imports,
)
from tpllm.config.engine_config import EngineConfig

# Plain data and checks, which the parts above the channel may all use.
DATA = {"checks", "errors", "fields", "outputs", "sampling_params", "structured_outputs"}
# What each folder and each module at the root may import. The order is the direction: nothing
# imports what stands further down.
MAY_IMPORT = {
    "outputs": set(),
    "checks": set(),
    "errors": {"outputs"},
    "fields": {"checks"},
    "vllm_keywords": {"checks", "errors"},
    "json_schema": {"checks"},
    "structured_outputs": {"checks", "json_schema", "vllm_keywords"},
    "sampling_params": {"checks", "fields", "structured_outputs", "vllm_keywords"},
    "channel": set(),
    "architectures": {"checks"},
    "config": DATA | {"architectures", "channel", "vllm_keywords"},
    "parallel": set(),
    "layers": {"architectures", "parallel"},
    "sampling": {"channel", "parallel"},
    "models": {"architectures", "config", "layers", "parallel"},
    "worker": DATA
    | {"architectures", "channel", "config", "layers", "models", "parallel", "sampling"},
    "engine": DATA | {"channel", "config", "json_schema"},
    "text": DATA | {"config", "engine", "vllm_keywords"},
    "supervision": DATA | {"channel", "config", "engine"},
    "offline": DATA | {"engine", "supervision", "text", "vllm_keywords"},
    "llm": DATA | {"config", "engine", "offline", "supervision", "text", "vllm_keywords"},
    "async_llm": DATA | {"config", "engine", "supervision", "text", "vllm_keywords"},
    "tpllm": DATA | {"async_llm", "llm", "offline"},
    "server": DATA | {"async_llm", "config", "text", "vllm_keywords"},
    # of layers and supervision only where their tables and crash reports are kept
    "cli": DATA | {"config", "layers", "llm", "server", "supervision", "text"},
    "__main__": {"cli"},
}
WITHOUT_TORCH = {"torch", "triton", "transformers", "flash_attn"}
MAY_USE_TORCH = {"parallel", "layers", "sampling", "models", "worker"}


def test_every_folder_and_root_module_has_a_place():
    assert {folder_of(module) for module in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_downward(part):
    assert folder_imports()[part] <= MAY_IMPORT[part]
    above = list(MAY_IMPORT)[: list(MAY_IMPORT).index(part)]
    assert MAY_IMPORT[part] <= set(above)


def test_no_two_folders_import_each_other():
    assert two_way_imports() == []


def test_the_root_is_small_and_no_name_stands_in_three_places():
    assert len(root_modules()) <= 10
    assert repeated_names() == {}


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


def test_only_what_runs_an_engine_reaches_its_coordinator():
    runs_it = {PACKAGE / "llm.py", *(PACKAGE / "offline").glob("*.py")}
    runs_it |= {*(PACKAGE / "supervision").glob("*.py")}
    for file in {*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "launch").glob("*.py")} - runs_it:
        assert not re.search(r"\w\._?coordinator\b(?! import)", file.read_text()), file
    for file in runs_it:  # `LLM.coordinator` is for programs of others
        assert not re.search(r"\w\.coordinator\b(?! import)", file.read_text()), file


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


def test_a_worker_starts_without_the_library_that_checks_settings():
    code = (
        "from tpllm.config.engine_config import EngineConfig; import sys\n"
        "print(EngineConfig.from_json(sys.argv[1]).seed, 'pydantic' in sys.modules)"
    )
    config = EngineConfig.resolve(seed=5).to_json()
    run = subprocess.run(
        [sys.executable, "-c", code, config], capture_output=True, text=True, check=True
    )
    assert run.stdout == "5 False\n"


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
