"""ReFL's pre-training loss: the denoising error on the pre-trained model's samples, by an independent transcription."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl import rng
from flowrl.config import load
from flowrl.config.dialect import ConfigError
from flowrl.config.validate import check
from flowrl.training.trainer import Trainer
from tests.training.helpers import make
from tests.training.test_direct import direct_config

SILENT = {"direct.margin": -1e6}  # every reward is above the margin: no gradient of its own


def gradients(tiny: Path, **changes: Any) -> tuple[list[torch.Tensor], dict[str, Any], Trainer]:
    """What the first update would step along, before clipping."""
    trainer = make(direct_config(tiny, "refl", **changes))
    for p in trainer.weights.parameters:  # LoRA's second factor starts at 0, where half the gradients vanish
        torch.manual_seed(p.numel())
        p.data += 0.02 * torch.randn(p.shape)
    held: list[torch.Tensor] = []

    def spy() -> float:
        held.extend(p.grad.clone() for p in trainer.weights.parameters)
        for p in trainer.weights.parameters:
            p.grad = None
        return 0.0

    trainer._step = spy
    return held, trainer.iterate(), trainer


def by_hand(trainer: Trainer) -> torch.Tensor:
    """Mean over samples of the squared velocity error, each at its own time and noise."""
    learner, adapter = trainer.learner, trainer.adapter
    trainer.iteration = 0
    total = torch.zeros(())
    for chunk in learner._chunks(trainer._draw(), 0):
        who, text = chunk.chain.members, chunk.chain.prompted.positive
        grid = trainer.policy.schedule.t
        for n in range(len(chunk)):
            name = (who.seed, who.iteration, who.prompt_id[n], who.occurrence[n], who.member[n])
            one = text[torch.tensor([n])]
            x = rng.normal([rng.key(*name, 0, "initial")], chunk.chain.shape)
            with torch.no_grad(), adapter.lora_off():
                for k in range(4):
                    x = x + (grid[k + 1] - grid[k]) * adapter.predict(x, grid[k : k + 1], one).value
            noise = rng.normal([rng.key(*name, 0, "renoise")], chunk.chain.shape)
            t = torch.tensor([rng.uniform(rng.key(*name, 1, "timestep"))])
            made = adapter.predict((1 - t) * x + t * noise, t, one).value
            total = total + ((made - (noise - x)) ** 2).sum() / x.numel() / 8
    return total


def test_the_gradient_is_that_of_the_denoising_error(tiny_sd3: Path) -> None:
    found, row, trainer = gradients(tiny_sd3, **SILENT, **{"direct.pretrain_weight": 0.7})
    expected = by_hand(trainer)
    assert row["direct/pretrain_loss"] == pytest.approx(expected.item(), rel=1e-4)
    (0.7 * expected).backward()
    for own, p in zip(found, trainer.weights.parameters, strict=True):
        torch.testing.assert_close(own, p.grad, rtol=2e-3, atol=1e-6)
    assert max(float(g.abs().max()) for g in found) > 1e-4


def test_it_adds_to_the_rewards_gradient_and_is_off_by_default(tiny_sd3: Path) -> None:
    both, row, _ = gradients(tiny_sd3, **{"direct.pretrain_weight": 0.3})
    reward, plain, _ = gradients(tiny_sd3)
    pretrain, _, _ = gradients(tiny_sd3, **SILENT, **{"direct.pretrain_weight": 0.3})
    for a, b, c in zip(both, reward, pretrain, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-3, atol=1e-6)
    assert "direct/pretrain_loss" not in plain and row["score/mean"] == plain["score/mean"]


def test_samples_without_a_reward_leave_nothing_behind(tiny_sd3: Path) -> None:
    rewards = [{"name": "tests.training.graded:Broken", "args": {"bad": 9}}]
    changes = {"rewards": rewards, "failures.max_invalid_fraction": 1.0, "direct.pretrain_weight": 1.0}
    held, row, trainer = gradients(tiny_sd3, **changes)
    assert held == [] and row["update/steps"] == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.weights.parameters)


def test_where_it_is_refused() -> None:
    reward = "rewards=[{name: pixels}]"
    with pytest.raises(
        ConfigError, match=r"direct\.pretrain_weight: draft has no pre-training loss; remove it, or hold"
    ):
        check(load("demo", [reward, "objective.name=draft", "direct.pretrain_weight=1"]))
    with pytest.raises(ConfigError, match=r"direct\.pretrain_weight: -1\.0 is out of range; use 0 \(without\) or more"):
        check(load("demo", [reward, "objective.name=refl", "direct.pretrain_weight=-1"]))
