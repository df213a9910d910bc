"""Policy losses that weigh a whole row by one ratio: GSPO and its descendants.

Every loss takes ``log_prob`` (carries the gradient), ``old_log_prob`` and ``mask`` (bool), each [B, T], and
``advantage`` ([B, T] or [B], no gradient), and returns a ``PolicyLoss``: float32 or wider [B, T], to be minimised, 0 on
masked steps whatever they hold. The loss of a row is spread over its steps, so that the mean over the row's steps
(``aggregate`` with seq_mean_mean) has the row's value and gradient; an advantage that varies along the row is applied
step by step. d = clamp(log_prob - old_log_prob, -20, 20), rho = exp(d), len the unmasked steps of the row, sg stops the
gradient. Each raises ValueError, naming the argument, for a wrong shape or dtype or an option out of range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_number
from .inputs import check_mask, read_steps
from .loss_record import PolicyLoss, read_loss_inputs
from .method import Method
from .moments import Reduce, batch_moments
from .policy_loss import clipped, clipped_high, clipped_low


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the unmasked steps of ``x`` (0 on the others): [B, 1], 0 for an empty row."""
    return x.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def _through(lp: Tensor) -> Tensor:
    """exp(lp - sg(lp)): 1, with the gradient of lp."""
    return (lp - lp.detach()).exp()


def sequence_ratio(lp: Tensor, d: Tensor, mask: Tensor, limit: float = 10.0) -> Tensor:
    """Give every step the row's ratio s = exp(mean of d over the row): [B, T], step t with the gradient s of its own lp.

    lp, d: as ``read_loss_inputs`` returns them. Its mean over the row's steps has the gradient of s. log s is cut at
    ``limit``, without gradient beyond.
    """
    mean = _row_mean(d.detach(), mask)
    return torch.where(mean > limit, math.exp(limit), mean.clamp(max=limit).exp() * _through(lp))


def gspo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    low: float = 3e-4,
    high: float = 4e-4,
    limit: float = 10.0,
) -> PolicyLoss:
    """Clip the geometric mean of the row's ratios: L = max(-A s, -A clip(s, 1 - low, 1 + high)), s = exp(mean_t d_t).

    Step t carries s_t = sg(s) exp(log_prob_t - sg(log_prob_t)): the value of s and the gradient s, hence after
    seq_mean_mean s / len, which is ds / dlog_prob_t. With one unmasked step it is PPO. limit: log s is cut there.

    GSPO, 2507.18071 equations 5 to 14; an advantage by step makes it GSPO-token. verl's gspo and TRL's sequence-level
    ratio agree with this under seq_mean_mean.

    On denoising steps: natural for one reward a trajectory; the mean over steps asks for a small range.
    """
    check_number("limit", limit, 0.0)
    lp, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    ratio = sequence_ratio(lp, d, mask, limit)
    return PolicyLoss(
        loss=clipped(ratio, a, low, high), low=clipped_low(ratio, a, low), high=clipped_high(ratio, a, high)
    )


def gmpo(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor, *, low: float = 0.4, high: float = 0.4
) -> PolicyLoss:
    """Take the geometric mean of ratios that are clipped one by one: L = -A exp(mean_t c_t), c in log space.

    c_t = min(d_t, high) where A_t > 0, max(d_t, -low) where A_t < 0, 0 where A_t = 0. After seq_mean_mean a step's
    coefficient is the row's ratio / len, 0 where c_t is clipped. low, high: ranges of the log-ratio, (e^-0.4, e^0.4).

    GMPO, 2507.20673 equation 4; verl's geo_mean returns the mean over all rows, empty ones too, of the same
    values; where the advantage varies along a row the values agree and the gradients differ.

    On denoising steps: as it is.
    """
    check_number("low", low, 0.0)
    check_number("high", high, 0.0)
    lp, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    log_ratio = d.detach()
    at_low, at_high = (a < 0) & (log_ratio < -low), (a > 0) & (log_ratio > high)
    kept = torch.where(at_low, -low, torch.where(at_high, high, torch.where(a == 0, 0.0, log_ratio)))
    through = torch.where(at_low | at_high, 1.0, _through(lp))
    return PolicyLoss(loss=-a * _row_mean(kept, mask).exp() * through, low=at_low, high=at_high)


def luspo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    cost: Tensor | None = None,
    *,
    low: float = 2e-3,
    high: float = 2.5e-3,
    limit: float = 10.0,
) -> PolicyLoss:
    """Multiply GSPO's loss of each row by its length, so that long rows are not played down.

    After seq_mean_mean it is the mean over rows of len L_gspo; ``gspo`` with length_scaled is the same, so do not take
    that here. cost: float [B] >= 0, takes the place of the length. low, high, limit: as in ``gspo``. On-policy the
    coefficient is len before averaging.

    LUSPO, 2602.05261; TRL's luspo divides by all rows, empty ones included.

    On denoising steps: the length is constant, and with it the factor; pass ``cost`` (network calls, seconds).
    """
    base = gspo(log_prob, old_log_prob, advantage, mask, low=low, high=high, limit=limit)
    if cost is None:
        factor = mask.sum(1)
    else:
        if cost.shape != mask.shape[:1] or not bool(((cost >= 0) & cost.isfinite()).all()):
            raise ValueError(f"cost: expected finite numbers >= 0 [{len(mask)}], got {cost.dtype} {list(cost.shape)}")
        factor = cost.detach()
    return PolicyLoss(loss=base.loss * factor.to(base.loss.dtype)[:, None], low=base.low, high=base.high)


