"""AC-Flow's pure parts on Gaussian data: pointwise optima by quadrature, through the gradient of the real loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowrl.objectives.actor_critic import (
    ac_flow,
    ac_flow_loss,
    centred_advantage,
    critic_advantage,
    critic_weight,
    shaped_reward,
)
from flowrl.objectives.forward import mean_square, orw

M, S, B = 1.0, 0.5, 0.8
ONE = torch.zeros(1, 1)


def posterior(x: float, t: float, nodes: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x0, u, probability) of x0 given x_t on N(M, S^2), by Gauss-Hermite quadrature, float64."""
    d = (1 - t) ** 2 * S**2 + t**2
    mean = M + S**2 * (1 - t) / d * (x - (1 - t) * M)
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    x0 = mean + math.sqrt(S**2 * t**2 / d) * torch.from_numpy(z)
    return x0, (x - x0) / t, torch.from_numpy(w / w.sum())


def optimum(
    weight: torch.Tensor, u: torch.Tensor, p: torch.Tensor, alpha: float, v_ref: float, regulariser: str = "fixed"
) -> float:
    """The velocity at which the gradient of the real loss, averaged over the posterior, is 0 (it is linear in v)."""

    def slope(v: float) -> float:
        velocity = torch.full((len(u), 1), v, requires_grad=True)
        reference = torch.full((len(u), 1), v_ref)
        loss = ac_flow_loss(velocity, u[:, None], weight, reference, alpha=alpha, regulariser=regulariser)
        (p * loss).sum().backward()
        return float(velocity.grad.double().sum())

    at_zero, at_one = slope(0.0), slope(1.0)
    return -at_zero / (at_one - at_zero)


def base_velocity(x: float, t: float) -> float:
    _, u, p = posterior(x, t)
    return float((p * u).sum())


POINTS = [(0.3, 0.2), (-0.5, 0.5), (1.4, 0.8)]


@pytest.mark.parametrize(("x", "t"), POINTS)
def test_linear_weights_reach_the_tilt_of_their_temperature(x: float, t: float) -> None:
    """Linear: shift tau Cov(r, u | x_t) / (1 + alpha), the exact tilt of lambda = (1 + alpha) / tau, whatever the baseline
    where alpha is 0, and with the best baseline E[r | x_t] where it is not."""
    x0, u, p = posterior(x, t)
    reward = B * x0
    d = (1 - t) ** 2 * S**2 + t**2
    v_ref = base_velocity(x, t)
    value = (p * reward).sum().expand_as(reward)
    for alpha, tau in ((0.0, 0.3), (1.0, 0.3), (0.5, 0.05)):
        a = critic_advantage(reward, value, limit=0.0)
        found = optimum(critic_weight(a, value, weighting="linear", temperature=tau), u, p, alpha, v_ref)
        tilt = -(B * S**2 / ((1 + alpha) / tau)) * t / d
        assert found - v_ref == pytest.approx(tilt, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("x", "t"), POINTS)
def test_exponential_weights_reach_the_tilt_exactly_without_alpha(x: float, t: float) -> None:
    """e^(tau r) on Gaussian data with a linear reward: T-RL1 with lambda = 1 / tau, not to first order only."""
    x0, u, p = posterior(x, t)
    tau, d = 1.5, (1 - t) ** 2 * S**2 + t**2
    a = critic_advantage(B * x0, torch.zeros_like(x0), limit=0.0)
    found = optimum(critic_weight(a, a, temperature=tau), u, p, 0.0, base_velocity(x, t))
    assert found - base_velocity(x, t) == pytest.approx(-tau * B * S**2 * t / d, rel=1e-4)


@pytest.mark.parametrize(("x", "t"), POINTS)
def test_pointwise_optimum_is_invariant_to_the_critic(x: float, t: float) -> None:
    """alpha 0, no clip: any V(x_t, t) gives the same optimum, exponential or linear; the clip breaks it."""
    x0, u, p = posterior(x, t)
    v_ref = base_velocity(x, t)
    for weighting, tau in (("exponential", 1.0), ("linear", 0.1)):
        found = []
        for constant in (0.0, 0.7, -1.3):
            value = torch.full_like(x0, constant)
            a = critic_advantage(B * x0, value, limit=0.0)
            w = critic_weight(a, value, weighting=weighting, temperature=tau)
            found.append(optimum(w, u, p, 0.0, v_ref))
        spread = max(found) - min(found)
        shift = abs(found[0] - v_ref)
        if weighting == "exponential":
            assert spread < 1e-5 * max(1, abs(v_ref)) and shift > 1e-2
        else:  # 1 + tau (r - V) has mean 1 + tau E[r - V], which divides the shift
            mean = float((p * B * x0).sum())
            scaled = [(v - v_ref) * (1 + tau * (mean - c)) for v, c in zip(found, (0.0, 0.7, -1.3), strict=True)]
            assert max(scaled) - min(scaled) < 1e-5
    clipped = critic_advantage(B * x0, torch.zeros_like(x0), limit=0.1)
    other = optimum(critic_weight(clipped, clipped), u, p, 0.0, v_ref)
    assert abs(other - v_ref) < abs(-B * S**2 * t / ((1 - t) ** 2 * S**2 + t**2))


@pytest.mark.parametrize(("x", "t"), POINTS)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_critic_only_moves_no_optimum(x: float, t: float, alpha: float) -> None:
    x0, u, p = posterior(x, t)
    value = torch.full_like(x0, 0.9)
    w = critic_weight(critic_advantage(B * x0, value), value, weighting="critic_only", temperature=2.0)
    assert float(w[0]) == pytest.approx(math.exp(1.8))
    assert optimum(w, u, p, alpha, base_velocity(x, t)) == pytest.approx(base_velocity(x, t), abs=1e-5)


