"""Fixed points of losses on single re-noised samples, by quadrature over what could have led to one point."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from flowrl.objectives.forward import awm, matching_error, nft, optimality, orw, ram, self_normalised, x0_scale
from flowrl.objectives.surrogates import surrogate_loss

M, S, T, X, B = 0.4, 0.8, 0.6, 0.3, 0.7  # data N(M, S^2), a point X at time T, reward B x0
D = (1 - T) ** 2 * S**2 + T**2


def posterior(reward: Callable[[torch.Tensor], torch.Tensor], tilt: float = 0.0) -> tuple[torch.Tensor, ...]:
    """(weights, targets u, rewards) of 80 nodes of x0 given X, float64; under data shifted by ``tilt`` S^2."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    mean = M + tilt * S**2
    centre = mean + S**2 * (1 - T) / D * (X - (1 - T) * mean)
    x0 = torch.from_numpy(centre + nodes * S * T / D**0.5)
    return torch.from_numpy(weights / weights.sum()), (X - x0) / T, reward(x0)


def linear(x0: torch.Tensor) -> torch.Tensor:
    return B * x0


def wavy(x0: torch.Tensor) -> torch.Tensor:
    return torch.sin(2 * x0) + 0.4 * x0**2 / (1 + x0**2)


def expectation(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (w * x).sum()


def covariance(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return expectation(w, a * b) - expectation(w, a) * expectation(w, b)


def slope(w: torch.Tensor, at: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Derivative of the expected loss by one network output that all nodes share."""
    v = at.detach().clone().double().requires_grad_()
    (w * loss(v.expand(len(w))[:, None])).sum().backward()
    return float(v.grad)


C = -B * S**2 * T / D
"""Cov(r, u | x) of the toy: flow_algorithms 2.3, T-RL1."""


def test_the_toys_covariance() -> None:
    w, u, r = posterior(linear)
    assert float(covariance(w, r, u)) == pytest.approx(C, rel=1e-12)
    v = expectation(w, u)
    assert float(v) == pytest.approx(-M + (T - (1 - T) * S**2) / D * (X - (1 - T) * M), rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("reward", [linear, wavy])
def test_nft_optimum_is_the_old_policy_plus_two_over_beta_covariances(beta: float, reward: Callable) -> None:
    """F10.4: old + (2 / beta) Cov(r, u | x), any reward; with optimality 1/2 + A / (2 limit)."""
    w, u, a = posterior(reward)
    old, limit = expectation(w, u), 50.0
    best = old + covariance(w, a, u) / (beta * limit)
    r = optimality(a, limit)
    assert float(best) == pytest.approx(float(old + 2 / beta * covariance(w, r, u)), rel=1e-12)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return nft(v, u[:, None], old.expand_as(v), a, torch.ones(80), beta=beta, limit=limit, space="output")

    assert slope(w, best, loss) == pytest.approx(0.0, abs=1e-5)  # the loss works in float32
    assert abs(slope(w, best + 0.1, loss)) > 0.1 * limit * beta


def test_nft_has_no_gradient_without_a_preference() -> None:
    """Optimality 1/2 at the old policy: both implicit policies pull alike, in either space."""
    torch.manual_seed(0)
    value, target = torch.randn(5, 3), torch.randn(5, 3)
    for space in ("x0", "output"):
        v = value.clone().requires_grad_()
        nft(v, target, value, torch.zeros(5), torch.full((5,), 0.4), space=space).sum().backward()
        assert float(v.grad.abs().max()) < 1e-5
    assert optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 9.0]), 5.0).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]


def test_nft_in_the_space_of_public_code() -> None:
    """Independent transcription: x0 = x - t v, squared error over its detached mean size, times limit / beta."""
    torch.manual_seed(1)
    x0, x1, t = torch.randn(4, 6).double(), torch.randn(4, 6).double(), torch.tensor([0.1, 0.4, 0.7, 1.0]).double()
    old, advantage, beta, limit = torch.randn(4, 6).double(), torch.tensor([-7.0, -1.0, 2.0, 4.0]), 0.3, 5.0
    x = (1 - t)[:, None] * x0 + t[:, None] * x1
    value = torch.randn(4, 6).double().requires_grad_()
    found = nft(value, (x1 - x0), old, advantage, t, beta=beta, limit=limit)
    expected = []
    for i in range(4):
        clean_up = x[i] - t[i] * (beta * value[i] + (1 - beta) * old[i])
        clean_down = x[i] - t[i] * ((1 + beta) * old[i] - beta * value[i])
        good = ((clean_up - x0[i]) ** 2).mean() / (clean_up - x0[i]).abs().mean().detach()
        bad = ((clean_down - x0[i]) ** 2).mean() / (clean_down - x0[i]).abs().mean().detach()
        r = min(max(0.5 + float(advantage[i]) / 10, 0.0), 1.0)
        expected.append(limit / beta * (r * good + (1 - r) * bad))
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    (one,) = torch.autograd.grad(found.sum(), value, retain_graph=True)
    (two,) = torch.autograd.grad(torch.stack(expected).sum(), value)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_orw_is_the_tilt_for_any_reward(temperature: float) -> None:
    """T-RL5: exp(r / temperature) regresses on the tilted posterior's mean, the integral of tilted covariances."""
    w, u, r = posterior(wavy)
    grid, weights = np.polynomial.legendre.leggauss(20)
    total = torch.zeros((), dtype=torch.float64)
    for kappa, share in zip((grid + 1) / 2, weights / 2, strict=True):
        tilted = w * torch.exp(kappa * r / temperature)
        total = total + share * covariance(tilted / tilted.sum(), r, u)
    best = expectation(w, u) + total / temperature

    def loss(v: torch.Tensor) -> torch.Tensor:
        return orw((v - u[:, None]).square().mean(1), r, temperature=temperature)

    assert slope(w, best, loss) == pytest.approx(0.0, abs=1e-9)


def test_orw_of_a_linear_reward_moves_by_the_covariance_over_temperature() -> None:
    """T-RL1; with the Wasserstein weight a it is (E[w u] + a v_ref) / (E[w] + a)."""
    w, u, r = posterior(linear)
    old, tau = expectation(w, u), 0.9

    def loss(v: torch.Tensor, a: float = 0.0) -> torch.Tensor:
        return orw((v - u[:, None]).square().mean(1), r, temperature=tau) + a * (v - old).square().mean(1)

    assert slope(w, old + C / tau, loss) == pytest.approx(0.0, abs=1e-9)
    weight = torch.exp(r / tau)
    best = (expectation(w, weight * u) + 0.7 * old) / (expectation(w, weight) + 0.7)
    assert slope(w, best, lambda v: loss(v, 0.7)) == pytest.approx(0.0, abs=1e-9)
    clipped = orw(torch.ones(3), torch.tensor([-9.0, 0.5, 9.0]), temperature=1.0, limit=2.0)
    torch.testing.assert_close(clipped, torch.tensor([-2.0, 0.5, 2.0]).exp())


def test_ram_fixed_point_is_the_tilted_velocity() -> None:
    """T-RL1 with samples of the tilted policy itself; a constant in the reward does not matter, as E[u - v] = 0."""
    tau = 0.8
    w, u, r = posterior(linear, tilt=B / tau)
    reference = expectation(posterior(linear)[0], posterior(linear)[1])
    best = expectation(w, u)
    assert float(best) == pytest.approx(float(reference) + C / tau, rel=1e-12)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return ram(v, u[:, None], reference.expand_as(v), r + 3.0, temperature=tau)

    assert slope(w, best, loss) == pytest.approx(0.0, abs=1e-5)
    still = ram(torch.ones(2, 3), torch.randn(2, 3), torch.ones(2, 3), torch.zeros(2))
    assert still.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", ["", "ppo", "bgpo"])
def test_awm_on_policy_gradient_is_the_covariance(loss: str) -> None:
    """dE[A e]/dv = -2 Cov(A, u | x) at the policy that drew the samples; the ratio forms begin with the same gradient."""
    w, u, a = posterior(wavy)
    old = expectation(w, u)
    before = (old - u).square()

    def value(v: torch.Tensor) -> torch.Tensor:
        error = (v - u[:, None]).square().mean(1)
        if not loss:
            return awm(error, a)
        mask = torch.ones(80, 1, dtype=torch.bool)
        inputs = {"log_prob": -error[:, None], "old_log_prob": -before[:, None], "advantage": a[:, None], "mask": mask}
        return surrogate_loss(loss, inputs, {"low": 0.2} if loss == "ppo" else {}).loss[:, 0]

    assert slope(w, old, value) == pytest.approx(-2 * float(covariance(w, a, u)), abs=1e-5)


def test_error_weights() -> None:
    """Each against its definition; the clean estimate's error is the squared distance of the estimates."""
    torch.manual_seed(2)
    d, t = torch.randn(3, 4), torch.tensor([0.2, 0.5, 0.9])
    square = d.square().mean(1)
    for weight, factor in {"uniform": torch.ones(3), "t": t, "t2": t**2, "elbo": (1 - t) / t, "x0": t**2}.items():
        torch.testing.assert_close(matching_error(d, t, t, weight), factor * square)
    torch.testing.assert_close(matching_error(d, t, t, "self"), t * square / d.abs().mean(1))
    assert self_normalised(torch.zeros(1, 4), t[:1]).tolist() == [0.0]
    assert x0_scale("epsilon", torch.tensor([0.5]), torch.tensor([0.2])).tolist() == pytest.approx([0.4])
    with pytest.raises(ValueError, match="weight"):
        matching_error(d, t, t, "nothing")


def test_the_elbo_weight_is_the_divergence_of_a_mean_shift() -> None:
    """F13 9: the integral of (1 - t) / t (delta t / D)^2 is delta^2 / (2 s^2), the divergence of the shift."""
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    shift = 0.3 * t / ((1 - t) ** 2 * S**2 + t**2)
    error = matching_error(shift[:, None], t, t, "elbo")
    assert float(error.mean()) == pytest.approx(0.09 / (2 * S**2), rel=1e-4)
