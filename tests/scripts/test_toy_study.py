"""scripts/toy_study.py: exact laws of its chains, verdicts by interval, one iteration of the real trainer, its results."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "toys"


@pytest.fixture(scope="module")
def parts() -> tuple[ModuleType, ModuleType, ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        toys, studies, study = (importlib.import_module(name) for name in ("_toys", "_toys_studies", "toy_study"))
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return toys, studies, study


def test_laws_are_those_of_the_bench(parts) -> None:
    """N(0, 1), ten steps: ODE .7726; EM .9313 where its last step is noisy as well, the ODE's here."""
    toys, _, _ = parts
    adapter = toys.ToyAdapter(toys.Affine(toys.uniform(), 2, 0.0, 1.0), toys.uniform(), 2)
    assert toys.law(adapter, "ode", 0.0).variance.tolist() == pytest.approx([0.7726] * 2, abs=5e-5)
    own = toys.law(adapter, "flow_sde", 0.7)
    assert own.variance.tolist() == pytest.approx([0.93147] * 2, abs=5e-5) and own.path_kl == 0.0
    with torch.no_grad():
        adapter.network.offset[4, 0] = 0.3
        adapter.network.gain[6, 1] = -0.2
    moved = toys.law(adapter, "flow_sde", 0.7)
    x, _ = draws = toys.draw(adapter, "flow_sde", 0.7, 40_000, 0)
    assert draws[1] == 0.0  # counted for mixtures alone
    error = 4 / math.sqrt(40_000)
    assert (x.mean(0) - moved.mean).abs().max() < error and (x.var(0) / moved.variance - 1).abs().max() < 1.5 * error
    # One offset: slope^2 delta^2 / (2 std^2), beta dt = .1245 and std^2 = .49 (t / (1 - t)) dt at t = .6 (t_1 is not clamped).
    adapter.network.gain.data.zero_()
    wanted = (0.1245 * 0.3) ** 2 / (2 * 0.49 * 1.5 * 0.1)
    assert toys.law(adapter, "flow_sde", 0.7).path_kl == pytest.approx(wanted, rel=1e-4)
    assert own.kl_from(own) == 0.0 and moved.kl_from(own) > 0.0


def test_verdicts_follow_the_interval(parts) -> None:
    _, studies, study = parts
    rows = [
        {"variant": v, "seed": s, "x": x}
        for v, xs in (("a", [1, 2, 3]), ("b", [0, 1.1, 1.9]))
        for s, x in enumerate(xs)
    ]

    def verdict(*claim, margin=None) -> str:
        return study.judge(rows, studies.Claim("", "x", *claim, margin=margin))["verdict"]

    assert (verdict("a", "b"), verdict("b", "a")) == ("agrees", "disagrees")
    assert verdict("a") == "cannot tell"  # 2 +- 2.5
    assert verdict("a", "b", margin=2.0) == "agrees"
    assert verdict("a", "b", margin=0.5) == "disagrees"
    assert verdict("a", "b", margin=1.0) == "cannot tell"


def test_one_iteration_through_the_real_trainer(parts) -> None:
    toys, studies, _ = parts
    run = toys.begin(
        toys.Affine(toys.uniform(), 1, 0.0, 1.0), toys.uniform(), 1, lambda x: x[:, 0], {"batch.group_size": 2}
    )
    found = studies.followed(run, 1, 1, lambda: {"proxy": float(toys.law(run.adapter, "flow_sde", 0.7).mean[0])})
    assert (found["reward_calls"], found["forward_samples"], found["backward_samples"]) == (8, 8 * (10 + 9), 8 * 9)
    assert found["proxy_curve"][0] == 0.0 and found["proxy"] != 0.0


@pytest.mark.parametrize("name", ["a1", "a3", "a5", "a6", "a11", "a13"])
def test_results_hold_what_they_must(parts, name: str) -> None:
    """Five seeds, and what every run reports; what is claimed of them is what the script claims."""
    _, studies, study = parts
    record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert (RESULTS / f"{name}.png").is_file() and record["seeds"] == [0, 1, 2, 3, 4]
    assert {"command", "version", "machine"} <= record.keys() and f"--studies {name}" in record["command"]
    wanted = {"reward_calls", "forward_samples", "backward_samples", "cpu_seconds"}
    wanted |= {"snr", "cosine"} if name == "a11" else {"proxy", "gold", "kl", "diversity"}
    assert all(wanted <= row.keys() for row in record["rows"])
    assert [study.judge(record["rows"], claim) for claim in studies.STUDIES[name].claims] == record["claims"]
