"""Values of intermediate states: what the finished sample would be from here, and at which states to ask.

State k of a schedule is the latent before step k; state T is finished. The value of a state is a reward of an estimate of
the finished sample: one step (`extrapolate`), or the deterministic path (`ode_value`). For data N(m, s^2) and a linear
reward the value is linear in x, and neither estimate is the policy's own expectation: with ``D = (1-t)^2 s^2 + t^2`` its
slope is ``s^2 (1-t) / D`` for one step, ``s / sqrt(D)`` for the path, and in between for the stochastic sampler
(Flow-GRPO's with 0 < a < sqrt 2). One step underrates what early noise decides, the path overrates it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from flowrl.dynamics.interpolants import endpoints, interpolate
from flowrl.records import Prediction, PredictionKind, Schedule

Predict = Callable[[Tensor, Tensor, Tensor], Prediction]
"""(x [b, ...], step int64 [b], rows int64 [b]) -> the (guided) prediction of each sample at its own schedule index; rows
are the places of the samples in the batch, to choose their conditioning by."""


def extrapolate(x: Tensor, value: Tensor, kind: PredictionKind, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Estimate the finished sample in one step from a network output: ``x0_hat`` of `endpoints` (velocity: ``x - t v``).

    x, value: any float type, [B, ...]; alpha, sigma: [B], or broadcastable to x. Returns float32 [B, ...]. It is the
    posterior mean E[x0 | x], so the value of a concave reward leaves out what the spread around it costs. Raises
    ValueError for an unknown kind.
    """
    return endpoints(x, value, kind, _wide(alpha, x.ndim), _wide(sigma, x.ndim))[0]


def _wide(values: Tensor, ndim: int) -> Tensor:
    return values.reshape(-1, *[1] * (ndim - 1)) if values.ndim == 1 else values


def euler_grid(step: Tensor, total: int, n: int) -> Tensor:
    """Choose the states that n Euler steps visit from each state ``step`` to the last one, ``total``: int64 [B, M + 1].

    step: int64 [B] in 0 .. total; n >= 0, 0 for every remaining step. The states lie at equal distances in the schedule's
    own index, rounded (halves upward), so that they follow its spacing in time. A row with fewer than n remaining steps
    takes each of them. M is the greatest number of steps of a row; rows with fewer repeat ``total`` at the end.
    Raises ValueError for a step outside the schedule or a negative n.
    """
    if step.dtype != torch.int64 or step.ndim != 1 or len(step) == 0:
        raise ValueError(f"step: expected int64 [B] with B >= 1, got {step.dtype} {list(step.shape)}")
    if int(step.min()) < 0 or int(step.max()) > total:
        raise ValueError(f"step: expected states 0 .. {total}, got {int(step.min())} .. {int(step.max())}")
    if n < 0:
        raise ValueError(f"n: expected a number of steps >= 0 (0 is every remaining one), got {n}")
    left = total - step
    count = left if n == 0 else left.clamp(max=n)
    place = torch.arange(int(count.max()) + 1, device=step.device)
    divisor = count.clamp(min=1)[:, None]
    moved = (2 * place * left[:, None] + divisor) // (2 * divisor)
    return step[:, None] + torch.minimum(moved, left[:, None])


@torch.no_grad()
def ode_value(predict: Predict, x: Tensor, step: Tensor, schedule: Schedule, n: int = 0) -> tuple[Tensor, int]:
    """Follow the deterministic path from each sample's own state to the end, in n Euler steps on the schedule's states.

    One step from state i to state j is ``alpha_j x0_hat + sigma_j x1_hat``, as the rollout's "ode" kernel makes it, so
    n = 0 (every remaining step) from state k gives what the rollout would without noise from there on, and n = 1 is
    `extrapolate` where the schedule ends at t = 0. The first network output may be known from the rollout; it is asked
    for again here.

    predict: see `Predict`; x: [B, ...]; step: int64 [B], 0 .. T, T for a finished sample, which is returned as it is; n:
    see `euler_grid`. Returns x0, float32 [B, ...], and the number of network evaluations (samples, without guidance's
    second branch): a sample at state k costs ``min(n, T - k)``, T - k for n = 0. Samples that are done leave the batch.
    No gradient. Raises ValueError as `euler_grid` does, and where x and step differ in length.
    """
    if x.ndim < 1 or len(x) != len(step):
        raise ValueError(f"x: expected {len(step)} samples, one a step, got {list(x.shape)}")
    grid = euler_grid(step, schedule.steps, n)
    alpha, sigma = (values.float().to(x.device) for values in (schedule.alpha, schedule.sigma))
    x = x.float().clone()
    calls = 0
    for here, there in zip(grid.unbind(1)[:-1], grid.unbind(1)[1:], strict=True):
        rows = (here < there).nonzero().flatten()
        calls += len(rows)
        now, at, to = x[rows.to(x.device)], here[rows], there[rows]
        prediction = predict(now, at, rows)
        scale = [_wide(values[index.to(x.device)], x.ndim) for index in (at, to) for values in (alpha, sigma)]
        x0_hat, x1_hat = endpoints(now, prediction.value, prediction.kind, scale[0], scale[1])
        x[rows.to(x.device)] = interpolate(x0_hat, x1_hat, scale[2], scale[3])
    return x, calls


