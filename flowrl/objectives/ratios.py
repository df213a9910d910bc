"""Forms of the importance ratio of a denoising step: plain, debiased, normalised.

A step is ``x_next = old_mean + std eps`` under the policy that drew it. With ``d = mean - old_mean`` and one reduction R
over latent elements (``sum``, ``mean`` = sum / D, ``sqrt`` = sum / sqrt D) for everything, the log ratios are exactly

    plain         R[eps d] / std - R[d^2] / (2 std^2)     its mean under the old policy is -KL; spread R-norm(d) / std
    debiased      R[eps d] / std                          mean 0, the same spread
    normalised    R[eps d]                                mean 0, spread free of std: RatioNorm of GRPO-Guard

A form is a transform of the pair (log_prob, old_log_prob), so any policy loss can follow. What a clip range means depends
on the form and on the reduction: the normalised log ratio is std times the plain one.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from flowrl.advantage.checks import check_choice
from flowrl.advantage.ratios import widen
from flowrl.dynamics.log_prob import gaussian_kl
from flowrl.records import LogProbReduction

RatioForm = Literal["plain", "debiased", "normalised"]


def reduction_factor(reduction: LogProbReduction, elements: int) -> float:
    """Return what a sum over ``elements`` latent elements is multiplied by: 1 (sum), 1 / D (mean), 1 / sqrt D (sqrt).

    Raises ValueError for an unknown reduction or elements < 1.
    """
    if elements < 1:
        raise ValueError(f"elements: expected at least 1, got {elements}")
    match reduction:
        case "sum":
            return 1.0
        case "mean":
            return 1.0 / elements
        case "sqrt":
            return 1.0 / math.sqrt(elements)
    raise ValueError(f"reduction: unknown reduction {reduction!r}; use one of {', '.join(get_args(LogProbReduction))}")


def convert_range(value: float, source: LogProbReduction, target: LogProbReduction, elements: int) -> float:
    """Restate a small clip range for another reduction: value * factor(target) / factor(source).

    Exact for bounds on the log ratio, and to first order for bounds on the ratio. Public code states its ranges for
    ``mean``; 1e-4 over 65,536 elements (a 512 x 512 picture of SD3) is 0.0256 for ``sqrt``.
    """
    return value * reduction_factor(target, elements) / reduction_factor(source, elements)


def mean_bias(mean: Tensor, old_mean: Tensor, std: Tensor, reduction: LogProbReduction) -> Tensor:
    """Take what the plain log ratio loses on average: R[(mean - old_mean)^2] / (2 std^2), one number a sample.

    mean: [N, ...], carries the gradient; old_mean: alike, without; std: [N, 1, ..., 1], above 0. reduction: that of the
    log-probs. Returns float32 [N]. GRPO-Guard (2510.22319). Its public code reduces over the batch as well, so that
    every sample gets the same bias; the definition is per sample. Raises ValueError for std <= 0 or another shape.
    """
    _check_means(mean, old_mean)
    return gaussian_kl(mean, old_mean.detach(), std) * reduction_factor(reduction, mean[0].numel())


def divergence(mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Measure how far a step has moved from the policy that drew it: its exact KL in nats an element.

    ``mean over elements of (mean - old_mean)^2 / (2 std^2)``: float32 [N], no gradient, and the same number whatever
    the reduction of the log-probs. Arguments and errors as `mean_bias`. Flow-DPPO (2606.11025).
    """
    return mean_bias(mean.detach(), old_mean, std, "mean")


def log_ratio_pair(
    form: RatioForm,
    log_prob: Tensor,
    old_log_prob: Tensor,
    std: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Transform log-probs so that (first - second) is the log ratio of ``form``; any policy loss may follow.

    plain: (log_prob, old_log_prob). debiased: (log_prob + bias, old_log_prob). normalised: std times these two.
    log_prob, old_log_prob: [N]; std: [N] or [N, 1, ..., 1]; bias: [N] from `mean_bias` under the reduction of the
    log-probs. Gradients flow through log_prob and bias, both of which the correction needs. On policy bias is 0, the
    ratio is exactly 1, and the gradient of the normalised form is std times the plain one. Returns float32 [N] twice.

    GRPO-Guard (2510.22319), RatioNorm; on denoising steps of any kernel, with that kernel's std. Raises ValueError for
    an unknown form, a wrong shape, or what the form needs and is not there.
    """
    if log_prob.ndim != 1 or old_log_prob.shape != log_prob.shape:
        raise ValueError(
            f"log_prob, old_log_prob: expected [N] twice, got {list(log_prob.shape)} and {list(old_log_prob.shape)}"
        )
    check_choice("form", form, get_args(RatioForm))
    now, old = widen(log_prob), widen(old_log_prob.detach())
    if form == "plain":
        return now, old
    if bias is None or bias.shape != now.shape:
        raise ValueError(f"bias: the form {form!r} needs {list(now.shape)} from mean_bias, got {_shape(bias)}")
    now = now + widen(bias)
    if form == "debiased":
        return now, old
    if std is None or std.numel() != now.numel():
        raise ValueError(f"std: the form {form!r} needs one number a sample, {list(now.shape)}, got {_shape(std)}")
    scale = widen(std.detach()).reshape(now.shape)
    return scale * now, scale * old


def noise_pair(
    form: RatioForm, mean: Tensor, old_mean: Tensor, x_next: Tensor, std: Tensor, reduction: LogProbReduction
) -> tuple[Tensor, Tensor]:
    """Give the log ratio of ``form`` from the drawn noise, as the pair (log ratio, 0).

    The module's right-hand sides, with ``eps = (x_next - old_mean) / std``: mathematically (first - second) of
    `log_ratio_pair`, without the subtraction of two log-probs, so its error is relative to the log ratio. Under
    ``mean`` a log-prob is about -1 and float32 resolves 1e-7 of it, 5% of a clip range of 2e-6; here nothing is lost.
    For losses that see the ratio alone. mean: [N, ...], carries the gradient; old_mean, x_next: alike; std:
    [N, 1, ..., 1], above 0. Returns float32 [N] twice. Raises ValueError as `mean_bias`, or for an unknown form.
    """
    check_choice("form", form, get_args(RatioForm))
    _check_means(mean, old_mean)
    if x_next.shape != mean.shape:
        raise ValueError(f"x_next: expected {list(mean.shape)} like mean, got {list(x_next.shape)}")
    if not bool((std > 0).all()):
        raise ValueError("std: expected numbers above 0; a deterministic step has no ratio")
    std = std.float()
    d = mean.float() - old_mean.detach().float()
    noise = (x_next.float() - old_mean.detach().float()) / std
    if form == "normalised":
        element = noise * d
    elif form == "debiased":
        element = noise * d / std
    else:
        element = (noise - d / (2 * std)) * d / std
    value = element.flatten(1).sum(1) * reduction_factor(reduction, mean[0].numel())
    return value, torch.zeros_like(value)


def _check_means(mean: Tensor, old_mean: Tensor) -> None:
    if mean.ndim < 2 or len(mean) == 0 or old_mean.shape != mean.shape:
        raise ValueError(
            f"mean, old_mean: expected [N, ...] twice with N >= 1, got {list(mean.shape)} and {list(old_mean.shape)}"
        )


def _shape(x: Tensor | None) -> str:
    return "nothing" if x is None else str(list(x.shape))
