"""Every python and bash block of README.md and docs/ runs, and prints what the page says."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, blocks_of
from tests.docs.shell import run_line
from tests.shared_engines import ADDRESS, SharedEngines, shared_engines

pytestmark = pytest.mark.usefixtures("forked_engines")

BLOCKS = {page: blocks_of(page) for page in PAGES}
RUNNABLE = ("python", "bash")
WITH_CODE = [page for page in PAGES if any(block.kind in RUNNABLE for block in BLOCKS[page])]

# Nothing else is left out. Who adds a block here should know why it cannot run.
LEFT_OUT = {
    ("CONTRIBUTING.md", "a network", "./test.sh tests/engine"),
    ("README.md", "a network", "python3 -m venv .venv/try"),
    ("README.md", "two GPUs", "python launch/bench_tp.py"),
    ("README.md", "a network", "pip install ."),
    ("README.md", "a network", "./test.sh"),
    ("quickstart.md", "a network", "python3 -m venv .venv"),
    ("server.md", "a network", "pip install 'tpllm[server]'"),
}


@pytest.fixture(scope="module")
def engines() -> Iterator[SharedEngines]:
    with shared_engines(tensor_parallel_size=2) as engines:
        yield engines


def test_only_blocks_that_cannot_run_are_left_out() -> None:
    left_out = [
        (block.page, block.needs, block.code)
        for blocks in BLOCKS.values()
        for block in blocks
        if block.needs is not None
    ]
    assert len(left_out) == len(LEFT_OUT)
    for page, needs, begin in LEFT_OUT:
        assert any(
            (page, needs) == (each[0], each[1]) and each[2].startswith(begin) for each in left_out
        ), f"{page} has no block that needs {needs} and begins with {begin!r}"


def test_every_comment_about_needs_is_before_a_block() -> None:
    for page, blocks in BLOCKS.items():
        comments = re.findall("<!-- needs:", page.read_text())
        assert len(comments) == sum(block.needs is not None for block in blocks), page


def test_no_block_is_of_a_kind_that_escapes_the_tests() -> None:
    kinds = {block.kind for blocks in BLOCKS.values() for block in blocks}
    assert kinds <= {*RUNNABLE, "yaml", "text"}
    for page, blocks in BLOCKS.items():  # none without a kind, either
        fences = len(re.findall("^```", page.read_text(), re.M))
        assert fences == 2 * len(blocks), page


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(
    page: Path, engines: SharedEngines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = [block for block in BLOCKS[page] if block.needs is None]
    for block in blocks:
        if block.kind == "yaml":
            name = re.match(r"# (\w+\.yaml)", block.code)
            assert name, f"{page.name}:{block.line} does not begin with a comment naming the file"
            (tmp_path / name[1]).write_text(block.code)
    names = {"__name__": "__main__"}
    with engines.lent():
        for block in blocks:
            if block.kind == "bash":
                for line in block.commands:
                    run_line(line, tmp_path, engines.address)
            elif block.kind == "python":
                capsys.readouterr()
                # so many lines before it that a traceback shows the page's own
                code = "\n" * (block.line - 1) + block.code.replace(ADDRESS, engines.address)
                exec(compile(code, page, "exec"), names)
                if block.output is not None:
                    assert capsys.readouterr().out == block.output, f"{page.name}:{block.line}"
