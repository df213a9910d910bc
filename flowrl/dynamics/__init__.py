"""Paths between data and noise, step kernels, log-probs, divergences, stochastic windows and guidance. torch only."""

from flowrl.dynamics.guidance import guide
from flowrl.dynamics.interpolants import endpoints, interpolate, prediction_from_endpoints, score
from flowrl.dynamics.kernels import (
    KERNELS,
    MEMORYLESS_NOISE,
    StepPoint,
    check_kernel,
    is_stochastic,
    mean_slope,
    mixing,
    next_latent,
    transition,
)
from flowrl.dynamics.log_prob import gaussian_kl, log_prob, reference_kl
from flowrl.dynamics.windows import stochastic_steps

__all__ = [
    "KERNELS",
    "MEMORYLESS_NOISE",
    "StepPoint",
    "check_kernel",
    "endpoints",
    "gaussian_kl",
    "guide",
    "interpolate",
    "is_stochastic",
    "log_prob",
    "mean_slope",
    "mixing",
    "next_latent",
    "prediction_from_endpoints",
    "reference_kl",
    "score",
    "stochastic_steps",
    "transition",
]
