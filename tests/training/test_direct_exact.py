"""Differentiable rewards with the real trainer against closed forms: T-RL1, T-RL2 and T-RL5 (flow_algorithms 2.3, 11)."""

from __future__ import annotations

import pytest
import torch

from tests.training.affine import Affine, Mixture, chain, make_trainer, moments, quadratic_optimum, wavy


def grid(steps: int) -> torch.Tensor:
    return torch.linspace(1, 0, steps + 1)


def test_adjoint_matching_reaches_the_linear_tilt() -> None:
    """T-RL1: the mean moves by b Var / lambda, the variance stays; each velocity moves by its predicted shift.

    The shift is F11's C / lambda as the step length goes to 0: tests/objectives/differentiable/test_adjoint_matching.py.
    """
    b, temperature, network = 1.3, 0.7, Affine(grid(8), 0.4, 0.8)
    trainer = make_trainer(network, "Linear", {"b": b}, **{
        "objective.name": "adjoint_matching", "direct.temperature": temperature, "iterations": 60,
        "batch.group_size": 2, "batch.micro_batch": 4,
    })  # fmt: skip
    seen = [trainer.iterate() for _ in range(60)]
    before, spread = moments(network, off=True)
    after, variance = moments(network)
    assert after - before == pytest.approx(b * spread / temperature, rel=0.005)
    assert variance == pytest.approx(spread, rel=0.01)
    steps, adjoint = chain(network, off=True), -b / temperature
    t = network.times.tolist()
    for k in range(7, 0, -1):  # step k is trained on the adjoint after it
        now, later = t[k], t[k + 1]
        slope = (1 - later) * now - (later**2 * (1 - now) ** 2 / (now * (1 - later)))
        found = float(network.shift.detach()[k])
        assert found == pytest.approx(steps[k][2] ** 2 / slope * adjoint, abs=0.01)
        adjoint *= steps[k][0]
    assert seen[-1]["policy/kl"] == pytest.approx(64 * b**2 * spread / (2 * temperature**2), rel=0.05)
    assert seen[-1]["score/mean"] > seen[0]["score/mean"]


@pytest.mark.parametrize("name", ["adjoint_matching", "ctrl"])
def test_quadratic_reward_reaches_the_optimum(name: str) -> None:
    """T-RL2 on the chain: the best means, by regression on adjoints or by gradients through the chain (CTRL, F13 18)."""
    centre, q, strength, network = 1.5, 0.5, 0.8, Affine(grid(6), -0.3, 0.9)
    trainer = make_trainer(network, "Quadratic", {"centre": centre, "q": q}, **{
        "objective.name": name, "direct.temperature": 1 / strength, "direct.strength": strength, "direct.last": 0,
        "iterations": 80, "model.train": "lora", "batch.group_size": 4, "batch.micro_batch": 8,
    })  # fmt: skip
    for _ in range(80):
        trainer.iterate()
    mean, variance = moments(network, off=True)
    best, after = quadratic_optimum(network, centre, q / strength), moments(network)
    assert after[0] == pytest.approx(best[0], abs=0.02)
    assert after[1] == pytest.approx(best[1], rel=0.02)
    assert after[0] - mean > 0.6 and after[1] < 0.8 * variance  # a long way from where it began


def test_that_optimum_is_the_exact_tilt_in_the_limit() -> None:
    """Held stds cost O(1 / T): the best chain tends to precision 1 / s^2 + gamma / q and the mean that it weighs."""
    precision = 1 / 0.81 + 1 / 0.6
    exact = ((-0.3 / 0.81 + 1.5 / 0.6) / precision, 1 / precision)
    off = []
    for steps in (100, 200, 400):
        found = quadratic_optimum(Affine(grid(steps), -0.3, 0.9), 1.5, 0.6)
        off.append([found[i] - exact[i] for i in range(2)])
    for i in range(2):
        assert abs(off[2][i]) < 0.01 and off[1][i] / off[2][i] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("name", ["adjoint_matching", "ctrl"])
def test_general_reward_on_a_mixture_reaches_the_tilted_law(name: str) -> None:
    """T-RL5: statistics of the tuned chain equal those of the pre-trained chain reweighted by exp(r / lambda)."""
    torch.manual_seed(0)
    temperature, network = 0.8, Mixture(grid(16))
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
