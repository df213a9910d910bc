"""Differentiable rewards with the real trainer: a reward that is no polynomial, on data of several modes."""

from __future__ import annotations

import pytest
import torch

from tests.training.affine import Mixture, make_trainer, wavy


@pytest.mark.parametrize("name", ["adjoint_matching", "ctrl"])
def test_general_reward_on_a_mixture_reaches_the_tilted_law(name: str) -> None:
    """T-RL5: statistics of the tuned chain equal those of the pre-trained chain reweighted by exp(r / lambda)."""
    torch.manual_seed(0)
    temperature, network = 0.8, Mixture(torch.linspace(1, 0, 17))
    iterations = 100 if name == "adjoint_matching" else 60
    trainer = make_trainer(network, "Wavy", **{
        "objective.name": name, "direct.temperature": temperature, "direct.strength": 1 / temperature, "direct.last": 0,
        "iterations": iterations, "model.train": "lora", "batch.group_size": 6,
    })  # fmt: skip
    for _ in range(iterations):
        trainer.iterate()

    def drawn(off: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        network.off = off
        x, t = torch.randn(40_000, 1, generator=generator), network.times
        with torch.no_grad():
            for k in range(len(t) - 1):
                now, after = float(t[k]), float(t[k + 1])
                v = network(x, torch.full((len(x),), now))
                rho = after * (1 - now) / (now * (1 - after))
                noise = after * (1 - rho**2) ** 0.5 * torch.randn(x.shape, generator=generator)
                x = (1 - after) * (x - now * v) + after * rho * (x + (1 - now) * v) + noise
        network.off = False
        return x.flatten()

    base, tuned = drawn(True), drawn(False)
    weight = torch.softmax(wavy(base) / temperature, 0)
    for statistic, moves in ((lambda x: x, 0.3), (wavy, 0.4), (lambda x: (x > 0.9).float(), 0.1), (torch.cos, 0.0)):
        exact = float((weight * statistic(base)).sum())
        assert abs(exact - float(statistic(base).mean())) > moves  # the tilt is large
        assert float(statistic(tuned).mean()) == pytest.approx(exact, abs=0.1 * moves + 0.025)
