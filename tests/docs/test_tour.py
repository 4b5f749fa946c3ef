"""docs/tour.md leads through files that exist, by names that stand in them, and stays short.

The names of docs/extending.md stand in the files that each of its sections links to, too.
"""

import re
from pathlib import Path

import pytest

from tests.scripts import ROOT
from tests.structure import FILES, name_of, num_lines

TOUR = (ROOT / "docs" / "tour.md").read_text()
SECTIONS = (ROOT / "docs" / "extending.md").read_text().split("\n## ")[1:]
# rows of the table of stops: number, file, lines
STOPS = [
    (ROOT / path, int(lines))
    for path, lines in re.findall(r"^\| \d+ \| \[.+?\]\(\.\./(.+?)\) \| ([\d,]+) \|$", TOUR, re.M)
]
PARAGRAPHS = re.findall(r"^### \d+\. .*?\]\(\.\./(.+?)\)\n(.+?)(?=^##)", TOUR, re.M | re.S)


def test_every_linked_file_exists() -> None:
    links = set(re.findall(r"\]\(\.\./(tpllm/.+?)\)", TOUR))
    assert links
    assert {ROOT / link for link in links} <= set(FILES.values())


def test_the_spine_is_as_short_as_the_page_says() -> None:
    [limit] = re.findall(r"spine has fewer than ([\d,]+) lines", TOUR)
    assert num_lines(name_of(file) for file, _ in STOPS) < int(limit.replace(",", ""))


@pytest.mark.parametrize("file, lines", STOPS, ids=lambda value: str(getattr(value, "stem", "")))
def test_a_stop_is_about_as_long_as_the_page_says(file: Path, lines: int) -> None:
    assert num_lines([name_of(file)]) == pytest.approx(lines, rel=0.1, abs=10)


def test_every_stop_has_its_paragraph() -> None:
    assert [ROOT / path for path, _ in PARAGRAPHS] == [file for file, _ in STOPS]


def missing_names(text: str, files: set[str]) -> list[str]:
    """The names in `text` that stand in none of the files, nor in those that `text` links to."""
    files = files | set(re.findall(r"\]\(\.\./((?:tpllm|tests)/.+?)\)", text))
    code = "\n".join((ROOT / file).read_text() for file in files)
    names = re.findall(r"`(\w+)`", text)
    return [name for name in names if not re.search(rf"\b{name}\b", code)]


@pytest.mark.parametrize("path, text", PARAGRAPHS, ids=[path for path, _ in PARAGRAPHS])
def test_the_names_of_a_stop_stand_in_its_files(path: str, text: str) -> None:
    assert missing_names(text, {path}) == []


def test_the_names_of_an_answer_stand_in_its_files() -> None:
    answers = TOUR.partition("## Where a question is answered")[2]
    for line in re.findall(r"^\| .*\.py.* \|$", answers, re.M):
        assert missing_names(line, set()) == []


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_the_names_of_a_section_stand_in_its_files(section: str) -> None:
    assert missing_names(section, set()) == []
