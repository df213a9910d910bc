"""Entropy control by a virtual target distribution: the policy's own steps, seen at another temperature.

``rewards`` float [B], ``group`` int64 [B], ``valid`` bool [B] (None for all) are those of ``estimators``, ``base`` names
the estimator of the outcome advantage as in ``weighting``. mask: bool [B, T]. Statistics are float64, results float32
without a gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .blocks import by_rows
from .inputs import check_flags, check_mask, read_steps
from .method import Method
from .moments import Reduce, batch_moments, total
from .ratios import ratio
from .record import Advantage
from .statistics import step_result
from .weighting import Base, outcome_advantage, spread_advantage


def dcpo_temperature(
    entropy: Tensor,
    mask: Tensor,
    *,
    target_entropy: float = 0.5,
    hot: float = 1.2,
    cold: float = 0.8,
    reduce: Reduce | None = None,
) -> Tensor:
    """Choose the temperature of the virtual target: ``hot`` while the mean entropy is <= the target, else ``cold``.

    entropy: float [B, T], mask: bool [B, T]; float64 scalar. Score the steps at this temperature to get the
    tempered_log_prob of ``dcpo_distribution``.
    """
    present = _mean_entropy(entropy, mask, reduce)
    return torch.where(present <= target_entropy, present.new_tensor(hot), present.new_tensor(cold))


def _mean_entropy(entropy: Tensor, mask: Tensor, reduce: Reduce | None) -> Tensor:
    check_mask(mask)
    return batch_moments(read_steps("entropy", entropy, mask, torch.float32), mask, reduce=reduce)[0]


def tempered_target(
    advantage: Tensor,
    correct: Tensor,
    old_log_prob: Tensor,
    tempered_log_prob: Tensor,
    entropy: Tensor,
    mask: Tensor,
    *,
    target_entropy: float = 0.5,
    max_gap: float = 0.1,
    reduce: Reduce | None = None,
) -> Advantage:
    """Mix the advantage with REINFORCE under a tempered target; see ``dcpo_distribution``, whose second half it is.

    advantage: float [B] or [B, T]. The rate of correct rows is taken over the rows with an unmasked step, the mean
    entropy over the unmasked steps. live: the row has an unmasked step.
    """
    start = spread_advantage(advantage, mask)
    check_flags("correct", correct, tuple(mask.shape[:1]))
    if not (math.isfinite(target_entropy) and math.isfinite(max_gap) and max_gap >= 0):
        raise ValueError(f"target_entropy, max_gap: expected finite, >= 0 for the gap, got {target_entropy}, {max_gap}")
    old = read_steps("old_log_prob", old_log_prob, mask)
    tempered = read_steps("tempered_log_prob", tempered_log_prob, mask)
    rows = mask.any(dim=1)
    number = total(torch.stack([(rows & correct).sum(), rows.sum()]).double(), reduce)
    gap = (target_entropy - _mean_entropy(entropy, mask, reduce)).abs().clamp(max=max_gap)
    # a / (1 + a) with a = gap / rate, written so that a rate of 0 gives 0
    pull = torch.where(number[0] > 0, gap * number[1] / (number[0] + gap * number[1]), 0.0)

    def mix(start: Tensor, tempered: Tensor, old: Tensor, mask: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        rho = torch.where(mask, ratio(tempered, old), 0.0)
        return (1 - pull) * start + share[:, None] * rho, rho

    mixed, rho = by_rows(mix, start, tempered, old, mask, (pull * correct).float())
    return step_result(mixed, mask, rows, channels={"tempered_ratio": rho})


def dcpo_distribution(
    rewards: Tensor,
    group: Tensor,
    correct: Tensor,
    old_log_prob: Tensor,
    tempered_log_prob: Tensor,
    entropy: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    *,
    base: Base = "grpo",
    target_entropy: float = 0.5,
    max_gap: float = 0.1,
    reduce: Reduce | None = None,
) -> Advantage:
    """Hold the entropy by a virtual tempered target: A_t = (1 - c) A + c correct rho_t.

    rho_t = exp(tempered_log_prob - old_log_prob), the ratio of the tempered policy to the one that sampled (log cut to
    +-20); c = a / (1 + a), a = min(|H0 - H|, max_gap) / (rate of correct rows), 0 where no row is correct (the released
    code divides by that rate). H: mean of ``entropy`` (float [B, T]) over the unmasked steps, H0: target_entropy.
    correct: bool [B]; the log-probs float [B, T], the tempered ones at the temperature of ``dcpo_temperature``. The
    samples themselves stay on-policy. live is that of the outcome advantage; a correct row of a group without signal
    still gets c rho. channels "tempered_ratio" is rho. A NaN reward takes its row out.

    Special cases: H = H0, or nobody correct, is the outcome advantage; temperature 1 is rho = 1. DCPO
    (distribution-centric), 2601.12730, repository 597358816/DCPO; not the DCPO of 2509.02333. On denoising steps:
    tempered_log_prob is old_log_prob + ``gaussian_tempered_log_ratio``; the entropy of a Gaussian step is fixed by the
    schedule, so ``entropy`` must be another spread (that of the group's predictions) and H0 one of its values.
    """
    outcome, kept = outcome_advantage(rewards, group, mask, valid, base)
    result = tempered_target(
        outcome.advantage,
        correct,
        old_log_prob,
        tempered_log_prob,
        entropy,
        kept,
        target_entropy=target_entropy,
        max_gap=max_gap,
        reduce=reduce,
    )
    return replace(result, live=outcome.live, group_mean=outcome.group_mean, group_std=outcome.group_std)


def gaussian_tempered_log_ratio(noise_square: Tensor, temperature: float | Tensor, *, dims: int = 1) -> Tensor:
    """Log ratio of a Gaussian step at a temperature (variance times it) to the step as it is, at the drawn point.

    log rho = dims (-log(tau) / 2 + n (1 - 1 / tau) / 2). noise_square: float, n, the mean over the latent dimensions of
    the squared standard noise that was drawn; dims: their number for the joint ratio, 1 for the mean a dimension, which
    trainers that average log-probs use. float32, in the shape of noise_square. tau = 1 is 0, and rho has mean 1 under
    the step for tau < 2. Exact for Gaussians; that it stands for the tempered policy of 2601.12730 is reconstructed.
    """
    tau = torch.as_tensor(temperature, dtype=torch.float64, device=noise_square.device)
    if not bool(((tau > 0) & tau.isfinite()).all()) or dims < 1:
        raise ValueError(f"temperature, dims: expected > 0 and >= 1, got {temperature}, {dims}")
    return (0.5 * dims * (noise_square.detach().double() * (1 - 1 / tau) - tau.log())).float()


_TESTS = "tests/advantage/test_tempered.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="dcpo_distribution",
        kind="estimator",
        paper_id="2601.12730",
        title="DCPO (distribution-centric): advantage mixed with a virtual tempered target",
        tier=2,
        evidence={
            "formula": _TESTS + "test_dcpo_against_a_plain_loop",
            "identity": _TESTS + "test_dcpo_special_cases",
            "exact": _TESTS + "test_gaussian_tempered_log_ratio_is_that_of_the_densities",
        },
        call=dcpo_distribution,
        exempt={
            "isolation": "the rate of correct rows and the mean entropy are those of the batch",
            "constant": "correct rows get a term of the tempered target in any group",
            "scale": "the term of the tempered target keeps its size",
        },
    ),
)
