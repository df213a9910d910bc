"""Policy losses that bound the update by a penalty, a bound or a mask instead of a clip.

Ratio variance (R2VPO), a forward KL to a reweighted reference (RAPO), curvature masks (CAPO) and a lower bound that is
linear in Monte Carlo draws (BGPO). Common inputs: log_prob (floating [B, T], carries the gradient), old_log_prob
([B, T]), advantage ([B] or [B, T]), mask (bool [B, T]); masked steps give 0 and carry no gradient whatever they hold.
d = clamp(log_prob - old_log_prob, -20, 20), rho = exp(d). Losses are float32 or wider, to be minimised. Everything
raises ValueError, naming the argument, for a wrong shape or dtype or an option out of range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_number
from .inputs import check_ids, check_mask, read_rewards, read_steps
from .loss_record import PolicyLoss, read_live_steps, read_loss_inputs
from .method import Method
from .moments import Reduce, batch_moments
from .ratios import log_ratio, widen
from .segments import Groups
from .state import State
from .statistics import divide
from .steps import group_step_moments


@dataclass(frozen=True)
class R2VPOState(State):
    """The dual variable of R2VPO. multiplier: float64 scalar >= 0."""

    multiplier: Tensor

    @classmethod
    def start(cls, multiplier: float = 0.5) -> R2VPOState:
        """Build the state; raises ValueError for a negative multiplier."""
        check_number("multiplier", multiplier, 0.0, finite=False)
        return cls(torch.tensor(multiplier, dtype=torch.float64))


def r2vpo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    ratio_variance: Tensor | None = None,
    state: R2VPOState | None = None,
    *,
    multiplier: float = 0.5,
) -> PolicyLoss:
    """Penalise the variance of the ratio instead of clipping it: L = -rho A + lambda (rho - 1)^2.

    The Lagrangian of max E[rho A] subject to E[(rho - 1)^2] <= delta. Its gradient in log_prob is
    -rho (A - 2 lambda (rho - 1)): it fades and turns around as rho leaves 1, without a hard cut, so samples of older
    policies can be used. ratio_variance: floating [B, T], replaces (rho - 1)^2 and carries a gradient of its own.
    state: its multiplier is lambda (see ``r2vpo_update``); without a state lambda is ``multiplier`` (>= 0, our default).

    lambda = 0 is the plain importance-weighted policy gradient; on-policy the gradient is -A; near 1 the penalty is
    2 lambda KL. R2VPO, 2601.03320 (long version 2605.26784). Reconstructed: the abstract states the constraint; the
    loss and the defaults are derived from it.

    On denoising steps: as is, or with ``gaussian_ratio_variance`` as ratio_variance, whose expectation has no
    sampling noise.
    """
    check_number("multiplier", multiplier, 0.0, finite=False)
    _, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    rho = d.exp()
    spread = (
        (rho - 1).square()
        if ratio_variance is None
        else read_live_steps("ratio_variance", ratio_variance, mask).to(d.dtype)
    )
    weight = multiplier if state is None else state.multiplier.detach().to(d)
    return PolicyLoss(loss=weight * spread - rho * a)


def ratio_spread(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, *, reduce: Reduce | None = None) -> Tensor:
    """Average (rho - 1)^2 over the unmasked steps of the batch: a float64 scalar, no gradient; 0 without a step.

    What ``r2vpo_update`` observes. reduce: sums over data-parallel ranks.
    """
    check_mask(mask)
    new, old = read_steps("log_prob", log_prob, mask), read_steps("old_log_prob", old_log_prob, mask)
    return batch_moments(log_ratio(new, old).double().expm1().square(), mask, reduce=reduce)[0]


def r2vpo_update(state: R2VPOState, spread: Tensor, *, limit: float = 0.01, rate: float = 1.0) -> R2VPOState:
    """Move the dual variable by the breach of its constraint: lambda <- max(0, lambda + rate (spread - limit)).

    spread: real scalar, the mean of (rho - 1)^2 (``ratio_spread``) or of its closed form; limit: > 0, the delta of the
    constraint; rate: > 0. Both defaults are ours. Raises ValueError for another shape, a value that is not finite, or
    an option out of range.
    """
    if not (limit > 0 and rate > 0):
        raise ValueError(f"limit, rate: expected numbers > 0, got {limit} and {rate}")
    if spread.ndim != 0 or not bool(spread.isfinite()):
        raise ValueError(f"spread: expected a finite scalar, got {spread.tolist()}")
    return R2VPOState((state.multiplier + rate * (spread.detach().double() - limit)).clamp(min=0.0))


def gaussian_ratio_variance(mean_shift_squared: Tensor, sigma: Tensor) -> Tensor:
    """Take the exact variance of the ratio of two Gaussian steps of one deviation: exp(|mu - mu_old|^2 / sigma^2) - 1.

    mean_shift_squared: floating, >= 0, any shape, carries the gradient: the squared distance of the means, summed over
    latent elements (their mean, for a log-prob that averages over elements); sigma: > 0, broadcast against it. The
    exponent is cut at 20, without a gradient beyond. float32 or wider; 2 KL to first order. Raises ValueError where
    sigma is not positive.
    """
    if not bool((sigma > 0).all()):
        raise ValueError(f"sigma: expected values > 0, got a least value of {float(sigma.min())}")
    return (widen(mean_shift_squared) / widen(sigma.detach()).square()).clamp(max=20.0).expm1()


def reward_trust(rewards: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
    """Map rewards to a trust in the reference: phi = (r - min_g) / (max_g - min_g), float32 [B] in [0, 1].

    The best row of a group has 1, the worst 0, every row of a group without signal 1, as have rows without a value.
    Any other increasing map may take its place: RAPO's own is not known.
    """
    value, known = read_rewards(rewards, group, valid)
    groups = Groups.of(group, known)
    low, high = groups.min(value), groups.max(value)
    return torch.where(known & (high > low), divide(value - low, high - low, 0.0), 1.0).float()


def forward_kl_reweighted(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    mask: Tensor,
    trust: Tensor,
    group: Tensor | None = None,
    *,
    limit: float = 10.0,
) -> Tensor:
    """Estimate KL(reweighted reference || policy) per step, from samples of the policy: u log u - u + 1.

    log u = clamp(phi log_prob_reference - log_prob, -limit, limit); the reweighted reference is reference^phi up to a
    normaliser. group: int64 [B]; where given, u is divided by its mean over the unmasked steps of the group, which
    carries no gradient (the unknown normaliser); without it the normaliser is dropped. trust: float [B], phi in [0, 1].
    Never negative, 0 at u = 1, its gradient in log_prob is -u log u. [B, T], 0 on masked steps.

    phi = 1 is the plain forward KL; to second order in log u it is k2.
    """
    check_mask(mask)
    if trust.shape != mask.shape[:1] or not bool(((trust >= 0) & (trust <= 1)).all()):
        raise ValueError(f"trust: expected [{len(mask)}] in [0, 1], got {list(trust.shape)}")
    check_number("limit", limit, 0.0, strict=True, finite=False)
    kept = read_live_steps("log_prob", log_prob, mask)
    reference = read_steps("reference_log_prob", reference_log_prob, mask, kept.dtype)
    log_u = (trust.detach().to(kept)[:, None] * reference - kept).clamp(-limit, limit)
    if group is not None:
        check_ids("group", group, tuple(mask.shape[:1]))
        mean, _, _ = group_step_moments(log_u.detach().exp(), mask, Groups.of(group))
        log_u = log_u - torch.where(mean > 0, mean, 1.0).log().to(log_u)[:, None]
    return torch.where(mask, log_u.exp() * log_u - log_u.expm1(), 0.0)


def rapo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    reference_log_prob: Tensor,
    trust: Tensor,
    group: Tensor | None = None,
    *,
    coef: float = 0.01,
    limit: float = 10.0,
) -> PolicyLoss:
    """Regularise by a forward KL to a reference that is trusted where rewards are high: L = -rho A + coef KLf.

    KLf as in ``forward_kl_reweighted``: rows of low reward see a flatter reference, hence more exploration.
    reference_log_prob: [B, T]; trust: [B] in [0, 1], for instance ``reward_trust``; group: int64 [B] normalises inside
    the group; coef: >= 0 (default ours). The method's entropy bonus is the caller's term. coef = 0 is the
    importance-weighted policy gradient. RAPO, 2510.03865. Reconstructed: from secondary notes, the map from rewards
    to trust and the normaliser included.

    On denoising steps: the plain forward KL of two Gaussians of one deviation is their reverse KL; only the trust, a
    temperature on the reference, adds something. Log-densities are not bounded, so give ``group``.
    """
    check_number("coef", coef, 0.0, finite=False)
    _, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    kl = forward_kl_reweighted(log_prob, reference_log_prob, mask, trust, group, limit=limit)
    return PolicyLoss(loss=coef * kl - d.exp() * a)


@dataclass(frozen=True)
class Curvature:
    """What CAPO predicts for each step, float32 [B, T]. objective_shift: m_H; policy_shift: m_F >= 0."""

    objective_shift: Tensor
    policy_shift: Tensor


def lowrank_quadratics(
    probability: Tensor,
    token: Tensor,
    hidden: Tensor,
    delta: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    fisher: Literal["sampled", "exact"] = "sampled",
) -> Curvature:
    """Predict how a last-layer update moves the objective and the policy at each step.

    With z = delta h (the change of the logits), s = (onehot(a) - pi) . z and v = Var_pi(z): the policy shift is
    m_F = s^2 / 2 ("sampled", the step's own term of the Fisher matrix) or v / 2 ("exact", its mean over actions), the
    objective shift m_H = A s + A (s^2 - v) / 2: slope and curvature of A rho along the update, at rho = 1.

    probability: [B, T, V], pi, rows that sum to 1; token: int64 [B, T], the action taken; hidden: [B, T, H]; delta:
    [V, H], the predicted update of the last layer (an optimiser's direction, the caller's); advantage: [B] or [B, T];
    mask: bool [B, T]. float32, no gradient, 0 on masked steps. delta = 0 gives 0 everywhere.
    """
    check_mask(mask)
    check_ids("token", token, tuple(mask.shape))
    if fisher not in ("sampled", "exact"):
        raise ValueError(f"fisher: expected 'sampled' or 'exact', got {fisher!r}")
    if probability.ndim != 3 or probability.shape[:2] != mask.shape:
        raise ValueError(f"probability: expected {[*mask.shape, 'V']}, got {list(probability.shape)}")
    if hidden.ndim != 3 or hidden.shape[:2] != mask.shape:
        raise ValueError(f"hidden: expected {[*mask.shape, 'H']}, got {list(hidden.shape)}")
    if delta.shape != (probability.shape[2], hidden.shape[2]):
        raise ValueError(f"delta: expected {[probability.shape[2], hidden.shape[2]]}, got {list(delta.shape)}")
    pi, a = probability.detach().float(), _steps_of(advantage, mask)
    z = hidden.detach().float() @ delta.detach().float().T
    mean = (pi * z).sum(-1)
    picked = torch.where(mask, token, 0)[..., None]
    s = z.gather(-1, picked).squeeze(-1) - mean
    v = (pi * (z - mean[..., None]).square()).sum(-1)
    shift = s.square() if fisher == "sampled" else v
    return Curvature(
        objective_shift=torch.where(mask, a * (s + (s.square() - v) / 2), 0.0),
        policy_shift=torch.where(mask, shift / 2, 0.0),
    )


def gaussian_curvature(
    noise_shift: Tensor, mean_shift_squared: Tensor, sigma: Tensor, advantage: Tensor, mask: Tensor
) -> Curvature:
    """Take CAPO's two predictions for Gaussian steps, exactly.

    With eps = (x - mu_old) / sigma and dmu = mu - mu_old: m_F = |dmu|^2 / (2 sigma^2), the exact KL, and
    m_H = A c + A (c^2 - |dmu|^2 / sigma^2) / 2 with c = <eps, dmu> / sigma: A (rho - 1) to second order in dmu.
    noise_shift: [B, T], <eps, dmu>; mean_shift_squared: [B, T], |dmu|^2; sigma: [B, T] > 0 on unmasked steps;
    advantage: [B] or [B, T]. float32, no gradient, 0 on masked steps. The form for Gaussians is ours.
    """
    check_mask(mask)
    inner = read_steps("noise_shift", noise_shift, mask)
    square = read_steps("mean_shift_squared", mean_shift_squared, mask)
    scale = torch.where(mask, read_steps("sigma", sigma, mask), 1.0)
    if not bool((scale > 0).all()):
        raise ValueError(f"sigma: expected values > 0, got a least value of {float(scale.min())}")
    c, q = inner / scale, square / scale.square()
    return Curvature(objective_shift=_steps_of(advantage, mask) * (c + (c.square() - q) / 2), policy_shift=q / 2)


def _steps_of(advantage: Tensor, mask: Tensor) -> Tensor:
    wide = advantage[:, None].expand(mask.shape) if advantage.shape == mask.shape[:1] else advantage
    return read_steps("advantage", wide, mask)


def capo_curvature(
    objective_shift: Tensor,
    policy_shift: Tensor,
    mask: Tensor,
    *,
    low: float = -1e-2,
    high: float = 1e-2,
    limit: float = 1e-4,
) -> Tensor:
    """Keep the steps whose predicted update is safe: low <= m_H <= high and m_F <= limit; bool [B, T].

    objective_shift, policy_shift: [B, T], the predictions of ``lowrank_quadratics`` or ``gaussian_curvature`` for the
    optimiser's next update; mask: bool [B, T], and the result is False outside it. Train with the result as mask.
    Published: limit 1e-4 for GRPO, 1e-3 or 5e-4 for Dr.GRPO, low and high -+1e-2, for token models; a Gaussian step's
    shifts grow with the number of latent elements, so the limits must be found anew. Infinite limits keep everything,
    as does an update of 0. CAPO, 2510.00819 (repository luckeciano/stable-pg-llm).

    On denoising steps: ``gaussian_curvature`` gives both predictions without a last-layer model.
    """
    check_mask(mask)
    if not (low <= high and limit >= 0):
        raise ValueError(f"low, high, limit: expected low <= high and limit >= 0, got {low}, {high} and {limit}")
    objective = read_steps("objective_shift", objective_shift, mask)
    policy = read_steps("policy_shift", policy_shift, mask)
    return mask & (objective >= low) & (objective <= high) & (policy <= limit)


def bgpo(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor) -> PolicyLoss:
    """Bound the ratio's surrogate by one that is a sum over Monte Carlo draws: memory for one draw at a time.

    The columns are draws: d_j is draw j's difference of log-likelihood bounds (an ELBO at one random time and noise),
    the ratio is exp(mean_j d_j). The loss of draw j is -A (1 + d_j) where A >= 0 (a tangent lies below the exponential)
    and -A exp(d_j) where A < 0 (Jensen), so that the row's mean over draws is at least -A exp(mean_j d_j); aggregate by
    seq_mean_mean, in parts if need be. log_prob: [B, J]; mask: bool [B, J], the draws that exist.

    On-policy both value (-A) and gradient equal the original's; with one draw and A < 0 it is exact. BGPO, 2510.11683.
    Reconstructed: the abstract states linearity in the draws and equality on-policy; the bounds are derived from that.

    On denoising steps: for forward-process policies, whose likelihood is an ELBO over random times; columns are
    (time, noise) draws instead of transitions.
    """
    _, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    # exp of the side that is not taken must not overflow into the gradient: d is bounded, so it cannot.
    return PolicyLoss(loss=torch.where(mask, -a * torch.where(a >= 0, 1 + d, d.exp()), 0.0))


_TESTS = "tests/advantage/test_regularised_losses.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="r2vpo",
        kind="policy_loss",
        paper_id="2601.03320",
        title="R2VPO: a penalty on the variance of the ratio, with a dual variable",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_r2vpo_worked_numbers",
            "exact": _TESTS + "test_ratio_variance_of_gaussians_is_exact",
            "formula": _TESTS + "test_losses_against_plain_loops",
            "identity": _TESTS + "test_on_policy_gradient_is_the_policy_gradient",
        },
        call=r2vpo,
    ),
    Method(
        key="rapo",
        kind="policy_loss",
        paper_id="2510.03865",
        title="RAPO: forward KL to a reference that is trusted where rewards are high",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_forward_kl_worked_numbers",
            "formula": _TESTS + "test_rapo_against_a_plain_loop",
        },
        call=rapo,
        exempt={"on_policy": "the KL term has a gradient wherever policy and reweighted reference differ"},
    ),
    Method(
        key="capo_curvature",
        kind="weight",
        paper_id="2510.00819",
        title="CAPO: drop the steps whose predicted shift of objective or policy is unsafe",
        tier=2,
        evidence={
            "exact": _TESTS + "test_gaussian_curvature_is_the_second_order_of_the_ratio",
            "formula": _TESTS + "test_lowrank_quadratics_against_full_matrices",
            "identity": _TESTS + "test_curvature_mask",
        },
        call=capo_curvature,
    ),
    Method(
        key="bgpo",
        kind="policy_loss",
        paper_id="2510.11683",
        title="BGPO: a lower bound of the surrogate that is a sum over Monte Carlo draws",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_bgpo_worked_numbers",
            "exact": _TESTS + "test_bgpo_bounds_the_surrogate",
            "identity": _TESTS + "test_on_policy_gradient_is_the_policy_gradient",
        },
        call=bgpo,
    ),
)
