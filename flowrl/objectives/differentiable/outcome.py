"""Losses of methods that differentiate the reward of a finished picture: ReFL, DRaFT, AlignProp."""

from __future__ import annotations

import torch
from torch import Tensor


def refl_loss(reward: Tensor, margin: float = 2.0, scale: float = 1e-3) -> Tensor:
    """Hinge on the reward of a one-step estimate of the picture: ``scale max(0, margin - r)``, [B] to [B].

    ReFL (2304.05977) maps rewards by ReLU; its public code uses margin 2 and scale 1e-3. A sample whose
    reward is above the margin has no gradient.
    """
    return scale * torch.relu(margin - reward)


def draft_loss(rewards: Tensor) -> Tensor:
    """Minus the reward, averaged over the pictures of a sample: float [N, B] to [B].

    N = 1 is DRaFT-K: the picture at the end of the chain. DRaFT-LV adds pictures of the same sample, noised again to the
    last step and denoised (2309.17400, which adds their gradients up; the mean differs by a factor N).
    """
    if rewards.ndim != 2:
        raise ValueError(f"draft_loss: rewards have shape {list(rewards.shape)}; give [pictures of a sample, samples]")
    return -rewards.mean(0)


def alignprop_loss(reward: Tensor, target: float | None = None) -> Tensor:
    """Minus the reward, or its distance ``|r - target|`` from a target that shall not be passed; [B] to [B].

    AlignProp (2310.03739) and its public code.
    """
    return -reward if target is None else (reward - target).abs()
