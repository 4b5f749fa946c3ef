"""docs/coming-from-vllm.md names all that there is, and as absent nothing that there is."""

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
ABSENT = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", PAGE.partition("## What is absent")[2], re.M))


def public(kind: type) -> set[str]:
    own = vars(kind).keys() - {"config"}
    return {name for name in own if not name.startswith("_")}


def names_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def told(text: str) -> set[str]:
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
def test_what_is_the_same_is_told_whole(title: str, names: set[str]) -> None:
    [paragraph] = [each for each in SAME.split("\n\n") if each.startswith(f"**{title}**")]
    kinds = {"RequestOutput", "CompletionOutput", "Logprob"}
    assert told(paragraph) - kinds == names


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_the_methods_that_are_told_exist(kind: type) -> None:
    [paragraph] = [each for each in SAME.split("\n\n") if each.startswith(f"**{kind.__name__}**")]
    names = told(paragraph) - {"with"}
    assert names and names <= public(kind)


def test_nothing_absent_is_there() -> None:
    assert told(ABSENT["sampling"]) and told(ABSENT["settings"]) and told(ABSENT["`LLM`"])
    assert not told(ABSENT["sampling"]) & names_of(SamplingParams)
    assert not told(ABSENT["settings"]) & names_of(Settings)
    assert not told(ABSENT["`LLM`"]) & public(LLM)
    known = CompletionRequest.model_fields.keys() | ChatCompletionRequest.model_fields.keys()
    assert told(ABSENT["server: fields"]) and not told(ABSENT["server: fields"]) & known


def rows_of(table: Keywords) -> list[str]:
    """The rows of the page for a table of absent keywords."""
    rows = []
    for name, absent in table.items():
        passes = ", ".join(f"`{value!r}`" for value in (None, *absent.harmless))
        rows.append(f"| `{name}` | {passes} | {absent.way_out} |")
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
def test_the_tables_of_absent_keywords_are_those_of_the_code(title: str, table: Keywords) -> None:
    section = PAGE.partition(f"### {title}\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| `.*$", section, re.M)
    assert rows == rows_of(table), "\n".join(["write:", *rows_of(table)])
