"""Differentiable rewards with the real trainer against closed forms: linear and quadratic tilts."""

from __future__ import annotations

import pytest
import torch

from tests.training.affine import Affine, chain, make_trainer, moments, quadratic_optimum


def grid(steps: int) -> torch.Tensor:
    return torch.linspace(1, 0, steps + 1)


def test_ctrl_reaches_the_linear_tilt() -> None:
    """T-RL1 by gradients through the chain: the mean moves by gamma b Var, the variance stays."""
    b, strength, network = 1.3, 0.6, Affine(grid(8), 0.4, 0.8)
    trainer = make_trainer(network, "Linear", {"b": b}, **{
        "objective.name": "ctrl", "direct.strength": strength, "direct.last": 0, "model.train": "lora", "iterations": 80,
        "batch.group_size": 4, "batch.micro_batch": 8,
    })  # fmt: skip
    for _ in range(80):
        trainer.iterate()
    (before, spread), (after, variance) = moments(network, off=True), moments(network)
    assert after - before == pytest.approx(strength * b * spread, rel=0.02)
    assert variance == pytest.approx(spread, rel=0.02)


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
    # Adjoints of an affine chain and a linear reward are constants, so the regression can be done to the end.
    assert seen[0]["direct/control_error"] == pytest.approx(1) and seen[-1]["direct/control_error"] < 1e-3
    asked, adjoint = 0.0, b / temperature
    for k in range(7, 0, -1):
        adjoint *= steps[k][0]  # of the state before step k, which step k - 1 is trained on
        asked += (steps[k - 1][2] * adjoint) ** 2 / 7
    assert seen[0]["direct/control_asked"] == pytest.approx(asked, rel=1e-3)


@pytest.mark.parametrize(("end", "warned"), [(2e-4, True), (0.125, False)])
def test_a_step_that_draws_hardly_any_noise_is_named(
    end: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A grid whose last time but one is close to 0, as stock schedulers end: memoryless noise cannot stay in such a sample."""
    times = torch.cat([torch.linspace(1, 0.2, 5), torch.tensor([end, 0.0])])
    trainer = make_trainer(Affine(times, 0.4, 0.8), "Linear", {"b": 1.0}, **{
        "objective.name": "adjoint_matching", "iterations": 2, "batch.group_size": 2, "batch.micro_batch": 2,
    })  # fmt: skip
    for _ in range(2):
        trainer.iterate()
    found = [r.message for r in caplog.records if "draws noise of std" in r.message]
    assert len(found) == warned and all("step 4" in message and "flow_sde" in message for message in found)


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
