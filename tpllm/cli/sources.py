"""Sources: settings from flags, the environment and a file, with the origin of each value."""

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

# The environment and a file may hold the settings of every command.
SETTINGS_CLASSES: tuple[type, ...] = (Settings, ServerSettings)
CONFIG_VARIABLE = PREFIX + "CONFIG"


@dataclass(frozen=True)
class Given:
    """Settings that a user gave, by the names of their fields.

    Attributes:
        values: keywords for a settings class; settings that were not given are absent
        origins: the flag, variable or file of each value
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Add the origins of the settings that an error mentions as a note to the error."""
        try:
            yield
        except (ValueError, OSError) as error:
            notes = [
                f"{name} is from {origin}"
                for name, origin in self.origins.items()
                if re.search(rf"\b{name}\b", str(error))
            ]
            if notes:
                error.add_note(f"({'; '.join(notes)})")
            raise


def collect(
    settings: type,
    flags: Mapping[str, object],
    config: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Given:
    """Return the given settings of one class: flags override the environment, that the file.

    Args:
        flags: the values on the command line, parsed
        config: a YAML file; None for the file that TPLLM_CONFIG names, if any

    Raises:
        ValueError: the file is not valid.
        UnknownSettingError: the environment or the file has an unknown setting.
        FileNotFoundError: there is no such file.
    """
    known = [CONFIG_VARIABLE, crash_report.FOLDER_VARIABLE]
    known += [PREFIX + name.upper() for name in _known_names()]
    ours = [name for name in environment if name.startswith(PREFIX)]
    refuse_unknown_settings("the environment", ours, known)
    path = config if config is not None else environment.get(CONFIG_VARIABLE)
    from_file = {} if path is None else read_config(Path(path).expanduser())
    given = Given()
    for option in options_of(settings):
        if option.name in flags:
            value, origin = flags[option.name], option.flag
        elif option.variable in environment:
            value, origin = option.parse(environment[option.variable]), option.variable
        elif option.name in from_file:
            value, origin = from_file[option.name], str(path)
        else:
            continue
        given.values[option.name] = value
        given.origins[option.name] = origin
    return given


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file by their names; `max-num-seqs` is a name, too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, not a mapping, or names a setting twice.
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
        if names.count(name) > 1:  # PyYAML would take the last one silently
            raise ValueError(f"{path} gives {name} more than once")
    refuse_unknown_settings(str(path), names, _known_names())
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _known_names() -> list[str]:
    return [option.name for settings in SETTINGS_CLASSES for option in options_of(settings)]
