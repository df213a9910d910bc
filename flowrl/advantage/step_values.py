"""Credit from the values of states on the way: shape the values, then normalise.

R_k is the value of the state after step k (a reward model's score of an estimate of the finished sample), R_0 that of
the state before the first step, R_K the true outcome.

``step_value``: float [B, T], R_k at each step, the last unmasked one the outcome; NaN is no value. ``start_value``: float
[B], R_0. ``group``: int64 [B]; ``mask``: bool [B, T]; ``valid``: bool [B]. The next step is the next unmasked one. What
a missing value leaves without a number leaves the statistics and the loss: its own step ("value"), the two steps that
it bounds ("gain"), its own step and all before it ("cumulative"; only its own with gamma 0).

ddof: 0 divides a variance by n, 1 by n - 1; eps is added to a deviation. A group of one, and values that are equal up
to rounding (1e-12), give exactly 0. live: the group has an advantage that is not 0. group_mean, group_std: of the
outcomes. Statistics are float64; results are float32 and carry no gradient. Raises ValueError, naming the argument, for
a wrong shape, dtype or range, an infinite value, or unmasked steps that are all NaN.

On denoising steps: what the module is for. On tokens: the value is a process reward model's or a critic's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_choice, check_number, check_share
from .inputs import check_ids
from .method import Method
from .moments import Reduce
from .record import Advantage
from .statistics import check_policies
from .step_shapes import (
    Normaliser,
    Shaping,
    before_step,
    check_shaping,
    close,
    normalise,
    outcome_of,
    read_values,
    shape_values,
    shaped,
    size_of,
    standardise_steps,
)


def step_credit(
    step_value: Tensor,
    group: Tensor,
    mask: Tensor,
    start_value: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    shaping: Shaping = "value",
    normaliser: Normaliser = "per_step",
    gamma: float = 1.0,
    ddof: int = 0,
    eps: float = 1e-4,
    reduce: Reduce | None = None,
) -> Advantage:
    """Standardise shaped values: A_ik = (x_ik - mean) / (std + eps), x of ``shape_values``.

    normaliser: whose mean and deviation; "per_step": the members of the group at the same step (adding f(k) to all
    values of step k changes nothing), "joint": all steps of all members of the group, "global": all steps of the batch,
    ``reduce`` over ranks. "per_step" takes column k of the members for the same step, so the members of a group share
    their trained steps. ``dense_grpo`` and ``stepwise`` are settings of it. With "value" and every value equal
    to the outcome it is ``grpo``.
    """
    check_policies(ddof, eps)
    check_choice("normaliser", normaliser, ("per_step", "joint", "global"))
    check_shaping(shaping, gamma, start_value)
    value, start = read_values(step_value, start_value, mask, group, valid)
    x = shaped(value, start, mask, shaping, gamma)
    kept = mask & ~x.isnan()
    size = size_of(value, start) if shaping == "gain" else x.abs().nan_to_num(nan=0.0)
    advantage = normalise(x, group, kept, size, normaliser, ddof, eps, reduce)
    return close(advantage, kept, outcome_of(value, mask), group)


def dense_grpo(
    step_value: Tensor,
    start_value: Tensor,
    group: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
) -> Advantage:
    """Credit each step with its gain, standardised over the group at that step.

    A_ik = (d_ik - mean_i d_ik) / (std_i d_ik + eps), d_k = R_k - R_{k-1}. R is meant to be the reward at the end of the
    deterministic (ODE) path from the state; with a one-step estimate the paper reports less than plain ``grpo``. It is
    ``step_credit`` with "gain" and "per_step". The paper's noise schedule belongs to the sampler. Source: DenseGRPO,
    2601.20218; ddof and eps as Flow-GRPO, the source was not read in full.
    """
    return step_credit(step_value, group, mask, start_value, valid, shaping="gain", ddof=ddof, eps=eps)


def stepwise(
    step_value: Tensor,
    start_value: Tensor,
    group: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
) -> Advantage:
    """Credit each step with its gain, standardised over all steps of all members of the group.

    A_ik = (d_ik - mean_jl d_jl) / (std_jl d_jl + eps), d_k = R_k - R_{k-1}. R is the reward of the one-step estimate of the
    finished sample, or of a few steps. It is ``step_credit`` with "gain" and "joint". Source: Stepwise-Flow-GRPO,
    2603.28718; ddof and eps as Flow-GRPO, the source was not read in full.
    """
    return step_credit(
        step_value, group, mask, start_value, valid, shaping="gain", normaliser="joint", ddof=ddof, eps=eps
    )


def _balanced(turning: Tensor, trend: Tensor) -> Tensor:
    """Keep as many turning points of rising rows as of falling ones, those of the strongest trends; all of one kind."""
    size, rising = trend[:, None].expand(turning.shape).flatten(), (trend > 0)[:, None] & turning
    falling = turning & ~rising
    number = min(int(rising.sum()), int(falling.sum()))
    if number == 0:
        return turning
    kept = torch.zeros_like(turning).flatten()
    for kind in (rising.flatten(), falling.flatten()):
        order = torch.where(kind, size.abs(), -1.0).argsort(descending=True, stable=True)
        kept[order[:number]] = True
    return kept.view_as(turning)


def turning_points(
    step_value: Tensor,
    start_value: Tensor,
    mask: Tensor,
    *,
    first: bool = True,
    consistent: bool = True,
    balance: bool = False,
) -> Tensor:
    """Find the steps at which a row turns to where it ends: bool [B, T].

    With d_k = R_k - R_{k-1} and D = R_K - R_0, step k is one where d_k has the sign of D and d_{k-1} the opposite one.
    first: the first step counts as turned, having none before it. consistent: what follows, R_K - R_k, must have the
    sign of d_k as well; so the last step is none. balance: of all turning points of the batch keep as many with D > 0 as
    with D < 0, those of the greatest |D|, if there are both. A missing value makes no turning point. Source: TP-GRPO,
    2602.06422; YunzeTong/TurningPoint-GRPO, whose published command has all three on (and balances each sampling batch
    of a process alone).
    """
    group = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
    value, start = read_values(step_value, start_value, mask, group, None)
    return _turning(value, start, mask, first, consistent, balance)


def _turning(value: Tensor, start: Tensor, mask: Tensor, first: bool, consistent: bool, balance: bool) -> Tensor:
    outcome = outcome_of(value, mask)
    trend = outcome - start
    gain = value - before_step(value, start, mask)
    along = gain.sign() * trend.sign()[:, None]
    last = before_step(along, torch.full_like(start, -1.0 if first else 0.0), mask)
    turning = mask & (along > 0) & (last < 0)
    if consistent:
        turning = turning & (gain.sign() * (outcome[:, None] - value).sign() > 0)
    return _balanced(turning, trend) if balance else turning


def tp_grpo(
    step_value: Tensor,
    start_value: Tensor,
    group: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    *,
    first: bool = True,
    consistent: bool = True,
    balance: bool = False,
    ddof: int = 0,
    eps: float = 1e-4,
) -> Advantage:
    """Credit each step with its gain, a turning point with the gain from there to the end.

    x_k = R_K - R_{k-1} at a turning point (see ``turning_points``, with its options), else R_k - R_{k-1}; then
    A_ik = (x_ik - mean_i x_ik) / (std_i x_ik + eps) over the group at the step. R is the reward at the end of the
    deterministic path from the state. The public code's deviation may be that of the whole batch; here it is the
    group's. Without turning points it is ``dense_grpo``. balance looks at the whole batch that is passed. Source:
    TP-GRPO, 2602.06422; YunzeTong/TurningPoint-GRPO.
    """
    check_policies(ddof, eps)
    value, start = read_values(step_value, start_value, mask, group, valid)
    before, outcome = before_step(value, start, mask), outcome_of(value, mask)
    turning = _turning(value, start, mask, first, consistent, balance)
    x = torch.where(mask, torch.where(turning, outcome[:, None], value) - before, 0.0)
    kept = mask & ~x.isnan()
    return close(standardise_steps(x, group, kept, ddof, eps, size_of(value, start)), kept, outcome, group)


_MIN_MEAN = 1e-6


def _temporal_weight(total: Tensor, kept: Tensor) -> Tensor:
    """Q_k over the row's mean Q; refuses rows where that is no weight."""
    clean = torch.where(kept, total, 0.0)
    count = kept.sum(dim=1)
    mean = clean.sum(dim=1) / count.clamp(min=1)
    wrong = (kept & (total <= 0)).any(dim=1) | ((count > 0) & (mean < _MIN_MEAN))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        least = float(torch.where(kept, total, torch.inf)[row].min())
        raise ValueError(
            f"step_value: the weights Q_k / mean Q need positive Q and a mean of at least {_MIN_MEAN:g}, but row {row} has "
            f"Q down to {least:.4g} and mean {float(mean[row]):.4g}; raise the option shift so that every value is positive"
        )
    return clean / torch.where(count > 0, mean, 1.0)[:, None]


