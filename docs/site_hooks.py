"""Hooks of the documentation site: files outside of `docs/` that its pages link to.

On a code host such a link opens the file. The site has no page for it, so the file itself becomes a
part of the site, under `repository/`, and the link leads there.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_OUTSIDE = re.compile(r"\]\(\.\./([^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file that a page links to by `../`."""
    root = Path(config["docs_dir"]).parent
    pages = files.documentation_pages()
    for target in {name for page in pages for name in _OUTSIDE.findall(page.content_string)}:
        files.append(
            File.generated(config, f"repository/{target}", abs_src_path=str(root / target))
        )
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point the links of a page to the copies."""
    return _OUTSIDE.sub(r"](repository/\1)", markdown)
