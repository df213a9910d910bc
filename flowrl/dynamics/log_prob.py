"""Log-probabilities of transitions and their divergence from a reference policy, in float32.

Latents have D elements a sample. All tensors are [B, ...] with at least one latent dimension; std is [B, 1, ..., 1].
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

from flowrl.dynamics.kernels import StepPoint
from flowrl.records import LogProbReduction

KlForm = Literal["paper", "no_dt", "velocity"]


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, reduction: LogProbReduction) -> Tensor:
    """Take the log-density of a transition, reduced over its latent elements.

    Each element: ``-(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2``. reduction: ``sum`` is the joint
    density, ``mean`` is sum / D (what public code uses), ``sqrt`` is sum / sqrt(D), whose ratio keeps the same
    spread at any latent size. Clip ranges depend on the reduction. float32 resolves about 1e-7 of the value, so for
    a large D (100,000 and more) the ratio of two ``sum`` log-probs is good to a percent only.

    Gradients flow to every input that asks for one. Returns float32 [B]. Raises ValueError where std is not above 0,
    or for an unknown reduction.
    """
    _require_noise(std, "log_prob")
    std = std.float()
    deviation = (x_next.float() - mean.float()) / std
    return _reduce(-0.5 * deviation.square() - std.log() - 0.5 * math.log(2 * math.pi), reduction)


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """Take KL(N(mean, std^2) || N(mean_ref, std^2)) of the joint transition, in nats.

    ``||mean - mean_ref||^2 / (2 std^2)``, summed over latent elements; float32 [B]. Raises ValueError where std is
    not above 0.
    """
    _require_noise(std, "gaussian_kl")
    return _reduce(((mean.float() - mean_ref.float()) / std.float()).square() / 2, "sum")


def reference_kl(
    form: KlForm, mean: Tensor, mean_ref: Tensor, std: Tensor, point: StepPoint, value: Tensor, value_ref: Tensor
) -> Tensor:
    """Measure the distance from the reference policy at one step, as a mean over latent elements. float32 [B].

    paper: ``(mean - mean_ref)^2 / (2 std^2)``, the exact KL of the step in nats an element (Flow-GRPO, 2505.05470).
    no_dt: ``(mean - mean_ref)^2 dt / (2 std^2)``, ``dt = t - t_next``: paper with std^2 replaced by std^2 / dt; nats an
        element times units of t. For Euler-Maruyama it is ``(mean - mean_ref)^2 / (2 g^2)``, what Flow-GRPO's public
        code for SD3, Flux and Qwen computes. It is dt times paper, so an equal pull takes a weight 1 / dt larger
        (10 times with 10 even steps). Public code does not take dt out for CPS: its CPS penalty is our paper form.
    velocity: ``(value - value_ref)^2`` in squared units of the network's output; it uses no std, so it also holds on
        deterministic steps.

    value, value_ref: outputs of the two policies after guidance, both of one kind. Raises ValueError for an unknown
    form and, except for velocity, where std is not above 0.
    """
    match form:
        case "velocity":
            return _reduce((value.float() - value_ref.float()).square(), "mean")
        case "paper" | "no_dt":
            _require_noise(std, f"reference_kl {form!r}")
            nats = ((mean.float() - mean_ref.float()) / std.float()).square() / 2
            return _reduce(nats if form == "paper" else nats * point.length, "mean")
    raise ValueError(f"objective.kl.form: unknown form {form!r}; use one of {', '.join(get_args(KlForm))}")


def _reduce(elements: Tensor, reduction: LogProbReduction) -> Tensor:
    flat = elements.flatten(1)
    match reduction:
        case "sum":
            return flat.sum(1)
        case "mean":
            return flat.mean(1)
        case "sqrt":
            return flat.sum(1) / math.sqrt(flat.shape[1])
    raise ValueError(
        f"objective.log_prob_reduction: unknown reduction {reduction!r}; "
        f"use one of {', '.join(get_args(LogProbReduction))}"
    )


def _require_noise(std: Tensor, where: str) -> None:
    if not bool((std > 0).all()):
        raise ValueError(
            f"{where}: a step with std 0 (or not a number) has no log-prob or divergence; leave deterministic steps, "
            "such as the last one, out of the trained steps, or give the kernel more noise"
        )
