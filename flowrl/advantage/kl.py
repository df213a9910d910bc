"""Estimators of KL(policy || reference) from the log-probs of samples of the policy.

With x = log_prob - reference_log_prob, clamped to +-20 (verl clamps it in k3 alone). All are 0 at x = 0 and per
element; the reference carries no gradient. Each raises ValueError where the shapes differ; results are float32 or
wider. ``kl_estimate`` takes any of them by name and adds a mask and the off-policy correction. Source: J. Schulman,
"Approximating KL divergence", 2020; 2402.03300 equation 4 uses k3; the straight-through forms are verl's.

What each is good for. In the reward any will do, usually k1 (RLOO, REINFORCE++). In the loss, over samples of the
policy: k2 and the "+" forms have the gradient of KL; k1 has expected gradient 0 (a trap: the penalty reads right and
does nothing) and k3 that of KL(reference || policy).

On denoising steps: both policies are Gaussians of one variance, so the divergence is known exactly and costs nothing
(``gaussian_kl``); the estimators serve as monitors there, and for parity with token code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from .checks import check_number
from .method import Method
from .ratios import log_ratio, ratio, widen

KLName = Literal["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+"]


def k1(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """Estimate KL by x: unbiased, of either sign.

    Only as a monitor or inside a reward: as a loss term its expected gradient is 0. x is clamped to +-20.
    """
    return log_ratio(log_prob, reference_log_prob)


def k_abs(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """Estimate the distance of the policies by |x|: never negative, not an estimate of KL (verl's "abs").

    The gradient is the sign of x, 0 at x = 0. x is clamped to +-20.
    """
    return log_ratio(log_prob, reference_log_prob).abs()


def k2(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """Estimate KL by x^2 / 2: biased, never negative.

    Averaged over samples of the policy, its gradient is that of KL. x is clamped to +-20.
    """
    return log_ratio(log_prob, reference_log_prob).square() / 2


def k3(log_prob: Tensor, reference_log_prob: Tensor, *, limit: float = 10.0) -> Tensor:
    """Estimate KL by exp(-x) + x - 1: unbiased, never negative.

    Values above ``limit`` are cut and carry no gradient. x is clamped to +-20.
    """
    x = log_ratio(log_prob, reference_log_prob)
    # expm1 keeps the digits that exp(-x) - 1 loses near x = 0; what rounding leaves below 0 is 0.
    return ((-x).expm1() + x).clamp(0.0, limit)


def _straight_through(value: Tensor, log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """Keep the value, take the gradient of k2: x."""
    slope = k2(log_prob, reference_log_prob)
    return value.detach() + (slope - slope.detach())


def k1_plus(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """Estimate KL by the value of k1 with the gradient of k2: unbiased in both over samples of the policy."""
    return _straight_through(k1(log_prob, reference_log_prob), log_prob, reference_log_prob)


def abs_plus(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """Take the value |x| with the gradient of k2, which is that of KL over samples of the policy."""
    return _straight_through(k_abs(log_prob, reference_log_prob), log_prob, reference_log_prob)


def k3_plus(log_prob: Tensor, reference_log_prob: Tensor, *, limit: float = 10.0) -> Tensor:
    """Estimate KL by the value of k3 with the gradient of k2: unbiased in both over samples of the policy.

    Values above ``limit`` are cut; the gradient is x whatever the value.
    """
    return _straight_through(k3(log_prob, reference_log_prob, limit=limit), log_prob, reference_log_prob)


_UNLIMITED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"k1": k1, "abs": k_abs, "k2": k2, "k1+": k1_plus, "abs+": abs_plus}
)
_LIMITED = MappingProxyType({"k3": k3, "k3+": k3_plus})


def kl_estimate(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    mask: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    *,
    name: KLName = "k3",
    limit: float = 10.0,
) -> Tensor:
    """Estimate KL(policy || reference) per element by name, corrected for samples of an older policy where asked.

    Value: k(x), or rho k(x) with rho = exp(clamp(log_prob - old_log_prob, -20, 20)) where ``old_log_prob`` is given
    (samples drawn by the old policy). log_prob, reference_log_prob, old_log_prob: floating, one shape, any; mask: bool
    of that shape, elements outside it are 0 and carry no gradient whatever they hold. name: k1, abs, k2, k3, or one of
    the first, second and fourth with "+" (its value, the gradient of k2). limit: > 0, cuts k3.

    The correction's gradient flows through rho and k alike (TRL's use_bias_correction_kl; DeepSeek-V3.2, 2512.02556),
    so that rho k1 and rho k3 have value and gradient of KL under samples of the old policy, on-policy included. The
    gradient of a "+" form is a KL gradient by itself, so there rho is a weight without gradient.

    The result is float32 or wider. Raises ValueError, naming the argument, for an unknown name, a limit out of range,
    or shapes that differ.
    """
    if name not in _UNLIMITED and name not in _LIMITED:
        raise ValueError(f"name: expected one of {', '.join((*_UNLIMITED, *_LIMITED))}, got {name!r}")
    check_number("limit", limit, 0.0, strict=True, finite=False)
    if reference_log_prob.shape != log_prob.shape:
        raise ValueError(
            f"reference_log_prob: expected {list(log_prob.shape)} like log_prob, got {list(reference_log_prob.shape)}"
        )
    if mask is None:
        mask = torch.ones_like(log_prob, dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != log_prob.shape:
        raise ValueError(
            f"mask: expected bool {list(log_prob.shape)} like log_prob, got {mask.dtype} {list(mask.shape)}"
        )
    kept = torch.where(mask, log_prob, 0.0)
    reference = torch.where(mask, reference_log_prob.detach(), 0.0)
    value = _LIMITED[name](kept, reference, limit=limit) if name in _LIMITED else _UNLIMITED[name](kept, reference)
    if old_log_prob is None:
        return value
    if old_log_prob.shape != log_prob.shape:
        raise ValueError(f"old_log_prob: expected {list(log_prob.shape)} like log_prob, got {list(old_log_prob.shape)}")
    rho = ratio(kept, torch.where(mask, old_log_prob.detach(), 0.0))
    return value * (rho.detach() if name.endswith("+") else rho)


def gaussian_kl(mean_shift_squared: Tensor, sigma: Tensor) -> Tensor:
    """Take the exact KL of two Gaussian steps of one deviation: |mu - mu_reference|^2 / (2 sigma^2).

    mean_shift_squared: floating, >= 0, any shape: the squared distance of the means, summed over the D latent
    elements, carries the gradient; sigma: > 0, broadcast against it, carries none. With a log-prob that averages over
    elements instead, divide by D: the two reductions must not be mixed. The same in both directions. float32 or wider.
    Raises ValueError where sigma is not positive.

    On denoising steps: what replaces every sampled estimator; the expectation of k1 over samples of the step.
    """
    if not bool((sigma > 0).all()):
        raise ValueError(f"sigma: expected values > 0, got a least value of {float(sigma.min())}")
    return widen(mean_shift_squared) / (2 * widen(sigma.detach()).square())


_OLD_TESTS = "tests/advantage/test_losses.py::"
_TESTS = "tests/advantage/test_kl.py::"
_VANISH = _OLD_TESTS + "test_kl_estimators_vanish_on_policy"

METHODS: tuple[Method, ...] = (
    Method(
        key="k1",
        kind="kl",
        paper_id="",
        title="KL estimator x: unbiased, of either sign",
        tier=2,
        evidence={"exact": _OLD_TESTS + "test_k1_and_k3_average_to_the_exact_kl", "identity": _VANISH},
        call=k1,
    ),
    Method(
        key="abs",
        kind="kl",
        paper_id="",
        title="distance |x| of two policies, never negative",
        tier=2,
        evidence={"exact": _TESTS + "test_values_and_slopes", "formula": _TESTS + "test_against_a_plain_loop"},
        call=k_abs,
    ),
    Method(
        key="k2",
        kind="kl",
        paper_id="",
        title="KL estimator x^2 / 2: the gradient of KL",
        tier=2,
        evidence={"exact": _OLD_TESTS + "test_k2_gradient_is_the_exact_kl_gradient", "identity": _VANISH},
        call=k2,
    ),
    Method(
        key="k3",
        kind="kl",
        paper_id="2402.03300",
        title="KL estimator exp(-x) + x - 1: unbiased, never negative",
        tier=2,
        evidence={"exact": _OLD_TESTS + "test_k1_and_k3_average_to_the_exact_kl", "identity": _VANISH},
        call=k3,
    ),
    *(
        Method(
            key=key,
            kind="kl",
            paper_id="",
            title=title,
            tier=2,
            evidence={"exact": _TESTS + "test_plus_forms_have_the_exact_kl_gradient", "identity": _TESTS + slopes},
            call=call,
        )
        for key, title, call, slopes in (
            ("k1+", "value of k1, gradient of k2", k1_plus, "test_plus_forms_keep_the_value_and_take_the_slope_of_k2"),
            ("abs+", "value |x|, gradient of k2", abs_plus, "test_plus_forms_keep_the_value_and_take_the_slope_of_k2"),
            ("k3+", "value of k3, gradient of k2", k3_plus, "test_plus_forms_keep_the_value_and_take_the_slope_of_k2"),
        )
    ),
    Method(
        key="kl_corrected",
        kind="kl",
        paper_id="2512.02556",
        title="any KL estimator by name, times the importance ratio for samples of an older policy",
        tier=2,
        evidence={
            "exact": _TESTS + "test_corrected_value_and_gradient_off_policy",
            "formula": _TESTS + "test_against_a_plain_loop",
        },
        call=kl_estimate,
    ),
    Method(
        key="gaussian_kl",
        kind="kl",
        paper_id="",
        title="exact KL of two Gaussian denoising steps of one deviation",
        tier=2,
        evidence={"exact": _TESTS + "test_gaussian_kl_is_the_mean_of_k1"},
        call=gaussian_kl,
        exempt={"masked": "takes no mask: distances of means, not sampled log-probs"},
    ),
)
