"""Policy losses that weigh a step's log-prob, or gate its ratio, where PPO clips; and the step size of VCPO.

Every loss takes ``log_prob`` (carries the gradient), ``old_log_prob`` and ``mask`` (bool), each [B, T], and
``advantage`` ([B, T] or [B], no gradient), and returns a ``PolicyLoss``: float32 or wider [B, T], to be minimised, 0 on
masked steps whatever they hold. d = clamp(log_prob - old_log_prob, -20, 20), rho = exp(d), sg stops the gradient. The
coefficient of a method is c in dL/dlog_prob = -c A; on-policy it is 1 unless the method says otherwise. Averaging is
``aggregate``'s. Each raises ValueError, naming the argument, for a wrong shape or dtype or an option out of range.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .checks import check_number
from .inputs import check_flags, read_steps
from .loss_record import PolicyLoss, read_loss_inputs
from .method import Method
from .moments import Reduce, batch_moments, total
from .policy_loss import clipped, clipped_high, clipped_low


def read_probability(name: str, log_prob: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return exp(``log_prob``) detached, 1 on masked steps.

    Raises ValueError for a log-prob above 0: that is a density (a Gaussian step has one), not a probability.
    """
    known = read_steps(name, log_prob, mask, dtype)
    if bool((known > 1e-3).any()):
        raise ValueError(
            f"{name}: expected log-probabilities <= 0, got up to {float(known.max()):.4g}; a density needs a substitute"
        )
    return known.clamp(max=0.0).exp()


def gaussian_probability(square: Tensor, *, dimensions: int) -> Tensor:
    """Give a Gaussian step a stand-in for a probability: q = exp(-square / (2 dimensions)), float32 in (0, 1].

    square: real, any shape, |eps|^2 of the step's noise over its ``dimensions`` latent elements (about ``dimensions``,
    so q is about 0.61). For methods that ask for a probability, where a step only has a density.
    """
    check_number("dimensions", dimensions, 1)
    if not bool((square >= 0).all()):
        raise ValueError("square: expected numbers >= 0")
    return (-square.detach().double() / (2 * dimensions)).exp().float()


def dcpo_bounds(old_prob: Tensor, *, low: float = 0.16, high: float = 0.2, cap: float = 10.0) -> tuple[Tensor, Tensor]:
    """Give each step its own bounds of the ratio, wider where it was unlikely; in the shape of ``old_prob``.

    lower = 1/2 + sqrt(max(1 - 4 low / q, 0)) / 2 and upper = min(1/2 + sqrt(1 + 4 high / q) / 2, cap), for q in [0, 1].
    They solve |rho - 1| rho q <= low or high. q = 0 gives (1/2, cap). DCPO, 2509.02333; repository lime-RL/DCPO.
    """
    check_number("low", low, 0.0, strict=True)
    check_number("high", high, 0.0, strict=True)
    check_number("cap", cap, 1.0, strict=True)
    if not bool(((old_prob >= 0) & (old_prob <= 1)).all()):
        raise ValueError("old_prob: expected probabilities in [0, 1]")
    q = old_prob.detach()
    lower = 0.5 + (1.0 - 4.0 * low / q).clamp(min=0.0).sqrt() / 2
    return lower, (0.5 + (1.0 + 4.0 * high / q).sqrt() / 2).clamp(max=cap)


def cispo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    low: float | None = 0.2,
    high: float = 0.28,
) -> PolicyLoss:
    """Clip the weight and keep the gradient: L = -sg(clip(rho, 1 - low, 1 + high)) A log_prob.

    The coefficient is the clipped ratio, never 0. low None: only the upper cap min(rho, 1 + high) holds.

    Public code: verl clips on both sides with its PPO range; TRL and ScaleRL cap alone at 5 (low None, high 4). CISPO,
    2506.13585 (MiniMax-M1); ScaleRL, 2510.13786. On-policy the gradient is -A and the value -A log_prob.

    On denoising steps: as it is; the value holds a log-density, the gradient is what counts.
    """
    check_number("high", high, 0.0)
    if low is not None:
        check_number("low", low, 0.0)
    lp, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    ratio = d.detach().exp()
    lower = -math.inf if low is None else 1.0 - low
    weight = ratio.clamp(lower, 1.0 + high)
    return PolicyLoss(loss=-weight * a * lp, low=mask & (ratio < lower), high=mask & (ratio > 1.0 + high))


