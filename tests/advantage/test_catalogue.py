"""The catalogue says what exists: every key has code, every piece of evidence has a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from flowrl import advantage
from flowrl.advantage import AGGREGATIONS, ESTIMATORS, METHODS, Method
from flowrl.objectives import METHODS as OBJECTIVE_METHODS
from flowrl.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
ENTRIES = METHODS + OBJECTIVE_METHODS


def _test_functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("method", ENTRIES, ids=[f"{m.kind}-{m.key}" for m in ENTRIES])
def test_evidence_exists(method: Method) -> None:
    for label, test_id in method.evidence.items():
        file, _, name = test_id.partition("::")
        if not name:  # a recorded result
            assert label == "learned" and (ROOT / file).is_file(), f"{method.key}: {label} points to {file}"
            continue
        assert name in _test_functions(ROOT / file), f"{method.key}: {label} points to {test_id}, which does not exist"


def test_entries_are_unique_and_complete() -> None:
    names = [(m.kind, m.key) for m in ENTRIES]
    assert len(names) == len(set(names))

    def keys(kind: str) -> set[str]:
        return {m.key for m in ENTRIES if m.kind == kind}

    assert keys("estimator") == set(ESTIMATORS)
    assert keys("aggregation") == set(AGGREGATIONS)
    assert keys("objective") == set(OBJECTIVES)
    assert all(hasattr(advantage, key) for key in keys("kl"))


def test_public_names_exist() -> None:
    assert len(set(advantage.__all__)) == len(advantage.__all__)
    assert all(hasattr(advantage, name) for name in advantage.__all__)


@pytest.mark.parametrize(
    ("kind", "tier", "evidence"),
    [("magic", 1, {"exact": "a"}), ("kl", 4, {"exact": "a"}), ("kl", 1, {"proof": "a"}), ("kl", 1, {})],
)
def test_an_entry_checks_itself(kind: str, tier: int, evidence: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="method x: "):
        Method(key="x", kind=kind, paper_id="", title="", tier=tier, evidence=evidence)


def test_evidence_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        METHODS[0].evidence["exact"] = "elsewhere"  # type: ignore[index]