@pytest.mark.parametrize(("x", "t"), POINTS)
def test_a_constant_critic_is_orw(x: float, t: float) -> None:
    """ORW(alpha) = AC(alpha e^(-tau V)) for V constant: weights e^(tau r) against e^(tau (r - V))."""
    x0, u, p = posterior(x, t)
    tau, constant, alpha, v_ref = 0.7, 1.2, 0.4, base_velocity(x, t) + 0.3
    of_orw = (tau * B * x0).exp().float()
    value = torch.full_like(x0, constant)
    ac = critic_weight(critic_advantage(B * x0, value, limit=0.0), value, temperature=tau)
    torch.testing.assert_close(ac, of_orw * math.exp(-tau * constant))
    found = optimum(ac, u, p, alpha * math.exp(-tau * constant), v_ref)
    assert found == pytest.approx(optimum(of_orw, u, p, alpha, v_ref), abs=1e-5)
    velocity = torch.linspace(-1, 1, len(u))[:, None]
    loss = ac_flow(velocity, u[:, None].float(), velocity, (B * x0).float(), temperature=tau, alpha=0.0)
    error = mean_square(velocity - u[:, None].float())
    torch.testing.assert_close(loss, orw(error, (B * x0).float(), temperature=1 / tau))


@pytest.mark.parametrize(("x", "t"), POINTS)
def test_adaptive_regulariser_shifts_by_the_covariance_over_alpha_for_any_critic(x: float, t: float) -> None:
    x0, u, p = posterior(x, t)
    alpha, tau, v_ref, d = 2.0, 0.3, base_velocity(x, t), (1 - t) ** 2 * S**2 + t**2
    for constant in (0.0, 1.0):
        a = critic_advantage(B * x0, torch.full_like(x0, constant), limit=0.0)
        w = critic_weight(a, a, weighting="linear", temperature=tau)
        found = optimum(w, u, p, alpha, v_ref, "adaptive")
        assert found - v_ref == pytest.approx(-tau * B * S**2 * t / d / alpha, rel=2e-3, abs=1e-5)


def test_large_alpha_freezes_and_the_bound_holds() -> None:
    """alpha -> infinity leaves the reference; a mean shift delta of N(0, s^2) has int ||dv||^2 dt = pi delta^2 / (4 s)."""
    x0, u, p = posterior(0.3, 0.5)
    w = critic_weight(B * x0, x0)
    assert optimum(w, u, p, 1e6, 0.123) == pytest.approx(0.123, abs=1e-4)
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for s in (0.5, 1.0):
        d = (1 - t) ** 2 * s**2 + t**2
        assert float(torch.trapezoid((t / d) ** 2, t)) == pytest.approx(math.pi / (4 * s), rel=1e-6)


def test_loss_and_weights_against_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    v, u, ref = (torch.randn(5, 2, 3, generator=generator) for _ in range(3))
    reward, value = torch.randn(5, generator=generator), torch.randn(5, generator=generator)
    a = critic_advantage(reward, value, limit=0.5)
    w = critic_weight(a, value, temperature=1.7)
    loss = ac_flow_loss(v, u, w, ref, alpha=0.3)
    for i in range(5):
        expected = math.exp(1.7 * max(-0.5, min(0.5, float(reward[i] - value[i]))))
        fit = sum((a - b) ** 2 for a, b in zip(v[i].flatten().tolist(), u[i].flatten().tolist(), strict=True)) / 6
        away = sum((a - b) ** 2 for a, b in zip(v[i].flatten().tolist(), ref[i].flatten().tolist(), strict=True)) / 6
        assert float(w[i]) == pytest.approx(expected, rel=1e-5)
        assert float(loss[i]) == pytest.approx(expected * fit + 0.3 * away, rel=1e-5)
    total = float((1.7 * a.double()).exp().sum())
    centred = critic_weight(centred_advantage(a, total, 5, 1.7), value, temperature=1.7)
    torch.testing.assert_close(centred, w / w.mean())
    torch.testing.assert_close(ac_flow(v, u, ref, a, temperature=1.7, alpha=0.3), loss)


def test_shaped_rewards_by_hand() -> None:
    reward = torch.tensor([1.0, 3.0, 5.0, 5.0, torch.nan, 100.0])
    group = torch.tensor([7, 7, 2, 2, 7, 9])
    found = shaped_reward(reward, group, eps=0.0)
    assert found[:4].tolist() == [-1.0, 1.0, 0.0, 0.0] and found[4].isnan() and float(found[5]) == 0.0
    running = shaped_reward(reward, group, scale=(1.0, 2.0), eps=0.0, limit=3.0)
    assert running[[0, 1, 2, 5]].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: critic_weight(torch.zeros(2), torch.zeros(2), weighting="square"), "weighting: expected exponential"),
        (lambda: centred_advantage(torch.zeros(2), math.inf, 2, 1.0), "weights: their mean is inf"),
        (lambda: ac_flow_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), alpha=0.1), "alpha: 0.1 needs"),
        (lambda: ac_flow_loss(ONE, ONE, torch.ones(1), regulariser="adaptive"), "adaptive regulariser"),
        (lambda: critic_advantage(torch.zeros(1), torch.zeros(1), limit=-1.0), "limit: expected a number >= 0"),
        (lambda: shaped_reward(torch.zeros(1), torch.zeros(1, dtype=torch.int64), limit=-1.0), "limit, eps"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
