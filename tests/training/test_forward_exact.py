"""Objectives on re-noised samples with the real trainer against closed forms: T-RL1, T-RL2 and F11's shifts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tests.training.affine import Affine
from tests.training.forward_tools import drawn_moments, toy_trainer

B, GROUP, ITERATIONS = 0.7, 64, 40
FROZEN = {"forward.old_rate": 1e6, "forward.old_limit": 1 - 1e-9}
"""The old policy keeps to its start, so that a method's single regression is seen, not its iteration."""
HELD = {"objective.kl.form": "velocity", "objective.kl.weight": 2.0}


def run(name: str, reward, **changes: object) -> Affine:
    trainer, network = toy_trainer(name, reward, **({"iterations": ITERATIONS} | changes))
    for _ in range(trainer.config.iterations):
        trainer.iterate()
    return network


def covariance(network: Affine) -> torch.Tensor:
    """Cov(A, u | x) at each step for A = B (x0 - mean of the group): -B s^2 t / D, with the variance that is drawn."""
    t = network.times[:-1].double()
    k = (t - (1 - t) * 0.64) / ((1 - t) ** 2 * 0.64 + t**2)
    return -B * drawn_moments(network)[1] * (1 + k * (1 - t)) * (1 - 1 / GROUP)


def run_shift(name: str, **changes: object) -> Affine:
    """Without the tilt: under a linear reward the optimum has none, and a shift alone is learned with less noise."""
    trainer, network = toy_trainer(name, lambda x0: B * x0, **({"iterations": ITERATIONS} | changes))
    network.tilt.data.zero_()
    for _ in range(trainer.config.iterations):
        trainer.iterate()
        network.tilt.data.zero_()
    return network


@pytest.mark.parametrize(
    ("name", "changes", "factor"),
    [
        ("awm", HELD, 1 / 2.0),
        ("nft", HELD | {"objective.loss_options": {"space": "output"}}, 1 / 2.0),
        ("ram", {"objective.loss_options": {"temperature": 1.5}}, 1 / 1.5),
        ("nft", {**FROZEN, "objective.loss_options": {"space": "output", "beta": 0.5, "limit": 4.0}}, 1 / (0.5 * 4.0)),
        ("orw", {**FROZEN, "objective.loss_options": {"temperature": 1.5}}, 1 / 1.5),
    ],
    ids=["awm", "nft", "ram", "nft-one-regression", "orw-one-regression"],
)  # fmt: skip
def test_linear_reward_moves_each_velocity_by_its_share_of_the_covariance(
    name: str, changes: dict, factor: float
) -> None:
    """T-RL1 with F11's shift: C / lambda (awm and nft hold themselves by a velocity penalty of weight lambda, ram has its
    temperature), C / (beta limit) of one nft regression, C / temperature of one orw regression."""
    network = run_shift(name, **changes)
    predicted = factor * covariance(network)
    found = network.shift.detach().double()
    assert float((found - predicted).abs().max()) < 0.2 * float(predicted.abs().max())
    assert float((found @ predicted) / (predicted @ predicted)) == pytest.approx(1.0, abs=0.08)
    assert float(torch.nn.functional.cosine_similarity(found, predicted, dim=0)) > 0.985
    if (name, changes) == ("awm", HELD):
        on_the_frontier(network, found, predicted)


def on_the_frontier(network: Affine, found: torch.Tensor, predicted: torch.Tensor) -> None:
    """F13 30, A12: with lambda 2 the reward gains b^2 s^2 / lambda, which costs gain^2 / (2 b^2 s^2) nats."""
    variance = drawn_moments(network)[1]
    gain, expected = (B * moved(network, shift) for shift in (found, predicted))
    assert gain == pytest.approx(expected, rel=0.12)
    assert gain == pytest.approx(B**2 * variance / 2, rel=0.25)  # eight Euler steps


def moved(network: Affine, shift: torch.Tensor) -> float:
    """How far a shift of each velocity moves the mean of x0, by Euler steps."""
    t, mean = network.times.double(), 0.0
    for step, (now, after) in enumerate(pairwise(t)):
        k = float(network.exact(torch.ones(()).double(), now) - network.exact(torch.zeros(()).double(), now))
        mean = mean * (1 - float(now - after) * k) - float(now - after) * float(shift[step])
    return mean


