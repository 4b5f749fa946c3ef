"""Options: the fields of a settings dataclass as text on a command line or in the environment.

A dataclass states name, type, default and help of each setting. Here they become a flag, an
environment variable and a row of docs/settings.md.
"""

from argparse import (
    SUPPRESS,
    Action,
    ArgumentParser,
    ArgumentTypeError,
    BooleanOptionalAction,
    Namespace,
)
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType, NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from tpllm.fields.docs import field_docs

PREFIX = "TPLLM_"
BOOLS = dict.fromkeys(("1", "true", "yes", "on"), True)
BOOLS |= dict.fromkeys(("0", "false", "no", "off"), False)
_POSITIONAL = " (positional)"  # ends the destination of a setting that came without its flag


class WrongTextError(ArgumentTypeError, ValueError):
    """A text that is no value of a setting. argparse shows the message of this error as it is."""


class Kind(NamedTuple):
    """How one item of a type is written: for the table, for the help, and for an error."""

    words: str
    metavar: str
    wrong: str


KINDS = {
    bool: Kind("true or false", "", "neither true nor false"),
    int: Kind("whole number", "N", "not a whole number"),
    float: Kind("number", "X", "not a number"),
    str: Kind("text", "TEXT", ""),
    dict: Kind("numbers by token id", "ID=X", "not of the form ID=NUMBER"),
}


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: the field's
        kind: of one item; dict stands for `id=number` pairs
        is_list: whether it takes several items
        can_be_none: whether None, written "none", is a value
        choices: the only values, if the type names them
        default: the value if none is given
        help: the documentation of the field, on one line
    """

    name: str
    kind: type
    is_list: bool
    can_be_none: bool
    choices: tuple[str, ...]
    default: object
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def default_text(self) -> str:
        """The default as a user would type it."""
        if self.default is None or self.default == ():
            return "none"
        return str(self.default).lower() if self.kind is bool else str(self.default)

    @property
    def type_text(self) -> str:
        """The type in words for people."""
        words = " or ".join(self.choices) or KINDS[self.kind].words
        return words + ("s" if self.is_list else "") + (" or none" if self.can_be_none else "")

    @property
    def metavar(self) -> str:
        return "{" + ",".join(self.choices) + "}" if self.choices else KINDS[self.kind].metavar

    def parse(self, text: str) -> Any:
        """Return the value that `text` stands for. Commas separate several items.

        Raises:
            WrongTextError: the text is not of the setting's type.
        """
        if self.can_be_none and text.lower() == "none":
            return None
        if self.kind is dict:
            return dict(_parse_pair(item) for item in text.split(","))
        if self.is_list:
            return [self._parse_item(item.strip()) for item in text.split(",")]
        return self._parse_item(text)

    def parse_flag(self, text: str) -> Any:
        """As `parse`, for one use of a flag: in a list of texts, each may contain commas."""
        return [text] if self.is_list and self.kind is str else self.parse(text)

    def _parse_item(self, text: str) -> object:
        if self.choices and text not in self.choices:
            raise WrongTextError(f"{text!r} is not one of {', '.join(map(repr, self.choices))}")
        return _parse(text, self.kind, KINDS[self.kind].wrong)


def options_of(settings: type, leave_out: Collection[str] = ()) -> list[Option]:
    """Return the options of a settings dataclass, in the order of its fields.

    Raises:
        TypeError: the type of a field has no form that a user could type.
    """
    hints = get_type_hints(settings)
    docs = field_docs(settings)
    return [
        _option(field.name, hints[field.name], field.default, docs.get(field.name, ""))
        for field in fields(settings)
        if field.name not in leave_out
    ]


def _option(name: str, hint: Any, default: object, help: str) -> Option:
    types = (hint,) if get_origin(hint) in (None, Literal) else get_args(hint)
    origins = {get_origin(each) or each: each for each in types}
    several = origins.get(list)
    [item] = get_args(several) if several else [None]
    kind = next((each for each in KINDS if each in (item, *origins)), None)
    if Literal in origins:
        kind = str
    if kind is None:
        raise TypeError(f"{name}: {hint} has no form on a command line")
    choices = get_args(origins.get(Literal))
    return Option(name, item or kind, bool(several), NoneType in origins, choices, default, help)


def add_flags(
    parser: ArgumentParser,
    settings: type,
    title: str,
    leave_out: Collection[str] = (),
    defaults: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Give `parser` a group of flags for these settings; `given_flags` reads them.

    `defaults` are the defaults of one command, which its help shows instead of the class's.
    """
    group = parser.add_argument_group(title)
    for option in options_of(settings, leave_out):
        option = replace(option, default=defaults.get(option.name, option.default))
        words = option.help[:1].upper() + option.help[1:]
        how: dict[str, Any] = {"action": BooleanOptionalAction}
        if option.kind is not bool:
            how = {"action": _Collect, "type": option.parse_flag, "metavar": option.metavar}
        group.add_argument(
            option.flag,
            dest=_destination(settings, option.name),
            default=SUPPRESS,
            help=f"{words} (default: {option.default_text})".replace("%", "%%"),
            **how,
        )


def add_positional(parser: ArgumentParser, settings: type, name: str) -> None:
    """Let this setting come without its flag as well, as an optional positional argument."""
    parser.add_argument(
        _destination(settings, name) + _POSITIONAL,
        nargs="?",
        default=SUPPRESS,
        metavar=name.upper(),
        help=f"the same as --{name}",
    )


def given_flags(args: Namespace, settings: type) -> dict[str, object]:
    """Return the values of these settings that the command line contains.

    Raises:
        ValueError: one is given both with its flag and without.
    """
    prefix = _destination(settings, "")
    given: dict[str, object] = {}
    for destination, value in vars(args).items():
        if destination.startswith(prefix):
            name = destination.removeprefix(prefix).removesuffix(_POSITIONAL)
            if name in given:
                raise ValueError(f"{name} is given twice: {given[name]!r} and {value!r}")
            given[name] = value
    return given


class _Collect(Action):
    """Store a value; join the items of a flag that is repeated."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest, None)
        if before and isinstance(values, dict):
            values = before | values
        elif before and isinstance(values, list):
            values = before + values
        setattr(namespace, self.dest, values)


def _destination(settings: type, name: str) -> str:
    """Return a flag's key in the namespace: two classes may have fields of one name."""
    return f"{settings.__name__}.{name}"


def _parse(text: str, kind: type, wrong: str) -> Any:
    try:
        return BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise WrongTextError(f"{text!r} is {wrong}") from None


def _parse_pair(text: str) -> tuple[int, float]:
    key, equals, value = text.partition("=")
    if not equals:
        raise WrongTextError(f"{text!r} is {KINDS[dict].wrong}")
    return _parse(key, int, "not a token id"), _parse(value, float, KINDS[float].wrong)
