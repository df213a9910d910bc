"""The repository's Python files as syntax trees, for the tests of structure."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("flowrl", "pipelines", "rewards")
# What a folder at the root is called once it is installed.
PACKAGED = {
    "flowrl": "flowrl",
    "pipelines": "flowrl.pipelines",
    "rewards": "flowrl.rewards",
    "configs": "flowrl.configs",
}


@dataclass(frozen=True)
class Source:
    """One file: its path from the root, its module name as installed, its text."""

    path: str
    module: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return _parse(self.text, self.path)

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, with the line that imports it."""

    module: str
    line: int


@cache
def _parse(text: str, path: str) -> ast.Module:
    return ast.parse(text, filename=path)


def sample(text: str, path: str) -> Source:
    """A source that exists only in a test."""
    parts = Path(path).with_suffix("").parts
    tail = parts[1:-1] if parts[-1] == "__init__" else parts[1:]
    return Source(path, ".".join((PACKAGED.get(parts[0], parts[0]), *tail)), text)


def sources(*folders: str) -> list[Source]:
    """Every Python file under folders of the root, sorted by path."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [sample(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) for path in paths]


def imports(source: Source) -> Iterator[Import]:
    """Modules that a file imports anywhere, in functions and under TYPE_CHECKING too; relative ones resolved.

    ``from a import b`` counts as ``a.b``: b may be a module, and a name inside ``a`` has the
    same owner. Literal arguments of import_module and __import__ count as well.
    """
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(source, node)
            yield from (
                Import(base if alias.name == "*" else f"{base}.{alias.name}", node.lineno) for alias in node.names
            )
        elif isinstance(node, ast.Call) and _callee(node) in ("import_module", "__import__") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield Import(target.value, node.lineno)


def _base(source: Source, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = source.module.split(".")
    keep = len(parts) - node.level + (1 if source.is_package else 0)
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


def _callee(node: ast.Call) -> str:
    function = node.func
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def functions(source: Source) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its dotted name inside the file."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child
                yield from visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")
            else:
                yield from visit(child, prefix)

    yield from visit(source.tree, "")


def repository_files() -> list[Path]:
    """What git tracks or would add; without git, everything but artefacts."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
        return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    skipped = {".venv", ".git", "runs", "build", "dist", "__pycache__"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(part in skipped or part.endswith((".egg-info", "_cache")) for part in path.parts)
    ]