def sapo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> PolicyLoss:
    """Replace the clip by a smooth gate: L = -A (4 / tau) sigmoid(tau (rho - 1)), tau by the sign of A.

    tau: tau_pos where A > 0, else tau_neg; the greater, the narrower. The coefficient 4 s (1 - s) rho with s =
    sigmoid(tau (rho - 1)) is 1 on-policy and falls off smoothly on both sides; the value on-policy is -2 A / tau.

    SAPO, 2511.20347; the defaults are TRL's and the paper's. The paper averages with seq_mean_mean.

    On denoising steps: as it is; tau grows by the number of dimensions where the ratio is one of dimension means.
    """
    check_number("tau_pos", tau_pos, 0.0, strict=True)
    check_number("tau_neg", tau_neg, 0.0, strict=True)
    _, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    tau = torch.where(a > 0, torch.full_like(a, tau_pos), tau_neg)
    return PolicyLoss(loss=-a * (4.0 / tau) * (tau * (d.exp() - 1.0)).sigmoid())


def _binary_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL between (q, 1 - q) and (p, 1 - p), with 1e-8 under the second logarithm as in verl."""
    return q * (q.log() - p.log()) + (1.0 - q) * ((1.0 - q + 1e-8) / (1.0 - p + 1e-8)).log()


def dppo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    divergence: Tensor | None = None,
    *,
    kind: Literal["tv", "kl"] = "tv",
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
) -> PolicyLoss:
    """Drop the steps whose policy has gone too far the way they push: L = -A sg(min(rho, cap)) log_prob keep.

    With p and q the new and old probability of the action, the divergence is |p - q| ("tv") or the binary KL of (q, 1 -
    q) against (p, 1 - p) ("kl"). A step is dropped where A > 0, p > q and the divergence is above ``high``, or where A
    < 0, p < q and it is above ``low``. divergence: float [B, T] >= 0, used in place of ``kind``, for policies whose
    divergence is known; without it both log-probs must be log-probabilities (<= 0).

    DPPO, 2602.04879; verl's dppo_tv and dppo_kl, whose clip range (0.2) is the threshold. A KL threshold is of another
    scale: a TV of 0.2 has a KL of at least 0.08.

    On denoising steps: pass the exact KL of the two Gaussians, |mu - mu_old|^2 / (2 sigma^2), as ``divergence``.
    """
    if kind not in ("tv", "kl"):
        raise ValueError(f"kind: expected 'tv' or 'kl', got {kind!r}")
    check_number("low", low, 0.0)
    check_number("high", high, 0.0)
    check_number("cap", cap, 0.0, strict=True)
    lp, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    if divergence is not None:
        distance = read_steps("divergence", divergence, mask, d.dtype)
        if bool((distance < 0).any()):
            raise ValueError(f"divergence: expected numbers >= 0, got {float(distance.min()):.4g}")
    else:
        p = read_probability("log_prob", log_prob, mask, d.dtype)
        q = read_probability("old_log_prob", old_log_prob, mask, d.dtype)
        distance = (p - q).abs() if kind == "tv" else _binary_kl(p, q)
    moved = d.detach()
    lost_low = (a < 0) & (moved < 0) & (distance > low)
    lost_high = (a > 0) & (moved > 0) & (distance > high)
    loss = -a * moved.exp().clamp(max=cap) * lp
    return PolicyLoss(loss=torch.where(lost_low | lost_high, 0.0, loss), low=lost_low, high=lost_high)


def dro(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor, *, beta: float = 0.05) -> PolicyLoss:
    """Hold the policy near the old one by a square, without a ratio: L = -(A log_prob - beta d^2 / 2).

    The gradient is -(A - beta d): it vanishes at d = A / beta and pulls back beyond, so samples can be used again. beta
    > 0 (verl has no default and asks for one). DRO, 2405.19107 equation 6; verl's dro loss.

    On denoising steps: as it is.
    """
    check_number("beta", beta, 0.0, strict=True)
    lp, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    return PolicyLoss(loss=-(a * lp - beta / 2 * d.square()))


def _covariance(lp: Tensor, advantage: Tensor, mask: Tensor, reduce: Reduce | None) -> Tensor:
    """(A - mean A)(log_prob - mean log_prob) of each step, means over the batch's unmasked steps: float64, detached."""
    lp = lp.detach()
    centred = [x.double() - batch_moments(x, mask, reduce=reduce)[0] for x in (advantage, lp)]
    return centred[0] * centred[1]


