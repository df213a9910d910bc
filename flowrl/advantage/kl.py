"""Estimators of KL(policy || reference) from the log-probs of samples of the policy.

With x = log_prob - reference_log_prob. All are 0 at x = 0 and per element; the reference carries no gradient. For
Gaussian steps the exact divergence is known and cheaper: these serve tokens and monitors. Source: J. Schulman,
"Approximating KL divergence", 2020; 2402.03300 equation 4 uses k3. Each raises ValueError where the shapes differ;
results are float32 or wider.
"""

from __future__ import annotations

from torch import Tensor

from .ratios import log_ratio


def k1(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """Estimate KL by x: unbiased, of either sign.

    Only as a monitor or inside a reward: as a loss term its expected gradient is 0. x is clamped to +-20.
    """
    return log_ratio(log_prob, reference_log_prob)


def k2(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """Estimate KL by x^2 / 2: biased, never negative.

    Averaged over samples of the policy, its gradient is that of KL. x is clamped to +-20.
    """
    return log_ratio(log_prob, reference_log_prob).square() / 2


def k3(log_prob: Tensor, reference_log_prob: Tensor, limit: float = 10.0) -> Tensor:
    """Estimate KL by exp(-x) + x - 1: unbiased, never negative.

    Values above ``limit`` are cut and carry no gradient. x is clamped to +-20.
    """
    x = log_ratio(log_prob, reference_log_prob)
    # expm1 keeps the digits that exp(-x) - 1 loses near x = 0; what rounding leaves below 0 is 0.
    return ((-x).expm1() + x).clamp(0.0, limit)
