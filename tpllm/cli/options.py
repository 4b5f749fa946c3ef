"""Options: the fields of a settings dataclass as text on a command line or in the environment.

A dataclass states name, type, default and help of each setting. Here they become a flag, an
environment variable and a row of docs/settings.md.
"""

import json
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tpllm.fields.docs import field_docs

PREFIX = "TPLLM_"
BOOLS = dict.fromkeys(("1", "true", "yes", "on"), True)
BOOLS |= dict.fromkeys(("0", "false", "no", "off"), False)
# Kinds of items: the word for the table, and the metavar of the help.
KINDS = {
    bool: ("true or false", ""),
    int: ("whole number", "N"),
    float: ("number", "X"),
    str: ("text", "TEXT"),
    dict: ("numbers by token id", "ID=X"),
    object: ("JSON object", "JSON"),
}


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: the field's
        kind: of one item; dict stands for `id=number` pairs, object for a dict as JSON
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
        words = " or ".join(self.choices) or KINDS[self.kind][0]
        return words + ("s" if self.is_list else "") + (" or none" if self.can_be_none else "")

    @property
    def metavar(self) -> str:
        return "{" + ",".join(self.choices) + "}" if self.choices else KINDS[self.kind][1]

    def parse(self, text: str) -> Any:
        """Return the value that `text` stands for. Commas separate several items.

        What does not read as the setting's type stays text, which the settings class refuses.
        """
        if self.can_be_none and text.lower() == "none":
            return None
        if self.kind is object:
            with suppress(ValueError):
                return json.loads(text)
            return text
        if self.kind is dict:
            pairs = [item.partition("=") for item in text.split(",")]
            return {_parse(key, int): _parse(value, float) for key, _, value in pairs}
        if self.is_list:
            return [_parse(item.strip(), self.kind) for item in text.split(",")]
        return _parse(text, self.kind)

    def parse_flags(self, texts: list[str]) -> Any:
        """Return the value of a flag that is given one or several times.

        Items add up, and each of a list of texts may contain commas. Otherwise the last one counts.
        """
        if self.is_list and self.kind is str:
            return texts
        return self.parse(",".join(texts) if self.is_list or self.kind is dict else texts[-1])


def options_of(settings: type, leave_out: Collection[str] = ()) -> list[Option]:
    """Return the options of a settings dataclass, in the order of its fields.

    There are none for fields whose types nobody could type, such as a JSON schema.
    """
    hints = get_type_hints(settings)
    docs = field_docs(settings)
    options = [
        _option(field.name, hints[field.name], field.default, docs[field.name])
        for field in fields(settings)
        if field.name not in leave_out
    ]
    return [option for option in options if option is not None]


def _option(name: str, hint: Any, default: object, help: str) -> Option | None:
    types = (hint,) if get_origin(hint) in (None, Literal) else get_args(hint)
    by_origin = {get_origin(each) or each: each for each in types}
    choices = get_args(by_origin.get(Literal))
    items = get_args(by_origin.get(list))
    if dict[str, Any] in types:
        by_origin = {object if each is dict else each: hint for each, hint in by_origin.items()}
    found = [kind for kind in KINDS if kind in (items or by_origin)]
    if not found and not choices:
        return None
    kind = str if choices else found[0]
    return Option(name, kind, bool(items), NoneType in by_origin, choices, default, help)


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
        how: dict[str, Any] = {"action": "append", "metavar": option.metavar}
        if option.kind is bool:
            how = {"action": BooleanOptionalAction}
        group.add_argument(
            option.flag,
            dest=_destination(settings, option.name),
            default=SUPPRESS,
            help=f"{words} (default: {option.default_text})".replace("%", "%%"),
            **how,
        )


def given_flags(args: Namespace, settings: type) -> dict[str, Any]:
    """Return the values of these settings that the command line contains."""
    given: dict[str, Any] = {}
    for option in options_of(settings):
        value = getattr(args, _destination(settings, option.name), None)
        if value is not None:
            given[option.name] = value if option.kind is bool else option.parse_flags(value)
    return given


def _destination(settings: type, name: str) -> str:
    """Return a flag's key in the namespace: two classes may have fields of one name."""
    return f"{settings.__name__}.{name}"


def _parse(text: str, kind: type) -> object:
    try:
        return BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        return text