AC_FLOW = {
    "objective.loss_options": {"weighting": "exponential", "temperature": 1 / 1.5, "alpha": 0.0},
    "actor_critic.scale": "none", "actor_critic.advantage_limit": 0.0, "actor_critic.reward_limit": 0.0,
    "critic.closed": "outcome", "critic.warmup": 999, "critic.width": 4, "critic.blocks": 1, "critic.steps": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "share"),
    [("orw", {"objective.loss_options": {"temperature": 1.5}}, 1 - 1 / GROUP), ("ac_flow", AC_FLOW, 1.0)],
    ids=["orw", "ac_flow"],
)
def test_exponential_weights_reach_the_quadratic_tilt(name: str, changes: dict, share: float) -> None:
    """T-RL2 by one regression: precision 1 / s^2 + 1 / (tau q), means by precision; both parts of the velocity move.

    orw sees its own reward in the group's mean, hence the share; ac_flow takes the reward as it is, without a critic.
    """
    centre, q, tau = 1.2, 0.8, 1.5
    network = run(name, lambda x0: -((x0 - centre) ** 2) / (2 * q), iterations=60, **(FROZEN | changes))
    mean, variance = drawn_moments(network)
    added = share / (tau * q)
    precision = 1 / variance + added
    m, s2 = (mean / variance + centre * added) / precision, 1 / precision
    t = network.times[:-1].double()
    k = (t - (1 - t) * s2) / ((1 - t) ** 2 * s2 + t**2)
    middle, width = (1 - t) * m, ((1 - t) ** 2 * s2 + t**2).sqrt()
    began = 0.0
    for away in (-1.0, 1.0):
        x = middle + away * width
        best = -m + k * (x - middle)
        base = network.exact(x, t)
        found = base + (network.shift.double() + network.tilt.double() * x).detach()
        assert float((found - best).abs().max()) < 0.12
        began = max(began, float((base - best).abs().max()))
    assert began > 0.5  # a long way from where it began


def test_no_reward_no_gradient() -> None:
    """A constant reward: awm, dgpo and pairs make no update at all, the others none at the old policy."""
    for name in ("awm", "dgpo", "dpo_online", "nft", "crd", "ram"):
        trainer, network = toy_trainer(name, lambda x0: torch.zeros_like(x0), iterations=1)
        norms: list[float] = []
        step = trainer._step
        trainer._step = lambda norms=norms, step=step: norms.append(step()) or norms[-1]
        trainer.iterate()
        assert norms == [] or norms == [pytest.approx(0.0, abs=1e-5)], name
        assert math.isclose(float(network.shift.detach().abs().max()), 0.0, abs_tol=1e-6) or norms, name


def test_the_trainer_draws_with_the_old_policy() -> None:
    """sampler old: the rollout is the copy's; live: it is that of the trained weights. The copy follows by its decay."""
    for sampler, expected in (("old", 0.0), ("live", 5.0)):
        trainer, network = toy_trainer("nft", lambda x0: x0, iterations=3, **{**FROZEN, "forward.sampler": sampler})
        network.shift.data.fill_(5.0)
        seen: list[float] = []
        collect = trainer.collector.collect
        trainer.collector.collect = lambda *a, seen=seen, n=network, c=collect: seen.append(float(n.shift[0])) or c(*a)
        trainer._collect()
        assert seen == [expected] and float(network.shift[0]) == 5.0


def test_decay_of_the_old_policy() -> None:
    """min(rate (updates - delay), limit), at least 0; the copy is decay old + (1 - decay) new."""
    trainer, network = toy_trainer(
        "nft", lambda x0: x0, **{"forward.old_rate": 0.1, "forward.old_limit": 0.5, "forward.old_delay": 2}
    )
    old = trainer.learner.old
    assert [old.decay(n) for n in (0, 2, 3, 5, 9)] == pytest.approx([0.0, 0.0, 0.1, 0.3, 0.5])
    network.shift.data.fill_(1.0)
    old.follow(5)
    assert old.values[0][0].item() == pytest.approx(0.7)
