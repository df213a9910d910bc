"""Which steps of a schedule draw noise, and which of those are trained: pure functions of keys, equal on all ranks.

A window is a run of stochastic steps. All members of a group share it, so that a group's outcomes differ by the noise of
the same steps. The last step of a schedule is never stochastic: cps, precise and ddim make it without noise, and noise
that an Euler-Maruyama kernel added there would stay in the picture.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from flowrl import rng

WindowKind = Literal["full", "random", "sliding", "iso_temporal"]
WindowStrategy = Literal["progressive", "random", "decaying", "exponential"]
_TRAINED = 1  # the `step` part of the key keeps the choice of trained steps apart from that of the window's start


@dataclass(frozen=True, kw_only=True)
class WindowRule:
    """How windows are chosen; `group_windows` and `shared_window` read it, `check_window` says when it cannot be.

    kind: full (every step but the last) | random | sliding | iso_temporal. size: steps a window. Starts are first,
    first + stride, ... up to last, both inclusive. strategy, of sliding windows:

        progressive  ``every`` iterations at each start
        random       a start drawn anew every ``every`` iterations
        decaying     ``tau(l) = every + (least - every) (l - first) / (last - first)`` iterations at start l, from every
                     at the first start to least at the last one
        exponential  ``tau(l) = every exp(-rate max(l - threshold, 0))``

    tau is rounded up, so each start keeps at least one iteration, and after the last start the window returns to the
    first. The strategies are MixGRPO's (2507.21802), from its description; every = 25, rate = 0.1 and threshold = 13
    with 25 steps are its defaults. iso_temporal: each group draws its own start, uniform (Flash-GRPO, 2605.15980).
    fraction: of a group's stochastic steps, the share that is trained, in (0, 1] (DanceGRPO, 2505.07818: 0.6).
    """

    kind: WindowKind = "random"
    size: int = 2
    first: int = 0
    last: int = 2
    every: int = 5
    stride: int = 1
    strategy: WindowStrategy = "progressive"
    least: int = 1
    rate: float = 0.1
    threshold: int = 13
    fraction: float = 1.0

    @property
    def starts(self) -> range:
        return range(self.first, self.last + 1, self.stride)


def stochastic_steps(
    kind: WindowKind, size: int, first: int, last: int, every: int, steps: int, iteration: int, seed: int
) -> list[int]:
    """List the stochastic steps of one iteration, in order, where all groups share them.

    full: every step but the last. random: ``size`` steps whose start is uniform in [first, last], drawn from the key
    (seed, iteration, "window"). sliding: the start is ``first + (iteration // every) mod (last - first + 1)``.
    Raises ValueError as `check_window` and `shared_window` do.
    """
    rule = WindowRule(kind=kind, size=size, first=first, last=last, every=every)
    return shared_window(rule, steps, iteration, seed)


def shared_window(rule: WindowRule, steps: int, iteration: int, seed: int) -> list[int]:
    """List the stochastic steps that all groups of an iteration share, for a schedule of ``steps`` steps.

    Raises ValueError as `check_window` does, and for iso_temporal, whose groups share none.
    """
    check_window(rule, steps)
    if rule.kind == "full":
        return list(range(steps - 1))
    if rule.kind == "iso_temporal":
        raise ValueError("rollout.window.kind: iso_temporal has no shared window, each group draws its own")
    if rule.kind == "random":
        start = _drawn(rule, rng.key(seed, iteration, stream="window"))
    elif rule.strategy == "random":
        start = _drawn(rule, rng.key(seed, iteration // rule.every, stream="window"))
    else:
        start = _slid(rule, iteration)
    return list(range(start, start + rule.size))


def trained_steps(
    stochastic: Sequence[int], fraction: float, iteration: int, seed: int, prompt_id: int, occurrence: int
) -> list[int]:
    """Choose the trained ones among a group's stochastic steps, in order; the rest keeps its noise and no gradient.

    ``floor(fraction n)`` of n steps, the head of a permutation drawn from the key (seed, iteration, prompt_id,
    occurrence), so every group has equally many and all its members the same. DanceGRPO draws them for each sample.
    Raises ValueError for a fraction outside (0, 1] and where none is left.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"rollout.window.fraction: {fraction} is no share of steps; use more than 0 and at most 1")
    # 0.29 * 100 is 28.999...: without the margin a step would be lost to rounding.
    count = math.floor(fraction * len(stochastic) + 1e-9)
    if count < 1:
        raise ValueError(
            f"rollout.window.fraction: {fraction} of {len(stochastic)} stochastic steps leaves none to train; raise it "
            "or widen the window"
        )
    if count == len(stochastic):
        return sorted(stochastic)
    seed_of_group = rng.key(seed, iteration, prompt_id, occurrence, step=_TRAINED, stream="window")
    return sorted(stochastic[i] for i in rng.permutation(seed_of_group, len(stochastic))[:count])


