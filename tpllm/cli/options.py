"""Options: the fields of a settings dataclass as words that a person types.

Name, type, default and help of a setting stand in its dataclass alone. Here they become a flag, an
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
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

PREFIX = "TPLLM_"
TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")
_WORD = " (word)"  # ends the destination of a setting that came without its flag


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: the field's
        kind: of one item: bool, int, float, str, or dict for `id=number` pairs
        is_list: whether it takes several items
        can_be_none: whether None, typed "none", is a value
        choices: the only values, where the type says so
        default: what it is unless given
        help: the field's entry in the docstring of its class, on one line
    """

    name: str
    kind: type
    is_list: bool
    can_be_none: bool
    choices: tuple[str, ...] | None
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
        """The default as one would type it."""
        if self.default is None or self.default == ():
            return "none"
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, tuple):
            return ",".join(map(str, self.default))
        return str(self.default)

    @property
    def type_text(self) -> str:
        """The type in words for people."""
        words = {
            bool: "true or false",
            int: "whole number",
            float: "number",
            str: "text",
            dict: "numbers by token id",
        }[self.kind]
        if self.choices is not None:
            words = " or ".join(self.choices)
        return words + ("s" if self.is_list else "") + (" or none" if self.can_be_none else "")

    def parse(self, text: str) -> object:
        """The value that `text` stands for; several items are parted by commas.

        Raises:
            ValueError: it stands for none; the message says what was expected.
        """
        if self.can_be_none and text.lower() == "none":
            return None
        if self.kind is dict:
            return dict(_parse_pair(item) for item in text.split(","))
        if self.is_list:
            return [self.parse_item(item.strip()) for item in text.split(",")]
        return self.parse_item(text)

    def parse_item(self, text: str) -> object:
        """As `parse`, for a single item."""
        if self.kind is bool:
            return _parse_bool(text)
        if self.kind is int:
            return _parse_number(text, int, "a whole number")
        if self.kind is float:
            return _parse_number(text, float, "a number")
        if self.choices is not None and text not in self.choices:
            raise ValueError(f"{text!r} is not one of {', '.join(map(repr, self.choices))}")
        return text


def options_of(settings: type, leave_out: Collection[str] = ()) -> list[Option]:
    """The options of a settings dataclass, in the order of its fields.

    Raises:
        TypeError: the type of a field has no form that one could type.
    """
    hints = get_type_hints(settings)
    helps = field_helps(settings)
    return [
        _option(field.name, hints[field.name], field.default, helps.get(field.name, ""))
        for field in fields(settings)
        if field.init and field.name not in leave_out
    ]


def field_helps(settings: type) -> dict[str, str]:
    """What the `Attributes:` of a class's docstring say of each field, on one line each."""
    _, _, listing = (settings.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in listing.splitlines():
        if line.startswith(" " * 12) and name:
            found[name] += " " + line.strip()
        elif line.startswith(" " * 8):
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif line.strip():
            break  # the next section
    return found


def add_flags(
    parser: ArgumentParser,
    settings: type,
    title: str,
    leave_out: Collection[str] = (),
    defaults: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Give `parser` a group of flags for these settings; `given_flags` reads them.

    `defaults` are a command's own, which the help shows instead of the class's.
    """
    group = parser.add_argument_group(title)
    for option in options_of(settings, leave_out):
        option = replace(option, default=defaults.get(option.name, option.default))
        words = option.help[:1].upper() + option.help[1:]
        common: dict[str, Any] = {
            "dest": _destination(settings, option.name),
            "default": SUPPRESS,
            "help": f"{words} (default: {option.default_text})".replace("%", "%%"),
        }
        if option.kind is bool:
            group.add_argument(option.flag, action=BooleanOptionalAction, **common)
        elif option.is_list or option.kind is dict:
            common |= {"action": _Collect, "type": _parser_of_items(option)}
            group.add_argument(option.flag, metavar=_metavar(option), **common)
        else:
            kind = _as_argument(option.parse)
            group.add_argument(option.flag, type=kind, metavar=_metavar(option), **common)


def add_positional(parser: ArgumentParser, settings: type, name: str) -> None:
    """Let this setting come without its flag as well, as an optional word of the command line."""
    [option] = [option for option in options_of(settings) if option.name == name]
    parser.add_argument(
        _destination(settings, name) + _WORD,
        nargs="?",
        default=SUPPRESS,
        metavar=name.upper(),
        help=f"the same as {option.flag}",
    )


def given_flags(args: Namespace, settings: type) -> dict[str, object]:
    """Those of these settings that stand on the command line.

    Raises:
        ValueError: one is there as a word and with its flag.
    """
    prefix = _destination(settings, "")
    given: dict[str, object] = {}
    for destination, value in vars(args).items():
        if destination.startswith(prefix):
            name = destination.removeprefix(prefix).removesuffix(_WORD)
            if name in given:
                raise ValueError(f"{name} is given twice: {given[name]!r} and {value!r}")
            given[name] = value
    return given


class _Collect(Action):
    """A flag that may be repeated: its items come together."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest, None)
        if isinstance(values, dict):
            values = {**(before or {}), **values}
        elif values is not None:
            values = [*(before or []), *values]
        setattr(namespace, self.dest, values)


def _option(name: str, hint: Any, default: object, help: str) -> Option:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    can_be_none = NoneType in parts
    lists = [part for part in parts if get_origin(part) in (tuple, list)]
    plain = [part for part in parts if part in (bool, int, float, str)]
    choices = None
    if lists:
        kind: type = get_args(lists[0])[0]
    elif any(get_origin(part) is dict for part in parts):
        kind = dict
    elif get_origin(hint) is Literal:
        kind, choices = str, get_args(hint)
    elif plain:
        kind = plain[0]
    else:
        raise TypeError(f"{name}: {hint} has no form on a command line")
    if default is MISSING:
        default = None
    return Option(name, kind, bool(lists), can_be_none, choices, default, help)


def _destination(settings: type, name: str) -> str:
    """Where a flag goes in the namespace: two classes may have fields of one name."""
    return f"{settings.__name__}.{name}"


def _metavar(option: Option) -> str:
    if option.choices is not None:
        return "{" + ",".join(option.choices) + "}"
    names: dict[type, str] = {int: "N", float: "X", str: "TEXT", dict: "ID=X"}
    return names[option.kind]


def _as_argument(parse: Callable[[str], object]) -> Callable[[str], object]:
    """argparse shows the text of this error alone, and replaces that of a ValueError."""

    def parse_argument(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None

    return parse_argument


def _parser_of_items(option: Option) -> Callable[[str], object]:
    """One use of a repeated flag. A text may hold commas; numbers are parted by them."""
    if option.kind is str:
        return _as_argument(lambda text: [option.parse_item(text)])
    return _as_argument(option.parse)


def _parse_bool(text: str) -> bool:
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def _parse_number(text: str, kind: type[int] | type[float], what: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {what}") from None


def _parse_pair(text: str) -> tuple[int, float]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not of the form ID=NUMBER")
    return int(_parse_number(key, int, "a token id")), _parse_number(value, float, "a number")
