"""Weights of the steps of a schedule: how much each step's loss counts, as a function of the kernel alone.

With the plain ratio the gradient of a step's log-prob with respect to the velocity has the scale ``slope / std`` a unit
of noise, where ``slope = |d mean / d velocity|`` (``flowrl.dynamics.mean_slope``). For Flow-GRPO's kernel with a = 0.7
and 10 even steps that is 0.143 at the first step and 1.687 at the last but one. A ratio form and a weight change it:

| ratio, weight | scale | used by |
|---|---|---|
| plain, none | slope / std | Flow-GRPO, DanceGRPO, DDPO |
| plain, std | slope | TempFlow-GRPO |
| normalised, none | slope | RatioNorm |
| normalised, inverse_dt | slope / dt | GRPO-Guard's public code |
| plain, std_over_dt | slope / dt | the same |
| normalised, inverse_slope | 1 | GRPO-Guard on any kernel |
| plain, std_over_slope | 1 | Flash-GRPO |
| plain, dt_std_over_slope | dt | PCPO |
| plain, dt | dt slope / std | |
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from flowrl.advantage.checks import check_choice
from flowrl.advantage.moments import Reduce, total
from flowrl.advantage.ratios import widen

StepWeight = Literal[
    "none", "std", "inverse_dt", "inverse_slope", "std_over_slope", "dt", "std_over_dt", "dt_std_over_slope"
]
MEAN_ONE: frozenset[str] = frozenset({"std", "std_over_slope", "dt", "dt_std_over_slope"})
"""Forms that are divided by their mean over the trained steps (`normalise_weights`)."""


def step_weight(form: StepWeight, std: Tensor, dt: Tensor, slope: Tensor) -> Tensor:
    """Weigh steps by what the kernel does there: one of the module's table, before any normalisation.

    none: 1. std: TempFlow-GRPO (2508.04324, equation 8). inverse_dt: 1 / dt, GRPO-Guard's public code (2510.22319).
    inverse_slope: 1 / slope, its extension to every kernel: equal to inverse_dt up to the constant 1 + a^2 / 2 for
    Flow-GRPO's (reconstructed; the paper's section on other kernels could not be read). std_over_slope: Flash-GRPO
    (2605.15980). dt_std_over_slope: PCPO for flows (2509.25774, proposition 2), which makes a step's credit
    proportional to dt. dt: the step's length. std_over_dt: inverse_dt for the plain ratio.

    std, dt, slope: above 0, one number a sample, [N] or [N, 1, ..., 1]. Returns float32 [N] (float64 for float64), no
    gradient. Raises ValueError for an unknown form, sizes that differ, or a number that the form uses and is not
    finite and above 0 (a deterministic step has std 0).
    """
    check_choice("form", form, get_args(StepWeight))
    values = {"std": std, "dt": dt, "slope": slope}
    if len({value.numel() for value in values.values()}) != 1:
        raise ValueError(
            "std, dt, slope: expected one number a sample in each, got "
            + ", ".join(str(list(value.shape)) for value in values.values())
        )
    s, h, m = (widen(value.detach()).flatten() for value in values.values())
    made = {
        "none": torch.ones_like(s),
        "std": s,
        "inverse_dt": 1 / h,
        "inverse_slope": 1 / m,
        "std_over_slope": s / m,
        "dt": h,
        "std_over_dt": s / h,
        "dt_std_over_slope": h * s / m,
    }[form]
    if not bool((made.isfinite() & (made > 0)).all()):
        raise ValueError(
            f"step weight {form!r}: not finite and above 0 everywhere; std, dt and slope must be above 0, so leave "
            "deterministic steps out of the trained ones"
        )
    return made


def normalise_weights(
    weight: Tensor, element: Tensor, *, scale: Tensor | None = None, reduce: Reduce | None = None
) -> Tensor:
    """Divide weights by their mean over the trained elements: w n / sum w, 0 on the others.

    weight: real, any shape, >= 0; element: bool, alike, what is trained; n counts it. scale: like weight, a gradient
    scale to hold instead of the plain count: w sum(scale) / sum(w scale), so that the total of w scale stays that of
    scale; with ``slope / std`` and the weight ``dt_std_over_slope`` this is PCPO's zeta (2509.25774, proposition 2).
    reduce: sums over data-parallel ranks, so that the weights do not depend on their number.

    float32, no gradient; what untrained elements hold reaches nothing. All 0 where nothing is trained. Raises
    ValueError for a wrong shape or dtype, or a trained weight or scale that is not finite and >= 0.
    """
    if element.dtype != torch.bool or element.shape != weight.shape:
        raise ValueError(
            f"element: expected bool {list(weight.shape)} like weight, got {element.dtype} {list(element.shape)}"
        )
    kept = torch.where(element, weight.detach().double(), 0.0)
    held = torch.where(element, torch.ones_like(kept) if scale is None else scale.detach().double(), 0.0)
    for name, value in (("weight", kept), ("scale", held)):
        if not bool((value.isfinite() & (value >= 0)).all()):
            raise ValueError(f"{name}: expected finite numbers >= 0 on the trained elements")
    parts = total(torch.stack([held.sum(), (kept * held).sum()]), reduce)
    return (kept * torch.where(parts[1] > 0, parts[0] / parts[1], 0.0)).float()
