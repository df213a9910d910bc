"""Rewards for steps: one outcome spread over them, bonuses for subgoals, rewards implied by a policy.

Results of kind "reward" are float32 [B, T] without gradient, 0 on masked steps, made to be passed on as ``step_reward``
(for instance to ``gae``). Raises ValueError, naming the argument, for a wrong shape or dtype, values that are not
finite on unmasked steps, and options out of range.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, check_number, check_share
from .inputs import check_flags, check_mask, read_rewards, read_step_reward, read_steps
from .method import Method
from .ratios import widen
from .scans import gae_scan


def _read_outcome(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Outcome float64 [B], NaN as 0, and the rows that have one and an unmasked step."""
    value, known = read_rewards(rewards, None, None)
    check_mask(mask, len(rewards))
    return torch.where(known, value, 0.0), known & mask.any(1)


def lare(
    proxy_reward: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    correction: Literal["shift", "scale"] = "shift",
    eps: float = 1e-8,
) -> Tensor:
    """Redistribute an outcome over steps as a model of step rewards says, so that the steps add up to it.

    shift: r_t = rhat_t + (R - sum rhat) / T; scale: r_t = rhat_t R / sum rhat, T and sums over unmasked steps.

    proxy_reward: float [B, T], rhat; rewards: float [B], R; mask: bool [B, T]. A row whose |sum rhat| is at most
    ``eps`` cannot be scaled and is shifted. A NaN outcome gives NaN on the row's unmasked steps: no value. The sum
    over a row is R. Source: 2412.11120 with the usual return-consistent corrections; thu-rllab/LaRe. On denoising
    steps: rhat from features of x0_hat at each timestep (scores of reward models).
    """
    check_choice("correction", correction, ("shift", "scale"))
    check_number("eps", eps, 0.0)
    outcome, known = _read_outcome(rewards, mask)
    proxy = read_steps("proxy_reward", proxy_reward, mask, torch.float64)
    total = proxy.sum(1)
    shifted = proxy + ((outcome - total) / mask.sum(1).clamp(min=1))[:, None]
    if correction == "scale":
        possible = total.abs() > eps
        factor = outcome / torch.where(possible, total, 1.0)
        shifted = torch.where(possible[:, None], proxy * factor[:, None], shifted)
    return torch.where(mask, torch.where(known[:, None], shifted, torch.nan), 0.0).float()


def lare_loss(
    proxy_reward: Tensor,
    rewards: Tensor,
    mask: Tensor,
    sampled: Tensor | None = None,
    *,
    form: Literal["full", "rrd", "rrd_unbiased"] = "full",
) -> Tensor:
    """Fit a model of step rewards to outcomes: L = (mean_t rhat_t - R / T)^2, one loss a row.

    full: the mean over all T unmasked steps of the row. rrd: the mean over its K sampled steps, R / T unchanged.
    rrd_unbiased: rrd minus s^2 (1 - K/T) / K, s^2 the sample variance (over K - 1) of the K values; its mean over all
    subsets is the full loss (it may be negative).

    proxy_reward: float [B, T], rhat, carries the gradient; rewards: float [B]; mask: bool [B, T]; sampled: bool
    [B, T] among the unmasked steps, needed by the rrd forms (``draw_steps`` draws them), at least 1 a row, and 2 for
    rrd_unbiased where K < T. Returns float32 or wider [B]; rows without an outcome or an unmasked step give 0, so
    average over the others. Source: 2412.11120; randomised return decomposition 2111.13485; thu-rllab/LaRe. On
    denoising steps: direct.
    """
    check_choice("form", form, ("full", "rrd", "rrd_unbiased"))
    outcome, known = _read_outcome(rewards, mask)
    read_steps("proxy_reward", proxy_reward, mask)
    chosen = mask
    if form != "full":
        if sampled is None:
            raise ValueError(f"sampled: form {form!r} needs the steps that were drawn")
        check_flags("sampled", sampled, tuple(mask.shape))
        chosen = sampled
        _check_draw(chosen, mask, known, 2 if form == "rrd_unbiased" else 1)
    proxy = torch.where(chosen, widen(proxy_reward), 0.0)
    steps, drawn = (x.sum(1).clamp(min=1).to(proxy.dtype) for x in (mask, chosen))
    mean = proxy.sum(1) / drawn
    loss = (mean - (outcome / steps).to(mean.dtype)).square()
    if form == "rrd_unbiased":
        spread = torch.where(chosen, proxy - mean[:, None], 0.0).square().sum(1) / (drawn - 1).clamp(min=1)
        loss = loss - spread * (1 - drawn / steps) / drawn
    return torch.where(known, loss, 0.0)


def _check_draw(chosen: Tensor, mask: Tensor, known: Tensor, least: int) -> None:
    """Raise ValueError unless the chosen steps are unmasked and enough in every row that counts."""
    if bool((chosen & ~mask).any()):
        raise ValueError("sampled: expected unmasked steps only")
    few = known & (chosen.sum(1) < torch.minimum(mask.sum(1), torch.tensor(least, device=mask.device)))
    if bool(few.any()):
        row = int(few.nonzero()[0])
        raise ValueError(f"sampled: expected at least {least} steps, or all of them, in row {row}")


