"""Objectives that take the gradient of a reward: pure functions of tensors."""

from .adjoint_matching import (
    adjoint_matching_loss,
    keep_below_quantile,
    lean_adjoints,
    terminal_adjoint,
    velocity_target,
)
from .outcome import alignprop_loss, draft_loss, refl_loss
from .path_kl import ctrl_loss, step_kl
from .table import DIRECT, DirectForm

__all__ = [
    "DIRECT",
    "DirectForm",
    "adjoint_matching_loss",
    "alignprop_loss",
    "ctrl_loss",
    "draft_loss",
    "keep_below_quantile",
    "lean_adjoints",
    "refl_loss",
    "step_kl",
    "terminal_adjoint",
    "velocity_target",
]
