"""Paths between data and noise, step kernels, deterministic solvers, log-probs, divergences, stochastic windows and
guidance. torch only."""

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
from flowrl.dynamics.solvers import SOLVERS, History, calls, solver_step
from flowrl.dynamics.windows import (
    WindowRule,
    check_window,
    group_windows,
    shared_window,
    step_masks,
    stochastic_steps,
    trained_steps,
)

__all__ = [
    "KERNELS",
    "MEMORYLESS_NOISE",
    "SOLVERS",
    "History",
    "StepPoint",
    "WindowRule",
    "calls",
    "check_kernel",
    "check_window",
    "endpoints",
    "gaussian_kl",
    "group_windows",
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
    "shared_window",
    "solver_step",
    "step_masks",
    "stochastic_steps",
    "trained_steps",
    "transition",
]
