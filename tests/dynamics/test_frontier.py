"""How much reward a path KL buys: the analytic frontier of a linear reward, from the real kernels (entry 30 of the bench)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import gaussian_kl
from tests.dynamics.gaussian import Gaussian, double_chain

REWARD, WEIGHT = 1.5, 0.8


def tails(factor: Tensor) -> Tensor:
    return torch.stack([factor[k + 1 :].prod() for k in range(len(factor))])


def spent(moved: Tensor, std: Tensor) -> Tensor:
    """Path KL of a chain whose means are moved by ``moved`` [T]: step KLs as the reference penalty has them, added up."""
    zero = torch.zeros_like(moved)[:, None]
    return gaussian_kl(moved[:, None], zero, std[:, None]).double().sum()


@pytest.mark.parametrize(("m", "s"), [(0.0, 1.0), (1.0, 0.5)])
def test_the_optimum_lies_on_the_frontier_of_the_data(m: float, s: float) -> None:
    """Without memory E[r] = b m + b^2 s^2 / lambda costs KL = b^2 s^2 / (2 lambda^2): the curve of the tilted data law."""
    # Starts a little below t = 1, where the memoryless g is infinite; the memory left is (1 - t) s / sqrt(D).
    times = torch.linspace(0.999, 0, 2001, dtype=torch.float64)
    factor, _, std = double_chain("memoryless", 1.0, times, Gaussian(m, s))
    gain = tails(factor)
    moved = REWARD / WEIGHT * std.square() * gain  # the best shift of each mean: b std^2 dx0/dmean / lambda
    rise, cost = REWARD * float((gain * moved).sum()), float(spent(moved[std > 0], std[std > 0]))
    assert rise == pytest.approx(REWARD**2 * s**2 / WEIGHT, rel=5e-3)
    assert cost == pytest.approx(REWARD**2 * s**2 / (2 * WEIGHT**2), rel=5e-3)
    assert cost == pytest.approx(rise**2 / (2 * REWARD**2 * s**2), rel=1e-2)


@pytest.mark.parametrize(
    ("kernel", "noise", "share"), [("flow_sde", 0.7, 0.852452), ("dance_sde", 0.3, 0.1178), ("cps", 0.8, 0.5237)]
)
def test_a_chain_with_memory_has_a_frontier_of_its_own(kernel: str, noise: float, share: float) -> None:
    """Ten steps on N(0, 1): rise b^2 V / lambda for b^2 V / (2 lambda^2), V = Var(x0 | x1) of the chain, not of the data."""
    times = torch.linspace(1, 0, 11, dtype=torch.float64)
    factor, _, std = double_chain(kernel, noise, times, Gaussian(0.0, 1.0))
    gain, live = tails(factor), std > 0
    assert float((gain * std).square().sum()) == pytest.approx(share, abs=6e-5)
    best = REWARD / WEIGHT * std.square() * gain
    rise, cost = REWARD * float((gain * best).sum()), float(spent(best[live], std[live]))
    assert rise == pytest.approx(REWARD**2 * share / WEIGHT, rel=1e-3)
    assert cost == pytest.approx(REWARD**2 * share / (2 * WEIGHT**2), rel=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):  # every other shift of the same cost buys less
        other = best + 0.3 * best.abs().mean() * torch.randn(len(best), generator=generator, dtype=torch.float64) * live
        other = other * math.sqrt(cost / float(spent(other[live], std[live])))
        assert REWARD * float((gain * other).sum()) < rise
