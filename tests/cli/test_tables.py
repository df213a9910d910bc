"""What ``methods`` and ``doctor`` say: evidence that exists, and a report that never fails."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

import flowrl
from flowrl import doctor, methods, registry
from flowrl.config import load, validate
from flowrl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"exact", "golden", "formula", "identity", "learned", "reconstructed"}


def test_every_piece_of_evidence_exists() -> None:
    missing = []
    for row in methods.entries():
        assert row.evidence and set(row.evidence) <= LABELS, row
        for target in row.evidence.values():
            name, _, test = target.partition("::")
            file = ROOT / name
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
            if not text or (test and not re.search(rf"^def {re.escape(test)}\(", text, re.MULTILINE)):
                missing.append(f"{row.kind} {row.key}: {target}")
    assert not missing, "\n".join(missing)


def test_every_config_of_the_table_runs() -> None:
    for row in methods.entries():
        if row.config:
            assert validate(load("demo", shlex.split(row.config))) == [], row  # as a shell and flowrl compare take it


def test_every_name_a_config_takes_is_in_the_table() -> None:
    listed = {(row.kind, row.key) for row in methods.entries()}
    kinds = {"kernel": "kernel", "advantage": "estimator", "objective": "objective"}
    assert {(row, name) for kind, row in kinds.items() for name in registry.names(kind)} <= listed


def test_a_method_of_another_package_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = {"mine": "flowrl.objectives:METHODS"}
    own = registry.targets
    monkeypatch.setattr(registry, "targets", lambda kind: target if kind == "method" else own(kind))
    with pytest.raises(UserError, match=r"entry point 'mine'.*expected a Method, found tuple"):
        methods.entries()


def test_a_method_listed_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "KERNELS", (*methods.KERNELS, methods.KERNELS[0]))
    with pytest.raises(UserError, match="the kernel 'ode' is listed twice"):
        methods.entries()


def test_text_has_a_line_for_each_method() -> None:
    table, _, exemptions = methods.methods_text().partition("\n\n")
    assert len(table.splitlines()) == 1 + len(methods.entries())
    reasons = [(e.key, name, reason) for e in methods.entries() for name, reason in e.exempt.items()]
    assert exemptions.splitlines()[1:] == [f"  {key}: {name}: {reason}" for key, name, reason in reasons]


def test_doctor_tells_missing_from_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_wheel.py").write_text("raise RuntimeError('operator nms does not\\nexist')\n")
    (tmp_path / "half_there.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.import_problem("json") == ""
    assert doctor.import_problem("no_such_module") == "no_such_module is not installed"
    assert doctor.import_problem("half_there") == "half_there needs no_such_dependency, which is not installed"
    assert doctor.import_problem("broken_wheel") == (
        "broken_wheel is installed and does not import (RuntimeError: operator nms does not exist)"
    )
    monkeypatch.setattr(doctor, "EXTRAS", (doctor.Extra("clip", ("json", "broken_wheel"), "this and that"),))
    text = doctor.doctor_text()
    assert "  clip          off: broken_wheel is installed and does not import" in text
    assert "disables this and that; pip install 'flowrl[clip]'" in text


def test_doctor_knows_every_extra_and_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {extra.name for extra in doctor.EXTRAS} == set(project["optional-dependencies"]) - {"dev"}
    names = {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}
    assert set(doctor.CORE) == names
    assert project["version"] == flowrl.__version__


def test_doctor_lists_the_processor() -> None:
    assert re.match(r"cpu: \d+ cores, torch uses \d+ threads", doctor.devices()[0])