def _first(key: Tensor, share: float, mask: Tensor) -> Tensor:
    """Tell which steps hold the max(1, floor(share n)) smallest finite keys; n: unmasked steps. bool [B, T]."""
    number = (share * mask.sum().double()).floor().clamp(min=1)
    order = key.flatten().argsort(stable=True)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen[order] = torch.arange(len(order), device=order.device) < number
    return chosen.view_as(key) & key.isfinite()


def clip_cov(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    uniform: Tensor,
    *,
    share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    low: float = 0.2,
    high: float | None = None,
    reduce: Reduce | None = None,
) -> PolicyLoss:
    """Take a few steps of high covariance out of PPO's loss, at random, to keep the policy's entropy up.

    cov = (A - mean A)(log_prob - mean log_prob) with means over the batch. Of the steps with cov_low < cov < cov_high
    that PPO (low, high; high is low by default) does not clip, max(1, floor(share n)) get loss 0; n: unmasked steps of
    this rank. uniform: float [B, T] in [0, 1), the randomness: those with the smallest values are taken. reduce: sums
    the means over data-parallel ranks. The rest has PPO's loss.

    Clip-Cov, 2505.22617 (PRIME-RL/Entropy-Mechanism-of-RL); verl's clip_cov.

    On denoising steps: as it is, though a step of fixed sigma has a constant entropy to protect.
    """
    check_number("share", share, 0.0)
    check_number("cov_low", cov_low)
    check_number("cov_high", cov_high, cov_low)
    high = low if high is None else high
    lp, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    drawn = read_steps("uniform", uniform, mask, torch.float64)
    ratio = d.exp()
    at_low, at_high = clipped_low(ratio, a, low), clipped_high(ratio, a, high)
    cov = _covariance(lp, a, mask, reduce)
    open_ = mask & ~at_low & ~at_high & (cov > cov_low) & (cov < cov_high)
    lost = _first(torch.where(open_, drawn, torch.inf), share, mask)
    return PolicyLoss(loss=torch.where(lost, 0.0, clipped(ratio, a, low, high)), low=at_low, high=at_high)


def kl_cov(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    share: float = 2e-4,
    coef: float = 1.0,
    reduce: Reduce | None = None,
) -> PolicyLoss:
    """Hold back the few steps of greatest covariance: L = -A rho, and + coef |d| on them.

    cov = (A - mean A)(log_prob - mean log_prob) with means over the batch; the max(1, floor(share n)) greatest of this
    rank are held back (n: its unmasked steps; equal ones by position). There is no clip. reduce: sums the means over
    data-parallel ranks. On-policy |d| has no gradient, so that of the loss is -A.

    KL-Cov, 2505.22617 (PRIME-RL/Entropy-Mechanism-of-RL); verl's kl_cov.

    On denoising steps: as it is; the exact KL of the Gaussians would do the same without the sign.
    """
    check_number("share", share, 0.0)
    check_number("coef", coef, 0.0)
    lp, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    cov = _covariance(lp, a, mask, reduce)
    held = _first(torch.where(mask, -cov, torch.inf), share, mask)
    return PolicyLoss(loss=-a * d.exp() + torch.where(held, coef * d.abs(), 0.0))