def draw_steps(mask: Tensor, uniform: Tensor, *, number: int) -> Tensor:
    """Draw ``number`` unmasked steps of each row without replacement, all where there are fewer: bool [B, T].

    mask: bool [B, T]; uniform: float [B, T], independent draws in [0, 1), which decide: the least are taken.
    """
    check_mask(mask)
    if number < 1:
        raise ValueError(f"number: expected at least 1, got {number}")
    draw = torch.where(mask, read_steps("uniform", uniform, mask), torch.inf)
    taken = draw.topk(min(number, mask.shape[1]), dim=1, largest=False).indices
    return torch.zeros_like(mask).scatter_(1, taken, True) & mask


def calm(step_reward: Tensor, subgoal_end: Tensor, mask: Tensor, *, bonus: float = 1.0) -> Tensor:
    """Add a bonus where a subgoal ends: r'_t = r_t + bonus 1[a subgoal ends at t].

    step_reward: float [B, T], NaN counts as 0; subgoal_end, mask: bool [B, T]; a subgoal that ends on a masked step is
    an error, as its bonus would be lost. The bonus is not potential-based, so it can change which policy is best
    (``potential_shaping`` cannot). Source: 2409.12798, reconstructed from the abstract: the size of the bonus was not
    seen. On denoising steps: a subgoal ends where a rule on x0_hat first holds (layout settled, text readable).
    """
    check_number("bonus", bonus)
    check_mask(mask)
    check_flags("subgoal_end", subgoal_end, tuple(mask.shape))
    lost = subgoal_end & ~mask
    if bool(lost.any()):
        row, step = (int(i) for i in lost.nonzero()[0])
        raise ValueError(f"subgoal_end: a subgoal ends on a masked step (row {row}, step {step})")
    return read_step_reward(step_reward, mask) + bonus * subgoal_end.float()


def implicit_step_reward(log_prob: Tensor, reference_log_prob: Tensor, mask: Tensor, *, beta: float = 0.1) -> Tensor:
    """Read the step rewards off a policy trained by preferences: b_t = beta (log_prob_t - reference_log_prob_t).

    At the optimum b_t = r_t + V(s_{t+1}) - V(s_t), so the sum over a row is r - V(s_0). log_prob, reference_log_prob:
    float [B, T]; mask: bool [B, T]; beta > 0, that of the preference loss. Source: 2404.12358 (the claim is the
    abstract's, the algebra that of DPO). On denoising steps: the same with log-probs of Gaussian transitions.
    """
    check_number("beta", beta, 0.0, strict=True)
    check_mask(mask)
    policy = read_steps("log_prob", log_prob, mask, torch.float64)
    reference = read_steps("reference_log_prob", reference_log_prob, mask, torch.float64)
    return (beta * (policy - reference)).float()


def potential_shaping(step_reward: Tensor, value: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Shape rewards by a potential: r'_t = r_t + gamma V_next - V_t, V 0 after the last step.

    step_reward: float [B, T], NaN counts as 0; value: float [B, T]; mask: bool [B, T]; next is the next unmasked step.
    At gamma 1 the sum over a row changes by -V(s_0) alone, so the best policy stays the best; r' is ``gae`` at lam 0.
    Source: 2404.12358; potential-based shaping. On denoising steps: direct, V a score of x0_hat for instance.
    """
    check_share("gamma", gamma)
    check_mask(mask)
    reward = read_step_reward(step_reward, mask)
    return gae_scan(reward, read_steps("value", value, mask), mask, gamma, 0.0)


_TESTS = "tests/advantage/test_redistribution.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="lare",
        kind="reward",
        paper_id="2412.11120",
        title="LaRe: an outcome redistributed over steps by a model of step rewards, sums kept",
        tier=2,
        evidence={
            "exact": _TESTS + "test_lare_worked_numbers",
            "formula": _TESTS + "test_lare_against_a_plain_loop",
            "identity": _TESTS + "test_lare_keeps_the_outcome",
        },
        call=lare,
    ),
    Method(
        key="lare",
        kind="objective",
        paper_id="2412.11120",
        title="LaRe: loss that fits step rewards to outcomes, full or on sampled steps",
        tier=2,
        evidence={
            "exact": _TESTS + "test_lare_loss_worked_numbers",
            "formula": _TESTS + "test_lare_loss_against_a_plain_loop",
            "identity": _TESTS + "test_unbiased_loss_averages_to_the_full_loss",
        },
        call=lare_loss,
    ),
    Method(
        key="calm",
        kind="reward",
        paper_id="2409.12798",
        title="CALM: a bonus where a subgoal ends",
        tier=3,
        evidence={"reconstructed": _TESTS + "test_calm_adds_a_bonus_where_subgoals_end"},
        call=calm,
    ),
    Method(
        key="implicit_q",
        kind="reward",
        paper_id="2404.12358",
        title="From r to Q*: step rewards implied by a policy trained on preferences",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_implicit_step_reward_against_a_plain_loop",
            "identity": _TESTS + "test_implicit_rewards_telescope",
        },
        call=implicit_step_reward,
    ),
    Method(
        key="potential_shaping",
        kind="reward",
        paper_id="2404.12358",
        title="Potential-based shaping of step rewards",
        tier=2,
        evidence={
            "formula": _TESTS + "test_potential_shaping_against_a_plain_loop",
            "identity": _TESTS + "test_shaping_changes_a_sum_by_the_first_value",
        },
        call=potential_shaping,
    ),
)
