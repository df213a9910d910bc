"""Two processes under torchrun draw the same groups, noise and advantages as one, and take the same step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowrl import api
from flowrl.checkpoint import store
from flowrl.config.render import to_yaml
from tests.training.helpers import small_config, tensors

REPOSITORY = Path(__file__).parents[2]


PLAIN = {"objective.kl.form": "paper", "objective.kl.weight": 0.1, "optimizer.lr": 1e-3}
# Groups of unequal size, each with its own step, weights of mean 1 over all ranks.
UNEQUAL = {
    "batch.allocation": {"name": "knapsack", "success": 0.5}, "rollout.window.kind": "iso_temporal",
    "rollout.window.size": 1, "objective.name": "flash_grpo", "objective.kl.form": "paper", "objective.kl.weight": 0.1,
    "optimizer.lr": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize("changes", [PLAIN, UNEQUAL], ids=["plain", "unequal"])
def test_two_processes_equal_one(tiny_sd3: Path, tmp_path: Path, changes: dict) -> None:
    one = small_config(tiny_sd3, run_dir=str(tmp_path / "one"), iterations=2, **changes)
    two = small_config(tiny_sd3, run_dir=str(tmp_path / "two"), iterations=2, **changes)
    api.train(one)
    recipe = tmp_path / "two.yaml"
    recipe.write_text(to_yaml(two))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "scripts/train.py", str(recipe)], cwd=REPOSITORY, capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [r["iteration"] for r in rows[1]] == [1, 2]
    for a, b in zip(*rows, strict=True):
        assert abs(a["score/mean"] - b["score/mean"]) < 1e-6
        assert abs(a["policy/kl"] - b["policy/kl"]) < 1e-6
        # Two processes each do their own half of the calls.
        if changes is PLAIN:
            assert b["calls/backward_samples"] * 2 == a["calls/backward_samples"]
    a, b = (tensors(store.load(tmp_path / n / "checkpoints").state) for n in ("one", "two"))
    policy = [n for n in a if n.startswith("/policy")]
    apart = torch.cat([(a[n] - b[n]).abs().flatten() for n in policy])
    # Adam's first steps are of full size whatever the gradient's, so an element near 0 may go the other way.
    assert float(apart.mean()) < 2e-6 and float((apart > 1e-4).float().mean()) < 1e-3
    assert (tmp_path / "two" / "report.html").exists()
    assert all(torch.isfinite(b[n]).all() for n in policy)
