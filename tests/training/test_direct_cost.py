"""flowrl plan foretells the network calls of differentiable rewards: its arithmetic against hooks."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl.plan import plan, plan_text
from tests.training.helpers import make
from tests.training.test_direct import METHODS, direct_config

PENALISED = {"objective.kl.form": "velocity", "objective.kl.weight": 0.1}
CASES = {
    **{name: (name, {"direct.per_sample": False}) for name in METHODS},
    "guided and penalised": ("alignprop", {"direct.least": 0, "rollout.guidance": 2.0, **PENALISED}),
    "kept whole": ("alignprop", {"direct.least": 0, "direct.checkpoint": False, **PENALISED}),
    "one branch detached": ("draft", {"rollout.guidance": 2.0, "rollout.cfg_gradient": "conditional"}),
    "every second latent": ("draft", {"direct.last": 3, "direct.checkpoint_every": 2, **PENALISED}),
    "noise and its divergence": (
        "draft", {"direct.stochastic": True, "objective.kl.form": "paper", "objective.kl.weight": 0.1},
    ),
    "refl penalised": ("refl", PENALISED),
    "refl and its pre-training loss": ("refl", {"direct.pretrain_weight": 1.0, "rollout.guidance": 2.0}),
    "two updates": ("draft_lv", {"objective.updates": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_plan_foretells_the_calls(tiny_sd3: Path, case: str) -> None:
    name, changes = CASES[case]
    config = direct_config(tiny_sd3, name, **changes)
    row, made = make(config).iterate(), plan(config)
    for found, work in ((row["calls/forward"], made.forward), (row["calls/backward"], made.update_backward)):
        assert work.calls.least <= found <= work.calls.most
        if work.calls.least == work.calls.most:
            assert found == work.calls.mean
    assert made.forward.samples.least <= row["calls/forward_samples"] <= made.forward.samples.most
    assert made.update_backward.samples.least <= row["calls/backward_samples"] <= made.update_backward.samples.most


def test_the_plan_says_what_is_trained(tiny_sd3: Path) -> None:
    text = plan_text(direct_config(tiny_sd3, "draft"))
    assert "8 samples, along the gradient of their rewards" in text and "4 steps, deterministic" in text
    assert "every step but the last" in plan_text(direct_config(tiny_sd3, "adjoint_matching"))
    assert "advantages" not in text
