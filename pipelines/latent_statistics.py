"""Autoencoders that state a mean and a deviation for each latent channel (Wan's and Qwen-Image's)."""

from __future__ import annotations

from typing import Any

import torch


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, -1, *[1] * (like.ndim - 2))
    mean, std = (
        torch.tensor(values).reshape(shape).to(like) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def standardise(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """What the autoencoder makes, [B, C, ...], to what the network works on: (latents - mean) / std a channel."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def unstandardise(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of ``standardise``."""
    mean, std = _statistics(vae, latents)
    return latents * std + mean