def ess_lr(
    importance: Tensor,
    valid: Tensor | None = None,
    *,
    lr: float = 1.0,
    reference: float = 1.0,
    reduce: Reduce | None = None,
) -> Tensor:
    """Scale the learning rate by the effective sample size: lr sqrt(ESS / (B reference)), a float32 scalar.

    ESS = (sum w)^2 / sum w^2. importance: float [B] >= 0, the unclipped importance weight w of each row; valid: bool
    [B], rows that count, all by default; B counts them. Equal weights give ``lr``, one that dominates lr / sqrt(B),
    no weight at all 0. lr: 1 by default, which gives the factor. reference: ESS / B of on-policy data, in (0, 1].
    reduce: sums over data-parallel ranks.

    VCPO, 2602.17616, the square root for Adam's kind of optimiser; its optimal baseline is another method.

    On denoising steps: the weight of a row is the product of its steps' ratios, or their mean in log space.
    """
    check_number("lr", lr, 0.0)
    check_number("reference", reference, 0.0, strict=True)
    if importance.ndim != 1 or importance.numel() == 0 or not importance.is_floating_point():
        raise ValueError(f"importance: expected floating [B], got {importance.dtype} {list(importance.shape)}")
    if valid is None:
        valid = torch.ones_like(importance, dtype=torch.bool)
    check_flags("valid", valid, tuple(importance.shape))
    weight = torch.where(valid, importance.detach().double(), 0.0)
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError("importance: expected finite numbers >= 0 in valid rows")
    parts = total(torch.stack([weight.sum(), weight.square().sum(), valid.sum().double()]), reduce)
    share = parts[0].square() / (parts[1] * parts[2] * reference)
    return (lr * torch.where(parts[1] > 0, share, 0.0).sqrt()).float()


_TESTS = "tests/advantage/test_weighted_losses.py::"
_LOSS = {"formula": _TESTS + "test_against_a_plain_loop", "identity": _TESTS + "test_on_policy_gradient"}

METHODS: tuple[Method, ...] = (
    Method(
        key="cispo",
        kind="policy_loss",
        paper_id="2506.13585",
        title="CISPO: clipped importance weight on the log-prob, gradient never cut",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_losses_and_their_gradients_agree",
            "exact": _TESTS + "test_cispo_coefficients",
            **_LOSS,
        },
        call=cispo,
    ),
    Method(
        key="sapo",
        kind="policy_loss",
        paper_id="2511.20347",
        title="SAPO: a smooth gate in place of the clip",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_losses_and_their_gradients_agree",
            "exact": _TESTS + "test_sapo_worked_numbers",
            **_LOSS,
        },
        call=sapo,
    ),
    Method(
        key="dppo",
        kind="policy_loss",
        paper_id="2602.04879",
        title="DPPO: steps beyond a divergence bound are dropped",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_losses_and_their_gradients_agree",
            "exact": _TESTS + "test_dppo_drops_only_the_harmful_way",
            **_LOSS,
        },
        call=dppo,
    ),
    Method(
        key="dro",
        kind="policy_loss",
        paper_id="2405.19107",
        title="DRO: log-prob times advantage with a square pull to the old policy",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_losses_and_their_gradients_agree",
            "exact": _TESTS + "test_dro_gradient_vanishes_at_its_optimum",
            **_LOSS,
        },
        call=dro,
    ),
    Method(
        key="clip_cov",
        kind="policy_loss",
        paper_id="2505.22617",
        title="Clip-Cov: a few steps of high covariance leave PPO's loss",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_losses_and_their_gradients_agree",
            "exact": _TESTS + "test_clip_cov_takes_the_smallest_uniforms",
            "formula": _TESTS + "test_against_a_plain_loop",
            "identity": _TESTS + "test_clip_cov_without_candidates_is_ppo",
        },
        call=clip_cov,
        joint=True,
        exempt={"on_policy": "the steps that it takes out have no gradient, on-policy too"},
    ),
    Method(
        key="kl_cov",
        kind="policy_loss",
        paper_id="2505.22617",
        title="KL-Cov: a penalty on the steps of greatest covariance",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_losses_and_their_gradients_agree",
            "exact": _TESTS + "test_kl_cov_holds_back_the_greatest",
            **_LOSS,
        },
        call=kl_cov,
        joint=True,
    ),
    Method(
        key="vcpo",
        kind="optimizer",
        paper_id="2602.17616",
        title="VCPO: learning rate scaled by the effective sample size",
        tier=2,
        evidence={"exact": _TESTS + "test_ess_lr_worked_numbers"},
        call=ess_lr,
    ),
)
