"""Documentation of fields: the string below each field of a dataclass, as editors show it."""

import ast
import inspect
from functools import cache
from itertools import pairwise
from textwrap import dedent, fill
from typing import TypeVar

_T = TypeVar("_T")


@cache
def field_docs(settings: type) -> dict[str, str]:
    """Return the string below each field of a dataclass, on one line, by the field's name."""
    [tree] = ast.parse(dedent(inspect.getsource(settings))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: " ".join(str(docs.value.value).split())
        for field, docs in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(docs, ast.Expr)
        and isinstance(docs.value, ast.Constant)
    }


def documented(settings: type[_T]) -> type[_T]:
    """Add the fields' documentation to the docstring of their class, for `help()`."""
    kind: type = settings
    entries = [
        fill(f"{name}: {words}", 100, initial_indent=" " * 8, subsequent_indent=" " * 12)
        for name, words in field_docs(kind).items()
    ]
    words = (settings.__doc__ or "").rstrip()
    settings.__doc__ = "\n".join([f"{words}\n\n    Attributes:", *entries, ""])
    return settings
