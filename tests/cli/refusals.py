"""How a user's mistake must end: exit code 2, exactly this text on stderr, nothing on stdout, nothing written."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flowrl import registry
from flowrl.cli import main
from flowrl.config import recipes

RECIPES = ", ".join(recipes())
REWARDS = ", ".join(registry.names("reward"))

FIXED = """\
run_dir: out/run
iterations: 60
batch: {groups: 24, group_size: 16, micro_batch: 64}
rollout:
  steps: 8
  kernel: {name: precise, noise: 0.9}
  window: {kind: random, size: 2, first: 0, last: 2}
rewards: [{name: compositional}]
"""
"""A recipe that is right, with numbers of its own, so that tuning a shipped one changes no message."""


@dataclass(frozen=True)
class Case:
    """One mistake: the command, the message after ``error: ``, and the files and environment it needs."""

    name: str
    argv: list[str]
    message: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


def one_problem(line: str) -> str:
    """The message of a configuration with one error."""
    return f"1 error in the configuration:\n  {line}"


def expect_refusal(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the command in ``folder`` and compare everything that a user would see."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    before = snapshot(folder)
    assert main(case.argv) == 2
    written = capsys.readouterr()
    assert written.err == f"error: {case.message}\n"
    assert written.out == ""
    assert snapshot(folder) == before


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content, None for folders."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
