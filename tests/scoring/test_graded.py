"""Rewards with a gradient: sums, shaping, masks, what they read, and that the runtime scores them alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowrl.config.schema import Failures, RewardEntry
from flowrl.errors import UserError
from flowrl.records import Request, RewardBatch
from flowrl.scoring.graded import GradedRewards
from flowrl.scoring.runtime import RewardRuntime

REQUESTS = [Request(f"prompt {i}", i, 4, 4) for i in range(3)]


def entry(name: str, **more) -> RewardEntry:
    return RewardEntry(name=f"tests.training.graded:{name}", **more)


def decode(x0: torch.Tensor, request: Request) -> torch.Tensor:
    return torch.sigmoid(x0)


def latents() -> torch.Tensor:
    return torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def test_weights_shaping_and_gradient() -> None:
    red = entry("Red", weight=2.0, shaping=({"affine": [3.0, 1.0]}, {"sigmoid": [0.5, 0.2]}, {"clip": [0.0, 0.9]}))
    rewards = GradedRewards([red, entry("Flat", weight=0.5), entry("Red", label="seen", role="monitor")])
    found = rewards.grade(latents(), REQUESTS, decode, lambda score: score**2)
    x = latents().requires_grad_()
    shown = torch.sigmoid(x)
    value = (shown[:, 0] - shown[:, 1:].mean(1)).mean((1, 2))
    shaped = (1 / (1 + torch.exp(-(3 * value + 1 - 0.5) / 0.2))).clamp(0, 0.9)
    score = 2 * shaped - 0.5 * x.flatten(1).var(1)
    (score**2).sum().backward()
    torch.testing.assert_close(found.score, score.detach())
    torch.testing.assert_close(found.loss, (score**2).detach())
    torch.testing.assert_close(found.gradient, x.grad)
    assert set(found.scores) == {"Red", "Flat"} and bool(found.valid.all())
    torch.testing.assert_close(found.scores["Red"], value.detach())


@pytest.mark.parametrize("where", ["value", "gradient"])
def test_what_is_not_finite_is_masked_and_spares_the_others(where: str) -> None:
    rewards = GradedRewards([entry("Broken", args={"bad": 1, "where": where})])
    found = rewards.grade(latents(), REQUESTS, decode, lambda score: -score)
    assert found.valid.tolist() == [False, True, True]
    assert float(found.gradient[0].abs().max()) == 0 and bool(torch.isfinite(found.gradient).all())
    assert float(found.gradient[1].abs().max()) > 0


def test_latents_alone_need_no_picture() -> None:
    def refuse(*_) -> torch.Tensor:
        raise AssertionError("decoded")

    rewards = GradedRewards([entry("Flat")])
    assert not rewards.needs_pictures
    found = rewards.grade(latents(), REQUESTS, refuse, lambda score: -score)
    torch.testing.assert_close(found.score, -latents().flatten(1).var(1))


def test_the_runtime_scores_the_same_value() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with RewardRuntime([entry("Red")], Failures()) as runtime:
        scored = runtime.score(RewardBatch(images, ["a"] * 3, [{}] * 3))
    found = GradedRewards([entry("Red")]).grade(x, REQUESTS, lambda x, request: x, lambda score: score)
    np.testing.assert_allclose(scored.scores, found.score.numpy(), rtol=1e-6)


def test_refusals() -> None:
    with pytest.raises(UserError, match="reward 'compositional': it declares no gradient"):
        GradedRewards([RewardEntry(name="compositional")])
    with pytest.raises(UserError, match="shaping by rank has no gradient"):
        GradedRewards([entry("Red", shaping=({"rank": {}},))])
    with pytest.raises(UserError, match="value returned shape \\[1\\] for 3 samples"):
        GradedRewards([RewardEntry(name="tests.scoring.test_graded:Short")]).grade(
            latents(), REQUESTS, decode, lambda score: score
        )


class Short:
    name, differentiable = "short", "pictures"

    def score(self, batch):
        raise NotImplementedError

    def value(self, x, requests):
        return x.sum().reshape(1)
