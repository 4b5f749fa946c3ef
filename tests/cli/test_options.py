"""Flags, environment variables and help, made of a settings class."""

from argparse import ArgumentParser
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import pytest
from annotated_types import Interval

from tpllm.cli.options import (
    Option,
    add_flags,
    given_flags,
    options_of,
)
from tpllm.config.settings import Settings
from tpllm.fields.docs import field_docs
from tpllm.fields.validation import check_fields
from tpllm.sampling_params import SamplingParams
from tpllm.server import ServerSettings


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """One field of each kind.

    Raises:
        ValueError: not part of the help.
    """

    count: Annotated[int | None, Interval(ge=0)] = None
    """how many,
    on two lines
    """
    share: float = 0.5
    """50% of it"""
    name: str = "x"
    """a text"""
    switch: bool = True
    """whether so"""
    numbers: tuple[int, ...] | list[int] | None = None
    """several numbers"""
    texts: str | tuple[str, ...] | list[str] = ()
    """one text, or several"""
    pairs: dict[int, float] | None = None
    """numbers by id"""
    mode: Literal["a", "b"] = "a"
    """one of two"""

    def __post_init__(self) -> None:
        check_fields(self)


OPTIONS = {option.name: option for option in options_of(Kinds)}


def parsed(*words: str, settings: type = Kinds) -> dict[str, object]:
    parser = ArgumentParser(exit_on_error=False)
    add_flags(parser, settings, "settings")
    return given_flags(parser.parse_args(words), settings)


@pytest.mark.parametrize(
    "words, value",
    [
        ("--count 5", 5),
        ("--count none", None),
        ("--share 1e-3", 0.001),
        ("--name none", "none"),
        ("--switch", True),
        ("--no-switch", False),
        ("--numbers 1,2 --numbers 3", [1, 2, 3]),
        ("--numbers none", None),
        ("--texts a,b --texts c", ["a,b", "c"]),
        ("--pairs 5=1.5,6=-2 --pairs 7=0", {5: 1.5, 6: -2.0, 7: 0.0}),
        ("--mode b", "b"),
    ],
)
def test_a_flag_gives_a_value_of_the_type_of_its_field(words, value):
    assert parsed(*words.split()) == {words.split()[0][2:].replace("no-", ""): value}


def test_a_text_that_may_be_none_is_none_where_that_is_typed():
    assert parsed("--tokenizer", "None", settings=Settings) == {"tokenizer": None}


def test_what_is_not_given_is_absent():
    assert parsed() == {}


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("switch", "Yes", True),
        ("switch", "0", False),
        ("numbers", "1, 2", [1, 2]),
        ("texts", "a, b", ["a", "b"]),
        ("pairs", "1=2,3=4", {1: 2.0, 3: 4.0}),
    ],
)
def test_an_environment_variable_parts_items_by_commas(name, text, value):
    assert OPTIONS[name].parse(text) == value


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("count", "5.0", "count='5.0' must be a whole number"),
        ("count", "", "count='' must be a whole number"),
        ("share", "half", "share='half' must be a number"),
        ("share", "none", "share='none' must be a number"),
        ("switch", "maybe", "switch='maybe' must be True or False"),
        ("numbers", "1,x", "numbers[1]='x' must be a whole number"),
        ("pairs", "5", "pairs[5]='' must be a number"),
        ("pairs", "a=5", "pairs key='a' must be a whole number"),
        ("mode", "c", "mode='c' must be one of 'a', 'b'"),
    ],
)
def test_a_text_of_the_wrong_type_is_refused_by_the_settings(name, text, message):
    with pytest.raises(ValueError) as caught:
        Kinds(**{name: OPTIONS[name].parse(text)})
    assert str(caught.value) == message


def test_help_is_the_docstring_s_words_with_the_default(capsys):
    parser = ArgumentParser()
    add_flags(parser, Kinds, "settings", leave_out=["mode"], defaults={"count": 7})
    parser.print_help()
    shown = " ".join(capsys.readouterr().out.split())
    assert "--count N How many, on two lines (default: 7)" in shown
    assert "--share X 50% of it (default: 0.5)" in shown
    assert "--switch, --no-switch Whether so (default: true)" in shown
    assert "--texts TEXT One text, or several (default: none)" in shown
    assert "--mode" not in shown and "ValueError" not in shown


def test_two_classes_may_have_a_field_of_one_name():
    parser = ArgumentParser()
    add_flags(parser, Settings, "engine", leave_out=["seed"])
    add_flags(parser, SamplingParams, "sampling")
    args = parser.parse_args(["--seed", "3", "--dtype", "float32"])
    assert given_flags(args, SamplingParams) == {"seed": 3}
    assert given_flags(args, Settings) == {"dtype": "float32"}


def test_only_what_nobody_could_type_is_no_option():
    for settings in (Settings, ServerSettings, SamplingParams):
        left_out = {field.name for field in fields(settings)}
        left_out -= {option.name for option in options_of(settings)}
        assert left_out <= {"output_kind", "structured_outputs"}


@pytest.mark.parametrize("settings", [Settings, SamplingParams, ServerSettings])
def test_every_field_has_help_and_a_default_that_is_valid_when_typed(settings):
    options = options_of(settings)
    assert set(field_docs(settings)) == {field.name for field in fields(settings)}
    for option in options:
        assert option.help and "\n" not in option.help
        assert settings(**typed_default(option)) == settings()


def typed_default(option: Option) -> dict[str, object]:
    """The default as typed by somebody who has read of it in the help."""
    if option.default_text == "none":
        return {}
    return {option.name: option.parse(option.default_text)}


def test_a_dict_of_any_fields_is_written_as_json() -> None:
    [option] = [each for each in options_of(Settings) if each.name == "hf_overrides"]
    assert option.parse('{"rope_scaling": {"factor": 4.0}}') == {"rope_scaling": {"factor": 4.0}}
    assert option.parse("none") is None
    assert option.parse("{") == "{"  # which Settings refuses
