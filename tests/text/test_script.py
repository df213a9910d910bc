"""``python scripts/train_text.py CONFIG [key=value ...]`` in a process of its own, and its answers to mistakes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_text.py"


def test_two_iterations_from_the_command_line(tmp_path: Path) -> None:
    words = [
        "text_spo_tree", "iterations=2", "task.terms=3", "model.hidden=16", "model.layers=1", "model.heads=2",
        "pretraining.steps=2", "pretraining.batch=8", "pretraining.cache=base", "evaluation.problems=16",
        "rollout.problems=4", "run_dir=run",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("supervised start: 2 steps") and len(lines) == 4
    assert lines[-1].startswith("iteration 2, samples ") and "held-out accuracy" in lines[-1]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2] and rows[2]["tokens"] > rows[1]["tokens"] > 0
    assert rows[0]["eval/accuracy"] is not None and list((tmp_path / "base").glob("*.safetensors"))


def test_mistakes_end_with_2_and_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("train_text", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["text_outcome", "sed=1"]) == 2
    assert "sed (override): unknown key; did you mean seed?" in capsys.readouterr().err
    assert module.main([]) == 2 and module.main(["--help"]) == 0
    assert "train_text.py CONFIG" in capsys.readouterr().out
