"""Measures the package's structure: how much a reader must read, and how entangled it is.

    python tests/structure.py [--option top_p]

prints how many files and lines stand between a prompt and its tokens (the import closure of
offline generation), the modules at the root, the file names that occur more than twice, the pairs
of folders that import each other, and the files that mention a sampling option.
`tests/test_imports.py` holds the limits; `docs/architecture.md` has the figures of today.
"""

import argparse
import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tpllm"
# What the caller's process and a worker load to generate offline with Qwen3, and the program that
# cleans up after them. No import statement names the last three.
ENTRY_POINTS = (
    "tpllm.llm",
    "tpllm.worker.__main__",
    "tpllm.models.dense",
    "tpllm.supervision.guard",
)


def name_of(file: Path) -> str:
    """Return the dotted name of a module of the package."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def folder_of(module: str) -> str:
    """Return the first folder below the package in a module's path; at the root, its own name."""
    return module.split(".")[1] if "." in module else module


def imported_modules(tree: ast.AST, top_level_only: bool = False) -> Iterator[str]:
    """Yield full names of what a module imports; `from a import b` gives a.b, a module or not."""
    for node in tree.body if top_level_only and isinstance(tree, ast.Module) else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def imports_of(file: Path, top_level_only: bool = False) -> set[str]:
    return set(imported_modules(ast.parse(file.read_text()), top_level_only))


def modules_imported_by(module: str) -> set[str]:
    """Return the package's modules that a module imports anywhere, also within functions.

    Imports for type checkers only are left out.
    """
    tree = _WithoutTypeChecking().visit(ast.parse(FILES[module].read_text()))
    found = set()
    for name in imported_modules(tree):
        if name in FILES:
            found.add(name)
        elif name.rpartition(".")[0] in FILES:  # a name out of a module
            found.add(name.rpartition(".")[0])
    return found - {module}


class _WithoutTypeChecking(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


def import_closure(entry_points: Iterable[str] = ENTRY_POINTS) -> set[str]:
    """Return every module that is loaded with the entry points, their packages included."""
    seen: set[str] = set()
    left = list(entry_points)
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            left += modules_imported_by(module)
            left += [module.rpartition(".")[0]] if "." in module else []
    return seen


def root_modules() -> list[str]:
    """Return the modules at the package's root, without folders."""
    return sorted(file.stem for file in PACKAGE.glob("*.py"))


def repeated_names(at_least: int = 3) -> dict[str, int]:
    """Return file names that occur this often, except those that Python itself requires."""
    names = Counter(file.stem for file in FILES.values() if not file.stem.startswith("__"))
    return {name: number for name, number in names.items() if number >= at_least}


def folder_imports() -> dict[str, set[str]]:
    """Return the folders and root modules that each folder and root module imports."""
    found: dict[str, set[str]] = {}
    for module in FILES:
        used = found.setdefault(folder_of(module), set())
        used |= {folder_of(other) for other in modules_imported_by(module) if other != "tpllm"}
        used.discard(folder_of(module))
    return found


def two_way_imports() -> list[tuple[str, str]]:
    """Return pairs of folders that import each other."""
    arrows = folder_imports()
    return [(a, b) for a in arrows for b in arrows[a] if a < b and a in arrows.get(b, ())]


def mentions(option: str) -> dict[str, int]:
    """Count how often each file outside of `server/` and `cli/` mentions an option."""
    found = {
        str(file.relative_to(PACKAGE)): len(re.findall(rf"\b{option}\b", file.read_text()))
        for file in FILES.values()
    }
    return {
        file: number
        for file, number in found.items()
        if number and not file.startswith(("server/", "cli/"))
    }


def num_lines(modules: Iterable[str]) -> int:
    return sum(len(FILES[module].read_text().splitlines()) for module in modules)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the package's structure.")
    parser.add_argument("--option", default="top_p")
    option = parser.parse_args().option
    closure = import_closure()
    found = mentions(option)
    print(f"package: {len(FILES)} files, {num_lines(FILES):,} lines")
    print(
        f"import closure of offline generation: {len(closure)} files, {num_lines(closure):,} lines"
    )
    print(f"modules at the root: {len(root_modules())}: {', '.join(root_modules())}")
    print(f"names that occur more than twice: {repeated_names() or 'none'}")
    print(f"folders that import each other: {two_way_imports() or 'none'}")
    print(f"{option}: {sum(found.values())} mentions in {len(found)} files: {', '.join(found)}")


if __name__ == "__main__":
    main()