def _early(step: Tensor | None, steps: int, mask: Tensor, share: float) -> Tensor:
    """Steps in the first ``share`` of the schedule: bool [B, T]."""
    if step is None:
        at, number = mask.long().cumsum(dim=1) - 1, mask.sum(dim=1, keepdim=True)
    else:
        check_ids("step", step, tuple(mask.shape))
        at, number = torch.where(mask, step, 0), torch.full_like(step[:, :1], steps)
        if int(at.min()) < 0 or int(at.max()) >= steps:
            raise ValueError(
                f"step: expected schedule indices 0 .. steps - 1 with the option steps = {steps}, got "
                f"{int(at.min())} .. {int(at.max())}; set steps to the length of the whole schedule"
            )
    return mask & (at < share * number)


def vgpo(
    step_value: Tensor,
    group: Tensor,
    mask: Tensor,
    step: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    gamma: float = 1.0,
    k: float = 0.05,
    weight_inside: bool = True,
    absolute_steps: float = 0.5,
    steps: int = 0,
    shift: float = 0.0,
    eps: float = 1e-4,
) -> Advantage:
    """Weight cumulated values by their place in the row, standardise them, and add them once more as they are.

    Q_k = sum_{j >= k} gamma^{j-k} (R_j + shift); w_k = Q_k / mean_j Q_j over the row; with Z(.) standardising over the
    group at the step (ddof 0), A = Z(w Q) + k w Q (weight_inside) or A = w (Z(Q) + k Q). The second term, which keeps a signal
    where all rewards are equal, counts in the first ``absolute_steps`` of the schedule alone.

    step: int64 [B, T], index of each step in the whole schedule of ``steps`` steps; without it the row's own unmasked
    steps are the schedule. shift: added to every value; w needs Q > 0 and a row's mean Q >= 1e-6, else this raises.
    gamma in [0, 1]; k >= 0, and k mean(Q) well below 1 (.3) leaves negative advantages negative.

    Identities: k = 0, gamma = 1 and R = 0 before the last step give ``grpo`` on every step (w = 1); gamma = 0 takes the
    step's own value; equal rewards give 0 with k = 0, else k w Q.
    Source: VGPO, 2512.12387 (equations 9 to 11 for R, Q and w; the absolute term on 5 of 10 steps). reconstructed: how
    weight, standardising and absolute term are put together, and the defaults of gamma and k.
    """
    check_policies(eps=eps)
    check_share("gamma", gamma)
    check_share("absolute_steps", absolute_steps)
    for name, number, least in (("k", k, 0.0), ("steps", steps, 0), ("shift", shift, -torch.inf)):
        check_number(name, number, least)
    value, start = read_values(step_value, None, mask, group, valid)
    outcome = outcome_of(value, mask)
    total = shaped(value + shift, start, mask, "cumulative", gamma)
    kept = mask & ~total.isnan()
    weight = _temporal_weight(total, kept)
    clean = torch.where(kept, total, 0.0)
    x = weight * clean if weight_inside else clean
    absolute = torch.where(_early(step, steps, mask, absolute_steps), k * x, 0.0)
    advantage = standardise_steps(x, group, kept, 0, eps, x.abs()) + absolute
    return close(advantage if weight_inside else weight * advantage, kept, outcome, group)


