"""R2: a process killed in the middle of saving loses nothing that had been saved."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def test_killed_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Loaded, not run, to spare the suite one more import of torch; its children are processes all the same.
    path = Path(__file__).parents[2] / "scripts" / "kill_test.py"
    spec = importlib.util.spec_from_file_location("kill_test", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kill_test", script)
    spec.loader.exec_module(script)
    result = script.run(kills=6, seed=3, root=tmp_path / "checkpoints")
    assert (result.kills, result.by_time, result.by_line) == (6, 3, 3)
    assert result.inside_save >= 2
    assert (result.most_lost, result.stale_left, result.failures) == (0, 0, [])
    assert result.final_iteration >= 11
