"""Every objective that a config can name, through the real rollout and update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowrl import registry
from flowrl.config.families import family_of
from flowrl.dynamics.kernels import StepPoint, mean_slope
from flowrl.training.trainer import Trainer
from tests.training.helpers import make, small_config
from tests.training.toy import GaussianAdapter, LatentReward, rows, toy_config

# neighbor_grpo has no log-probs of steps: test_neighbours.py.
NAMES = [n for n in registry.names("objective") if family_of(n) == "trajectory" and n != "neighbor_grpo"]


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_starts_at_ratio_one_and_moves(tiny_sd3: Path, name: str) -> None:
    config = small_config(tiny_sd3, **{
        "objective.name": name, "objective.passes": 2, "objective.clip_range": 0.05,
        "objective.kl.form": "paper", "objective.kl.weight": 0.01,
    })  # fmt: skip
    trainer = make(config)
    before = [p.detach().clone() for p in trainer.weights.parameters]
    row = trainer.iterate()  # the start-up self-check compares the log-probs
    assert row["update/steps"] == 2 and row["policy/ratio_max_deviation"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.weights.parameters, strict=True))
    once = make(small_config(tiny_sd3, **{
        "objective.name": name, "objective.kl.form": "paper", "objective.kl.weight": 0.01, "objective.skip_silent": False,
    }))  # fmt: skip
    row = once.iterate()
    assert (row["policy/ratio_mean"], row["policy/ratio_max_deviation"]) == (1.0, 0.0)


def gradient_by_step(**changes: object) -> torch.Tensor:
    """The on-policy gradient of one offset a step, ten steps, nine of them trained."""
    adapter = GaussianAdapter(10)
    config = toy_config(**({"rollout.kernel.name": "flow_sde"} | changes))
    trainer = Trainer(config, adapter, LatentReward(lambda x0: x0.flatten(1).sum(1)), rows(4))
    trainer._step = lambda: 0.0
    trainer.iterate()
    return adapter.network.delta.grad[:-1].double()


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "precise", "cps"])
def test_step_weights_and_ratios_scale_each_steps_gradient(kernel: str) -> None:
    """GRPO-Guard: on policy a step's gradient is std times the plain one, times the step's weight; the others likewise."""
    noise = {"flow_sde": 0.7, "dance_sde": 0.3, "precise": 0.7, "cps": 0.8}[kernel]
    changes = {"rollout.kernel.name": kernel, "rollout.kernel.noise": noise}
    plain = gradient_by_step(**changes)
    adapter = GaussianAdapter(10)
    point = StepPoint.of(adapter.schedule(10, None), torch.arange(9), 1)
    slope, dt = mean_slope(kernel, noise, point).double(), point.length.double()
    std = trainer_std(kernel, noise)
    for form, factor in {
        "debiased": torch.ones(9),
        "grpo_guard": std / slope,
        "tempflow": std / std.mean(),
        "flash_grpo": (std / slope) / (std / slope).mean(),
        "pcpo": (dt * std / slope) * (slope / std).sum() / dt.sum(),
    }.items():
        named = {"objective.ratio": form} if form == "debiased" else {"objective.name": form}
        found = gradient_by_step(**changes, **named)
        torch.testing.assert_close(found, plain * factor, rtol=2e-4, atol=1e-6 * float((plain * factor).abs().max()))


def trainer_std(kernel: str, noise: float) -> torch.Tensor:
    from flowrl.dynamics.kernels import transition

    point = StepPoint.of(GaussianAdapter(10).schedule(10, None), torch.arange(9), 2)
    zero = torch.zeros(9, 1)
    return transition(kernel, noise, zero, zero, zero, point)[1].flatten().double()


def test_guard_takes_the_spread_out_of_the_steps() -> None:
    """F4: plain gradient scales grow sixfold from t = .9 to t = .2 (the last step is not trained), Guard's are flat."""
    adapter = GaussianAdapter(10)
    point = StepPoint.of(adapter.schedule(10, None), torch.arange(1, 9), 1)
    slope, std = mean_slope("flow_sde", 0.7, point).double(), trainer_std("flow_sde", 0.7)[1:]
    assert float((slope / std).max() / (slope / std).min()) == pytest.approx(6.0, rel=1e-4)
    plain, guard = gradient_by_step()[1:], gradient_by_step(**{"objective.name": "grpo_guard"})[1:]
    torch.testing.assert_close(guard / plain, std / slope, rtol=2e-4, atol=1e-6)


def test_dppo_drops_what_has_gone_too_far() -> None:
    """A threshold no transition stays under: after the first update all outward elements are dropped."""
    adapter = GaussianAdapter(10)
    config = toy_config(**{
        "objective.name": "flow_dppo", "objective.loss_options": {"threshold": 1e-12}, "objective.passes": 2,
        "optimizer.lr": 0.05,
    })  # fmt: skip
    trainer = Trainer(config, adapter, LatentReward(lambda x0: x0.flatten(1).sum(1)), rows(4))
    dropped = trainer.iterate()["policy/clip_fraction"]
    assert 0.15 < dropped < 0.35  # half of the elements of the second of two passes point outward


def test_a_loss_of_its_own_takes_the_place_of_the_forms(tiny_sd3: Path) -> None:
    row = make(small_config(tiny_sd3, **{"objective.name": "grpo_guard", "objective.loss": "cispo"})).iterate()
    assert row["policy/loss"] is not None
