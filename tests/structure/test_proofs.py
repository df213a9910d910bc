"""docs/proofs.md names tests: each must exist."""

from __future__ import annotations

import ast
import re
from functools import cache

from .sources import ROOT

_NODE = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
PAGES = ("docs/proofs.md", "docs/results/claims.md")


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def missing(text: str) -> list[str]:
    found = []
    for path, name in _NODE.findall(text):
        if not (ROOT / path).is_file() or (name and name not in functions_of(path)):
            found.append(f"{path}::{name}")
    return found


def test_every_test_that_is_named_exists() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert _NODE.search(text) and missing(text) == []


def test_a_test_that_is_gone_is_noticed() -> None:
    gone = "`tests/structure/test_proofs.py::test_gone` and `tests/no/test_file.py::test_x`"
    assert missing(gone) == ["tests/structure/test_proofs.py::test_gone", "tests/no/test_file.py::test_x"]
