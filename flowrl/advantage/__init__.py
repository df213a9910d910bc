"""The advantage engine: tensors in, tensors out, for denoising steps and for text tokens.

It needs torch alone and imports itself relatively, so a copy of this folder works inside another project. From
rewards and group ids to a loss: ``estimate`` gives advantages, ``ratio`` and ``clipped`` a loss per step,
``aggregate`` one number.
"""

from .aggregation import AGGREGATIONS, aggregate
from .catalogue import METHODS, Method
from .estimators import CHANNEL_ESTIMATORS, ESTIMATORS, Advantage, dr_grpo, estimate, gdpo, grpo, lite_ppo, rloo
from .kl import k1, k2, k3
from .policy_loss import clip_fraction, clipped, clipped_high, clipped_low
from .ratios import log_ratio, ratio
from .segments import (
    Groups,
    drop_thin_groups,
    group_count,
    group_max,
    group_mean,
    group_min,
    group_std,
    group_sum,
)

__all__ = [
    "AGGREGATIONS",
    "CHANNEL_ESTIMATORS",
    "ESTIMATORS",
    "METHODS",
    "Advantage",
    "Groups",
    "Method",
    "aggregate",
    "clip_fraction",
    "clipped",
    "clipped_high",
    "clipped_low",
    "dr_grpo",
    "drop_thin_groups",
    "estimate",
    "gdpo",
    "group_count",
    "group_max",
    "group_mean",
    "group_min",
    "group_std",
    "group_sum",
    "grpo",
    "k1",
    "k2",
    "k3",
    "lite_ppo",
    "log_ratio",
    "ratio",
    "rloo",
]
