"""docs/coming-from-vllm.md lists what exists, and lists nothing that exists as missing."""

import re
from dataclasses import fields

import pytest

from tests.scripts import ROOT
from tpllm import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    CompletionOutput,
    Logprob,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from tpllm.config.settings import Settings
from tpllm.server.protocol import ChatCompletionRequest, CompletionRequest
from tpllm.vllm_keywords import CALLS, PROMPTS, SAMPLING, SETTINGS, STRUCTURED, Keywords

PAGE = (ROOT / "docs" / "coming-from-vllm.md").read_text()
SAME = PAGE.partition("## The same")[2].partition("## What differs")[0]
MISSING = dict(
    re.findall(r"^\| ([^|]+) \| (.+) \|$", PAGE.partition("## What is missing")[2], re.M)
)


def public(kind: type) -> set[str]:
    ours = [each for each in kind.__mro__ if each.__module__.startswith("tpllm.")]
    names = {name for each in ours for name in vars(each)} - {"config"}
    return {name for name in names if not name.startswith("_")}


def names_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def names_in(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


@pytest.mark.parametrize(
    "title, names",
    [
        ("SamplingParams", names_of(SamplingParams)),
        ("StructuredOutputsParams", names_of(StructuredOutputsParams)),
        ("BeamSearchParams", names_of(BeamSearchParams)),
        ("Settings", names_of(Settings)),
        (
            "Outputs",
            names_of(RequestOutput) | names_of(CompletionOutput) | set(Logprob._fields),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_the_same_is_listed_completely(title: str, names: set[str]) -> None:
    [paragraph] = [each for each in SAME.split("\n\n") if each.startswith(f"**{title}**")]
    kinds = {"RequestOutput", "CompletionOutput", "Logprob"}
    assert names_in(paragraph) - kinds == names


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_the_listed_methods_exist(kind: type) -> None:
    [paragraph] = [each for each in SAME.split("\n\n") if each.startswith(f"**{kind.__name__}**")]
    names = names_in(paragraph) - {"with"}
    assert names and names <= public(kind)


def test_nothing_that_exists_is_listed_as_missing() -> None:
    assert (
        names_in(MISSING["sampling"])
        and names_in(MISSING["settings"])
        and names_in(MISSING["`LLM`"])
    )
    assert not names_in(MISSING["sampling"]) & names_of(SamplingParams)
    assert not names_in(MISSING["settings"]) & names_of(Settings)
    assert not names_in(MISSING["`LLM`"]) & public(LLM)
    known = CompletionRequest.model_fields.keys() | ChatCompletionRequest.model_fields.keys()
    assert names_in(MISSING["server: fields"]) and not names_in(MISSING["server: fields"]) & known


def rows_of(table: Keywords) -> list[str]:
    """The rows of the page for a table of missing keywords."""
    rows = []
    for name, missing in table.items():
        accepted = ", ".join(f"`{value!r}`" for value in (None, *missing.ignored))
        rows.append(f"| `{name}` | {accepted} | {missing.instead} |")
    return rows


@pytest.mark.parametrize(
    "title, table",
    [
        ("`LLM` and `AsyncLLM`", SETTINGS),
        ("`SamplingParams`", SAMPLING),
        ("`StructuredOutputsParams`", STRUCTURED),
        ("`generate`, `chat` and `beam_search`", CALLS),
        ("Prompts, as dicts", PROMPTS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_tables_of_missing_keywords_are_those_of_the_code(title: str, table: Keywords) -> None:
    section = PAGE.partition(f"### {title}\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| `.*$", section, re.M)
    assert rows == rows_of(table), "\n".join(["write:", *rows_of(table)])
