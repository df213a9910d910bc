"""What GRPO-Guard claims, as statements on many samples: no bias, symmetric clipping, an exact mean of the ratio."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowrl.advantage import policy_loss
from flowrl.dynamics import log_prob
from flowrl.objectives.ratios import RatioForm, log_ratio_pair, mean_bias
from flowrl.records import LogProbReduction

ROWS, DIMS, STD = 60_000, 16, 0.27


def off_policy(shift: float, form: RatioForm, reduction: LogProbReduction) -> tuple[Tensor, Tensor, Tensor]:
    """(now, old, KL) of samples whose means have moved by ``shift`` in a direction of their own in every element."""
    g = torch.Generator().manual_seed(7)
    old_mean = torch.randn(ROWS, DIMS, generator=g)
    mean = old_mean + shift * torch.randn(ROWS, DIMS, generator=g).sign()
    std = torch.full((ROWS, 1), STD)
    x_next = old_mean + std * torch.randn(ROWS, DIMS, generator=g)
    bias = mean_bias(mean, old_mean, std, reduction)
    now, old = log_prob(x_next, mean, std, reduction), log_prob(x_next, old_mean, std, reduction)
    return (*log_ratio_pair(form, now, old, std, bias), bias)


@pytest.mark.parametrize("reduction", ["sum", "mean", "sqrt"])
def test_log_ratio_has_mean_zero_where_the_plain_one_has_minus_kl(reduction: LogProbReduction) -> None:
    shift = 0.1
    for form, scale in (("plain", None), ("debiased", 1.0), ("normalised", STD)):
        now, old, kl = off_policy(shift, form, reduction)  # type: ignore[arg-type]
        d = (now - old).double()
        error = d.std().item() / math.sqrt(ROWS)
        if scale is None:
            assert abs(d.mean().item() + kl.mean().item()) < 4 * error
            assert kl.mean().item() > 40 * error, "the case must tell -KL from 0"
        else:
            assert abs(d.mean().item()) < 4 * error
            # The spread is |shift| reduced, over std unless it is multiplied back: not of unit variance.
            share = {"sum": math.sqrt(DIMS), "mean": 1 / math.sqrt(DIMS), "sqrt": 1.0}[reduction]
            assert d.std().item() == pytest.approx(scale * shift * share / STD, rel=0.02)


def test_mean_of_the_normalised_ratio_is_above_one_off_policy() -> None:
    shift = 2.0
    now, old, _ = off_policy(shift, "normalised", "mean")
    rho = (now - old).double().exp()
    expected = math.exp(shift**2 * DIMS / 2 / DIMS**2)
    assert abs(rho.mean().item() - expected) < 4 * rho.std().item() / math.sqrt(ROWS)
    assert expected > 1.1


@pytest.mark.parametrize(("form", "symmetric"), [("plain", False), ("debiased", True), ("normalised", True)])
def test_clip_fractions_of_good_and_bad_samples(form: RatioForm, symmetric: bool) -> None:
    shift = 0.1
    now, old, _ = off_policy(shift, form, "mean")
    spread = shift / math.sqrt(DIMS) * (1.0 if form == "normalised" else 1 / STD)
    advantage = torch.where(torch.arange(ROWS) % 2 == 0, 1.0, -1.0)
    inputs = {
        "log_prob": now[:, None],
        "old_log_prob": old[:, None],
        "advantage": advantage[:, None],
        "mask": torch.ones(ROWS, 1, dtype=torch.bool),
    }
    # Bounds at 0.7 spreads, in the log on both sides: 1 - c and 1 + c are not symmetric there.
    made = policy_loss("ppo", inputs, {"low": 1 - math.exp(-0.7 * spread), "high": math.exp(0.7 * spread) - 1})
    high = made.high[advantage > 0].float().mean().item()
    low = made.low[advantage < 0].float().mean().item()
    tail = 0.5 * math.erfc(0.7 / math.sqrt(2))
    error = math.sqrt(2 * tail * (1 - tail) / (ROWS / 2))
    if symmetric:
        assert abs(high - low) < 4 * error
        assert high == pytest.approx(tail, abs=4 * error)
    else:
        assert low - high > 20 * error, "the plain ratio is biased below 1, so the upper bound fires too seldom"
