"""docs/architecture.md has the folders, the directions and the figures of today."""

import re

import pytest

from tests import structure
from tests.scripts import ROOT
from tests.test_imports import DATA, MAY_IMPORT

PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_table_of_folders_has_the_directions_that_the_imports_are_held_to() -> None:
    section = PAGE.partition("## Folders")[2].partition("\n## ")[0]
    stated = {}
    for folder, cell in re.findall(r"^\| `(\w+)` \| .+ \| (.*)\|$", section, re.M):
        stated[folder] = set(re.findall(r"`(\w+)`", cell)) | (DATA if "data" in cell else set())
    assert stated == MAY_IMPORT
    assert list(stated) == list(MAY_IMPORT)


def test_every_file_that_the_page_names_exists() -> None:
    for path in re.findall(r"`([a-z_]+/[\w/]+\.py)`", PAGE):
        assert (structure.PACKAGE / path).exists() or (ROOT / path).exists(), path


def test_the_figures_are_about_those_of_today() -> None:
    closure = structure.import_closure()
    figures = {
        "files in the package": len(structure.FILES),
        "lines in the package": structure.num_lines(structure.FILES),
        "files that offline generation": len(closure),
        "lines of these files": structure.num_lines(closure),
        "modules at the root": len(structure.root_modules()),
        "file names that occur": len(structure.repeated_names()),
        "pairs of folders": len(structure.two_way_imports()),
        "files outside of": len(structure.mentions("top_p")),
    }
    for name, value in figures.items():
        [stated] = re.findall(rf"^\| {name}.*? \| ([\d,]+) \|", PAGE, re.M)
        assert int(stated.replace(",", "")) == pytest.approx(value, rel=0.05), name


def test_the_readme_has_a_row_for_every_folder() -> None:
    section = (ROOT / "README.md").read_text().partition("## Where things live")[2]
    listed = set(re.findall(r"^\| `tpllm/(\w+)/` \|", section.partition("\n## ")[0], re.M))
    folders = {file.parent.name for file in structure.PACKAGE.glob("*/__init__.py")}
    assert listed == folders