@dataclass(frozen=True)
class ValuedStates:
    """The states that get a value of their own, besides the finished one.

    start: the state before the first trained step, an index of the schedule; after: places among the trained steps, in
    order, whose after-states are valued; the last trained step is never among them, as its value is the outcome.
    states: all of them as indices of the schedule, start first; length: number of trained steps.
    """

    start: int
    after: tuple[int, ...]
    states: tuple[int, ...]
    length: int


def which_states(trained: Sequence[int], stride: int = 1) -> ValuedStates:
    """Choose the states to value: that before the first trained step, and that after every ``stride``-th one.

    trained: the trained steps of the schedule, rising. Blocks of ``stride`` trained steps end at a valued state, the last
    block, which may be shorter, at the outcome. So len(trained) = K costs ``1 + (K - 1) // stride`` values a sample.
    Raises ValueError for no step, steps that do not rise from 0 or more, or stride < 1.
    """
    steps = list(trained)
    if not steps or steps[0] < 0 or any(b <= a for a, b in pairwise(steps)):
        raise ValueError(f"trained: expected rising indices of steps, got {steps}")
    if stride < 1:
        raise ValueError(f"stride: expected a number >= 1, got {stride}")
    after = tuple(range(stride - 1, len(steps) - 1, stride))
    return ValuedStates(steps[0], after, (steps[0], *(steps[k] + 1 for k in after)), len(steps))


def spread_values(
    values: Tensor, outcome: Tensor, where: ValuedStates, how: Literal["hold", "linear"] = "hold"
) -> tuple[Tensor, Tensor]:
    """Give every trained step a value: what the estimators call ``start_value`` [B] and ``step_value`` [B, K].

    values: float [B, len(where.states)], of the states in that order; outcome: float [B], the true one, which
    the last step gets. Steps between two valued states have "hold": the next one's value (all steps of a block get what
    is known at its end; as gains, the first step of the block has all of its gain and the others 0), or "linear":
    values in equal parts from one to the next, so that each step of a block has an equal share of its gain; use it for
    gains. With stride 1 both are the values themselves. NaN stays: "hold" loses the block that ends at it, "linear"
    that block and the next but for its last step. Returns float64.
    Raises ValueError for another shape or ``how``.
    """
    if how not in ("hold", "linear"):
        raise ValueError(f"how: expected 'hold' or 'linear', got {how!r}")
    wanted = (len(outcome), len(where.states))
    if outcome.ndim != 1 or tuple(values.shape) != wanted:
        raise ValueError(
            f"values, outcome: expected {list(wanted)} and [{len(outcome)}], got {list(values.shape)} and "
            f"{list(outcome.shape)}"
        )
    known = torch.cat([values.double(), outcome.double()[:, None]], dim=1)
    # Ends of the blocks as counts of trained steps, 0 for the state before the first one.
    ends = torch.tensor([0, *(k + 1 for k in where.after), where.length], device=values.device)
    done = torch.arange(1, where.length + 1, device=values.device)
    block = torch.searchsorted(ends, done)
    upper = known[:, block]
    if how == "hold":
        return known[:, 0], upper
    lower = known[:, block - 1]
    part = (done - ends[block - 1]).double() / (ends[block] - ends[block - 1])
    return known[:, 0], torch.where(part == 1, upper, lower + part * (upper - lower))
