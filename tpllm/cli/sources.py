"""Sources: settings from flags, the environment and a file, and where each of them came from."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tpllm.cli.options import PREFIX, options_of
from tpllm.config.settings import Settings
from tpllm.errors import refuse_unknown_settings
from tpllm.server import ServerSettings
from tpllm.supervision import crash_report

# Whatever command runs, the environment and a file may hold the settings of all of them.
SETTINGS_CLASSES: tuple[type, ...] = (Settings, ServerSettings)
CONFIG_VARIABLE = PREFIX + "CONFIG"


@dataclass(frozen=True)
class Given:
    """Settings that somebody gave, under the names of their fields.

    Attributes:
        values: what a settings class takes as keywords; those not given are absent
        origins: the flag, variable or file that each came from
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Errors raised inside get a note of where the settings they mention came from."""
        try:
            yield
        except (ValueError, OSError) as error:
            blamed = [
                f"{name} is from {origin}"
                for name, origin in self.origins.items()
                if re.search(rf"\b{name}\b", str(error))
            ]
            if blamed:
                error.add_note(f"({'; '.join(blamed)})")
            raise


def collect(
    settings: type,
    flags: Mapping[str, object],
    config: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Given:
    """The settings of one class: a flag goes before the environment, that before the file.

    Args:
        flags: what stands on the command line, parsed
        config: a YAML file; None for the one that TPLLM_CONFIG names, if any

    Raises:
        ValueError: a text is not of the setting's type, or the file is no such file.
        UnknownSettingError: the environment or the file has a setting that no command has.
        FileNotFoundError: there is no such file.
    """
    _refuse_unknown_variables(environment)
    path = config if config is not None else environment.get(CONFIG_VARIABLE)
    from_file = {} if path is None else read_config(Path(path).expanduser())
    given = Given()
    for option in options_of(settings):
        if option.name in flags:
            value, origin = flags[option.name], option.flag
        elif option.variable in environment:
            try:
                value, origin = option.parse(environment[option.variable]), option.variable
            except ValueError as error:
                raise ValueError(f"{option.variable}: {error}") from None
        elif option.name in from_file:
            value, origin = from_file[option.name], str(path)
        else:
            continue
        given.values[option.name] = value
        given.origins[option.name] = origin
    return given


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by the names of their fields; `max-num-seqs` is one, too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, no mapping of names to values, or names one twice.
        UnknownSettingError: no command has such a setting.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the configuration file {path} does not exist or is not a file")
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must hold lines of the form `setting: value`")
    names = [str(key.value).replace("-", "_") for key, _ in root.value]
    for name in names:
        if names.count(name) > 1:  # YAML itself would take the last in silence
            raise ValueError(f"{path} gives {name} more than once")
    refuse_unknown_settings(str(path), names, _known_names())
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _known_names() -> list[str]:
    return [option.name for settings in SETTINGS_CLASSES for option in options_of(settings)]


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    ours = [name for name in environment if name.startswith(PREFIX)]
    known = [PREFIX + name.upper() for name in _known_names()]
    refuse_unknown_settings(
        "the environment", ours, [*known, CONFIG_VARIABLE, crash_report.FOLDER_VARIABLE]
    )
