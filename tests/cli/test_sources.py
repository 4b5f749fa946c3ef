"""Where a setting comes from: flag before environment before file before default."""

from pathlib import Path
from typing import Any

import pytest

from tpllm.cli.options import options_of
from tpllm.cli.sources import SETTINGS_CLASSES, collect, read_config
from tpllm.config.settings import Settings
from tpllm.errors import UnknownSettingError
from tpllm.server import ServerSettings


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_a_flag_goes_before_the_environment_and_that_before_the_file(tmp_path):
    path = write(tmp_path, "max-num-seqs: 1\ndtype: float16\nmodel: m\nenforce_eager: true\n")
    environment = {"TPLLM_MAX_NUM_SEQS": "2", "TPLLM_DTYPE": "float32", "HOME": "/"}
    given = collect(Settings, {"max_num_seqs": 3}, str(path), environment)
    assert given.values == {
        "max_num_seqs": 3,
        "dtype": "float32",
        "model": "m",
        "enforce_eager": True,
    }
    assert given.origins == {
        "max_num_seqs": "--max-num-seqs",
        "dtype": "TPLLM_DTYPE",
        "model": str(path),
        "enforce_eager": str(path),
    }
    assert collect(Settings, {}, None, {}).values == {}


def test_a_variable_of_the_library_is_no_setting():
    assert collect(Settings, {}, None, {"TPLLM_CRASH_DIR": "/somewhere"}).values == {}


def test_the_environment_can_name_the_file_and_a_flag_another(tmp_path):
    path = write(tmp_path, "seed: 5")
    environment = {"TPLLM_CONFIG": str(path)}
    assert collect(Settings, {}, None, environment).values == {"seed": 5}
    other = tmp_path / "empty.yaml"
    other.write_text("# nothing\n")
    assert collect(Settings, {}, str(other), environment).values == {}


@pytest.mark.parametrize(
    "flags, environment, text, note",
    [
        ({"max_num_seqs": 0}, {}, "", "(max_num_seqs is from --max-num-seqs)"),
        ({}, {"TPLLM_MAX_NUM_SEQS": "0"}, "", "(max_num_seqs is from TPLLM_MAX_NUM_SEQS)"),
        ({}, {"TPLLM_MAX_NUM_SEQS": "x"}, "", "(max_num_seqs is from TPLLM_MAX_NUM_SEQS)"),
        ({}, {"TPLLM_ENFORCE_EAGER": ""}, "", "(enforce_eager is from TPLLM_ENFORCE_EAGER)"),
        ({}, {}, "max_num_seqs: 0", "(max_num_seqs is from settings.yaml)"),
        ({}, {}, "max_num_seqs: many", "(max_num_seqs is from settings.yaml)"),
        (
            {"max_num_seqs": 9},
            {"TPLLM_MAX_NUM_BATCHED_TOKENS": "8"},
            "seed: 1",
            "(max_num_seqs is from --max-num-seqs; "
            "max_num_batched_tokens is from TPLLM_MAX_NUM_BATCHED_TOKENS)",
        ),
    ],
)
def test_an_error_names_where_the_wrong_value_came_from(
    tmp_path, monkeypatch, flags: dict[str, Any], environment, text, note
):
    write(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    given = collect(Settings, flags, "settings.yaml", environment)
    with pytest.raises(ValueError) as caught, given.named_in_errors():
        Settings(**given.values)
    assert caught.value.__notes__ == [note]


def test_an_error_about_something_else_blames_no_setting():
    given = collect(Settings, {"max_num_seqs": 5}, None, {})
    with pytest.raises(ValueError) as caught, given.named_in_errors():
        raise ValueError("the prompt is empty")
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"TPLLM_MAX_SEQS": "1"}, "no setting 'TPLLM_MAX_SEQS'; did you mean 'TPLLM_MAX_NUM_SEQS'"),
        ({"TPLLM_CONFIG": "/nowhere.yaml"}, "configuration file /nowhere.yaml does not exist"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(environment, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        collect(Settings, {}, None, environment)


@pytest.mark.parametrize(
    "text, message",
    [
        ("max_seqs: 1", "has no setting 'max_seqs'; did you mean 'max_num_seqs'"),
        ("5: 1", "has no setting '5'"),
        ("- seed\n- 5", "must hold lines of the form `setting: value`"),
        ("just words", "must hold lines of the form"),
        ("seed: 1\nseed: 2", "gives seed more than once"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "gives max_num_seqs more than once"),
        ("seed: [1", "is not valid YAML: .* line 1"),
        ("seed: !!python/object:os.system {}", "is not valid YAML"),
        ("seed: \x00", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(path)
    assert "settings.yaml" in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"seed: \xff\xfe")
    with pytest.raises(ValueError, match="settings.yaml is not valid YAML"):
        read_config(path)
    with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
        read_config(tmp_path)


def test_a_name_is_a_setting_of_one_class():
    names = [option.name for settings in SETTINGS_CLASSES for option in options_of(settings)]
    assert len(names) == len(set(names))
    assert "config" not in names  # TPLLM_CONFIG names the file


def test_settings_of_other_commands_may_stand_beside(tmp_path):
    path = write(tmp_path, "port: 1\nseed: 2\n")
    assert collect(Settings, {}, str(path), {"TPLLM_HOST": "::1"}).values == {"seed": 2}
    assert collect(ServerSettings, {}, str(path), {"TPLLM_HOST": "::1"}).values == {
        "port": 1,
        "host": "::1",
    }


def test_an_unknown_setting_is_the_error_that_llm_raises_too(tmp_path):
    with pytest.raises(UnknownSettingError):
        read_config(write(tmp_path, "tp: 2"))