def vespo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> PolicyLoss:
    """Weigh the log-prob by a smooth function of the row's ratio: L = -sg(phi(W)) A log_prob.

    W = exp(sum_t d_t), log W in [log 1e-8, 20]; phi(W) = W^k exp(lambda (1 - W)), with (k_pos, lambda_pos) where A >= 0
    and (k_neg, lambda_neg) where A < 0. phi(1) = 1; it goes to 0 on both sides, without a cut. The coefficient is phi.

    VESPO, 2602.10693; TRL's vespo. Averaged with step_mean.

    On denoising steps: W over all latent elements is degenerate; take log-probs that are means over the dimensions.
    """
    for name, number in (("k_pos", k_pos), ("lambda_pos", lambda_pos), ("k_neg", k_neg), ("lambda_neg", lambda_neg)):
        check_number(name, number, 0.0)
    lp, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    log_w = d.detach().sum(1, keepdim=True).clamp(math.log(1e-8), 20.0)

    def phi(k: float, lam: float) -> Tensor:
        return (k * log_w - lam * log_w.expm1()).exp()

    weight = torch.where(a < 0, phi(k_neg, lambda_neg), phi(k_pos, lambda_pos))
    return PolicyLoss(loss=-weight * a * lp)


def entropy_share(entropy: Tensor, mask: Tensor, *, reduce: Reduce | None = None) -> Tensor:
    """Turn step entropies into shares in (0, 1): sigmoid of the entropy standardised over the batch; float32 [B, T].

    1/2 at the batch's mean and where all are equal; 0 on masked steps. reduce: sums over data-parallel ranks.
    Reconstructed for ``dhpo``: the source says that a batch-normalised entropy is used, not by which function.
    """
    check_mask(mask)
    known = read_steps("entropy", entropy, mask, torch.float64)
    mean, std = batch_moments(known, mask, reduce=reduce)
    score = torch.where(std > 0, (known - mean) / std, 0.0)
    return torch.where(mask, score.sigmoid(), 0.0).float()


def dhpo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    share: Tensor | None = None,
    *,
    step_share: float = 0.5,
    step_low: float = 0.2,
    step_high: float = 0.2,
    seq_low: float = 0.1,
    seq_high: float = 0.1,
) -> PolicyLoss:
    """Mix the step's and the row's clipped surrogates: L = w ppo(rho) + (1 - w) gspo(s), each with bounds of its own.

    share: float [B, T] in [0, 1], the weight w of the step's ratio (``entropy_share`` gives more to uncertain steps);
    step_share, a number, where it is not given. Each branch is clipped before it is mixed. w = 1 is ``ppo`` with
    step_low and step_high, w = 0 is ``gspo`` with seq_low and seq_high. low, high of the result: either branch.

    DHPO, 2601.05607. Reconstructed from the abstract and notes: no code is public.

    On denoising steps: as it is, with w from the sigma schedule, since the entropy of a step is a constant.
    """
    lp, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    if share is None:
        share = torch.full_like(d, step_share)
    w = read_steps("share", share, mask, d.dtype)
    if bool(((w < 0) | (w > 1)).any()):
        raise ValueError(f"share: expected numbers in [0, 1], got {float(w.min()):.4g} to {float(w.max()):.4g}")
    step, row = d.exp(), sequence_ratio(lp, d, mask)
    loss = w * clipped(step, a, step_low, step_high) + (1.0 - w) * clipped(row, a, seq_low, seq_high)
    at_low = clipped_low(step, a, step_low) | clipped_low(row, a, seq_low)
    return PolicyLoss(loss=loss, low=at_low, high=clipped_high(step, a, step_high) | clipped_high(row, a, seq_high))


_TESTS = "tests/advantage/test_sequence_losses.py::"
_LOOP = {"formula": _TESTS + "test_against_a_plain_loop"}

METHODS: tuple[Method, ...] = (
    Method(
        key="gspo",
        kind="policy_loss",
        paper_id="2507.18071",
        title="GSPO: the geometric mean of a row's ratios, clipped",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_losses_and_their_gradients_agree",
            "exact": _TESTS + "test_gspo_worked_number_and_gradient",
            "identity": _TESTS + "test_gspo_of_one_step_is_ppo",
            **_LOOP,
        },
        call=gspo,
        joint=True,
    ),
    Method(
        key="gmpo",
        kind="policy_loss",
        paper_id="2507.20673",
        title="GMPO: the geometric mean of clipped ratios",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_losses_and_their_gradients_agree",
            "identity": _TESTS + "test_gmpo_without_clipping_is_gspo",
            **_LOOP,
        },
        call=gmpo,
        joint=True,
    ),
    Method(
        key="luspo",
        kind="policy_loss",
        paper_id="2602.05261",
        title="LUSPO: GSPO with each row's loss times its length",
        tier=2,
        evidence={"identity": _TESTS + "test_luspo_is_gspo_scaled_by_length", **_LOOP},
        call=luspo,
        joint=True,
        exempt={"on_policy": "the gradient is -A times the row's length"},
    ),
    Method(
        key="vespo",
        kind="policy_loss",
        paper_id="2602.10693",
        title="VESPO: log-prob weighed by a smooth function of the row's ratio",
        tier=2,
        evidence={"exact": _TESTS + "test_vespo_worked_numbers", **_LOOP},
        call=vespo,
        joint=True,
    ),
    Method(
        key="dhpo",
        kind="policy_loss",
        paper_id="2601.05607",
        title="DHPO: step ratio and row ratio mixed, each clipped on its own",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_dhpo_worked_number",
            "identity": _TESTS + "test_dhpo_ends_are_ppo_and_gspo",
            **_LOOP,
        },
        call=dhpo,
        joint=True,
    ),
)
