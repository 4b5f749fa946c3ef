"""The code blocks of README.md, CONTRIBUTING.md and docs/*.md.

A comment on the line before a block, `<!-- needs: two GPUs -->`, says what a machine must have on
which it runs: the tests leave such a block out. Blocks of other kinds than python and bash are for
reading; a text block that directly follows a python block is what that prints.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.scripts import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]+) -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        line: of the page, on which its code begins, from 1
        needs: what its comment says; None without one
        output: what a python block prints, where the page tells
    """

    page: str
    line: int
    kind: str
    code: str
    needs: str | None
    output: str | None

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, one a line: a backslash at its end joins the next."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if line and not line.startswith("#")]


def blocks_of(page: Path) -> list[Block]:
    """Every block of a page, in order."""
    text = page.read_text()
    found = list(_BLOCK.finditer(text))
    blocks = []
    for i, match in enumerate(found):
        output = None
        if match["kind"] == "python" and i + 1 < len(found):
            following = found[i + 1]
            if following["kind"] == "text" and text[match.end() : following.start()] == "\n\n":
                output = following["code"]
        blocks.append(
            Block(
                page=page.name,
                line=text.count("\n", 0, match.start("code")) + 1,
                kind=match["kind"],
                code=match["code"],
                needs=match["needs"],
                output=output,
            )
        )
    return blocks