__all__ = ["METHODS", "dense_grpo", "shape_values", "step_credit", "stepwise", "tp_grpo", "turning_points", "vgpo"]

_TESTS = "tests/advantage/test_step_values.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="step_credit",
        kind="estimator",
        paper_id="",
        title="Step credit: values of states, shaped and normalised",
        tier=2,
        evidence={
            "exact": _TESTS + "test_step_credit_worked_numbers",
            "formula": _TESTS + "test_step_credit_against_a_loop",
            "identity": _TESTS + "test_values_equal_to_the_outcome_give_grpo",
        },
        call=step_credit,
    ),
    Method(
        key="vgpo",
        kind="estimator",
        paper_id="2512.12387",
        title="VGPO: cumulated step values weighted in time, with an absolute term",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_vgpo_worked_numbers",
            "formula": _TESTS + "test_vgpo_against_a_loop",
            "identity": _TESTS + "test_vgpo_reduces_to_grpo",
            "learned": "docs/results/credit/main.json",
        },
        call=vgpo,
        exempt={
            "shift": "the weights are ratios of values, and the absolute term is their size",
            "scale": "the absolute term is in the units of the reward",
            "constant": "the absolute term is there to keep a signal where rewards are equal",
        },
    ),
    Method(
        key="dense_grpo",
        kind="estimator",
        paper_id="2601.20218",
        title="DenseGRPO: each step earns the change of the ODE value, standardised at its step",
        tier=2,
        evidence={
            "exact": _TESTS + "test_gains_worked_numbers",
            "formula": _TESTS + "test_step_credit_against_a_loop",
            "identity": _TESTS + "test_gains_telescope",
            "learned": "docs/results/credit/main.json",
        },
        call=dense_grpo,
    ),
    Method(
        key="stepwise",
        kind="estimator",
        paper_id="2603.28718",
        title="Stepwise-Flow-GRPO: each step earns its gain, standardised over steps and members",
        tier=2,
        evidence={
            "exact": _TESTS + "test_gains_worked_numbers",
            "formula": _TESTS + "test_step_credit_against_a_loop",
            "identity": _TESTS + "test_gains_telescope",
            "learned": "docs/results/credit/rest.json",
        },
        call=stepwise,
    ),
    Method(
        key="tp_grpo",
        kind="estimator",
        paper_id="2602.06422",
        title="TP-GRPO: each step earns its gain, a turning point the gain to the end",
        tier=2,
        evidence={
            "exact": _TESTS + "test_turning_points_worked_numbers",
            "formula": _TESTS + "test_tp_grpo_against_a_loop",
            "identity": _TESTS + "test_tp_grpo_without_turning_points_is_dense_grpo",
            "learned": "docs/results/credit/rest.json",
        },
        call=tp_grpo,
    ),
)