def group_windows(
    rule: WindowRule, steps: int, iteration: int, seed: int, prompt_id: Tensor, occurrence: Tensor
) -> tuple[Tensor, Tensor]:
    """Give each group its stochastic and its trained steps; all groups have as many of each.

    prompt_id, occurrence: int64 [P], of the groups of this process: a group's row depends on its own ids alone, so
    any share of the groups gives the same rows. Returns (stochastic, trained), bool [P, T], trained within stochastic,
    the last column False. Raises ValueError as `check_window`, `trained_steps` and `step_masks` do.
    """
    check_window(rule, steps)
    own = rule.kind == "iso_temporal"
    shared = [] if own else shared_window(rule, steps, iteration, seed)
    stochastic, trained = [], []
    for prompt, again in zip(prompt_id.tolist(), occurrence.tolist(), strict=True):
        window = shared
        if own:
            start = _drawn(rule, rng.key(seed, iteration, prompt, again, stream="window"))
            window = list(range(start, start + rule.size))
        stochastic.append(window)
        trained.append(trained_steps(window, rule.fraction, iteration, seed, prompt, again))
    return step_masks(stochastic, steps), step_masks(trained, steps)


def step_masks(chosen: Sequence[Sequence[int]], steps: int) -> Tensor:
    """Turn each group's list of steps into a row of a bool mask [P, steps].

    Raises ValueError where groups have unequal counts or a step lies outside [0, steps - 2].
    """
    mask = torch.zeros(len(chosen), steps, dtype=torch.bool)
    for row, listed in zip(mask, chosen, strict=True):
        if any(not 0 <= step < steps - 1 for step in listed):
            raise ValueError(f"steps {list(listed)}: only steps 0 to {steps - 2} of {steps} can be stochastic")
        row[list(listed)] = True
    if len(set(mask.sum(1).tolist())) > 1:
        raise ValueError(f"the groups have unequal numbers of steps {mask.sum(1).tolist()}; give each group as many")
    return mask


def _drawn(rule: WindowRule, seed: int) -> int:
    return rule.starts[int(rng.uniform(seed) * len(rule.starts))]


def _slid(rule: WindowRule, iteration: int) -> int:
    """Walk through the starts, staying ``_stay`` iterations at each, and around again."""
    ends = list(accumulate(_stay(rule, start) for start in rule.starts))
    return rule.starts[bisect_right(ends, iteration % ends[-1])]


def _stay(rule: WindowRule, start: int) -> int:
    tau = float(rule.every)
    if rule.strategy == "decaying" and rule.last > rule.first:
        tau += (rule.least - rule.every) * (start - rule.first) / (rule.last - rule.first)
    if rule.strategy == "exponential":
        tau *= math.exp(-rule.rate * max(start - rule.threshold, 0))
    # Rounding errors of whole numbers must not cost an iteration.
    return max(1, math.ceil(tau - 1e-9))


def check_window(rule: WindowRule, steps: int) -> None:
    """Refuse a rule that cannot be on a schedule of ``steps`` steps; call it once before a run.

    Raises ValueError where a window leaves the schedule (``last + size <= steps - 1`` must hold), has no steps or an
    empty range, never moves, or is of an unknown kind or strategy, and for settings of a strategy out of range.
    """
    if steps < 2:
        raise ValueError(
            f"rollout.steps: {steps} leaves no stochastic step, as the last one is deterministic; use at least 2"
        )
    if rule.kind not in get_args(WindowKind):
        raise ValueError(
            f"rollout.window.kind: unknown kind {rule.kind!r}; use one of {', '.join(get_args(WindowKind))}"
        )
    if rule.kind == "full":
        return
    _check_range(rule, steps)
    if rule.kind == "sliding":
        _check_sliding(rule)


def _check_range(rule: WindowRule, steps: int) -> None:
    size, first, last = rule.size, rule.first, rule.last
    if size < 1:
        raise ValueError(f"rollout.window.size: {size} leaves nothing to train; use at least 1")
    if first < 0 or last < first:
        raise ValueError(
            f"rollout.window: starts from first = {first} to last = {last} are no range; use 0 <= first <= last"
        )
    if rule.stride < 1:
        raise ValueError(f"rollout.window.stride: {rule.stride} does not move a window on; use at least 1")
    if last + size > steps - 1:
        most = steps - 1 - size
        mend = f"lower window.last to {most} or less, " if most >= first else "lower window.size, "
        raise ValueError(
            f"rollout.window: {size} steps from last = {last} reach step {last + size - 1}, but with rollout.steps = "
            f"{steps} only steps 0 to {steps - 2} can be stochastic; {mend}or raise rollout.steps"
        )


def _check_sliding(rule: WindowRule) -> None:
    every, known = rule.every, get_args(WindowStrategy)
    if every < 1:
        raise ValueError(f"rollout.window.every: a sliding window cannot move every {every} iterations; use at least 1")
    if rule.strategy not in known:
        raise ValueError(f"rollout.window.strategy: unknown strategy {rule.strategy!r}; use one of {', '.join(known)}")
    if rule.strategy == "decaying" and not 1 <= rule.least <= every:
        raise ValueError(f"rollout.window.least: {rule.least} iterations is not between 1 and window.every = {every}")
    if rule.strategy == "exponential" and not (math.isfinite(rule.rate) and rule.rate >= 0):
        raise ValueError(f"rollout.window.rate: {rule.rate} does not decay; use a finite number of at least 0")
