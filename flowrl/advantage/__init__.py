"""The advantage engine: tensors in, tensors out, for denoising steps and for text tokens.

It needs torch alone and imports itself relatively, so a copy of this folder works inside another project. From
rewards and group ids to a loss: ``estimate`` gives advantages, ``policy_loss`` a loss per step, ``aggregate`` one
number. METHODS lists everything, with its source and its tests.
"""

from .aggregation import AGGREGATIONS, aggregate
from .catalogue import ESTIMATORS, METHODS, POLICY_LOSSES
from .estimators import dr_grpo, gdpo, grpo, lite_ppo, rloo
from .inputs import INPUTS
from .kl import k1, k2, k3
from .loss_record import PolicyLoss
from .method import Method
from .moments import batch_moments, masked_whiten
from .pipeline import estimate, policy_loss
from .policy_loss import clip_fraction, clipped, clipped_high, clipped_low
from .ratios import log_ratio, ratio
from .record import Advantage
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
    "ESTIMATORS",
    "INPUTS",
    "METHODS",
    "POLICY_LOSSES",
    "Advantage",
    "Groups",
    "Method",
    "PolicyLoss",
    "aggregate",
    "batch_moments",
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
    "masked_whiten",
    "policy_loss",
    "ratio",
    "rloo",
]
