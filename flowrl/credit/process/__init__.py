"""Process rewards: values of latents on the way, from outcome rewards, latent networks, or features of a generator."""

from flowrl.credit.process.combine import Combined, ProcessMember, ProcessSet
from flowrl.credit.process.context import NeedsContext, ProcessContext
from flowrl.credit.process.extrapolation import Extrapolation
from flowrl.credit.process.guard import Asked, ask, ask_gradient
from flowrl.credit.process.learned import FeatureReward, LatentReward

__all__ = [
    "Asked",
    "Combined",
    "Extrapolation",
    "FeatureReward",
    "LatentReward",
    "NeedsContext",
    "ProcessContext",
    "ProcessMember",
    "ProcessSet",
    "ask",
    "ask_gradient",
]
