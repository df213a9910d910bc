"""What the families over 2 x 2 patches share: packing latents into tokens, their positions, and the shifted grid."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.records import Schedule


def pack(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] to tokens [B, H / 2 * W / 2, 4 C], a token holding the four pixels of a patch channel by channel."""
    count, channels, height, width = x.shape
    patches = x.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """The inverse of ``pack``: [B, S, 4 C] to [B, C, H, W], where ``shape`` ends in (C, H, W)."""
    channels, height, width = shape[-3:]
    patches = tokens.reshape(len(tokens), height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), channels, height, width)


def image_ids(x: torch.Tensor, image: int = 0) -> torch.Tensor:
    """Positions (image, row, column) of the tokens of latents [B, C, H, W]: float32 [S, 3]. image: 0, or 1 for a source."""
    rows, columns = torch.meshgrid(torch.arange(x.shape[-2] // 2), torch.arange(x.shape[-1] // 2), indexing="ij")
    first = torch.full_like(rows, image)
    return torch.stack([first, rows, columns], -1).reshape(-1, 3).float()


def shifted_schedule(stock: Any, steps: int, tokens: int) -> Schedule:
    """The grid of Flux and Qwen-Image: 1 to 1 / N in equal parts, shifted by the number of tokens.

    stock: the pipeline's own scheduler, which is left untouched. Times come from its timesteps, as the network gets them.
    """
    import numpy as np
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = type(stock).from_config(stock.config)
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5), config.get("max_shift", 1.15),
    )  # fmt: skip
    sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(steps, device="cpu", sigmas=sigmas, mu=mu)
    return flow_schedule(scheduler)


def flow_schedule(scheduler: Any) -> Schedule:
    """Read the grid off a scheduler whose timesteps are set: alpha = 1 - sigma, t what the network is told, over the total."""
    sigma = scheduler.sigmas.float().cpu()
    t = torch.cat([scheduler.timesteps.float().cpu() / scheduler.config.num_train_timesteps, torch.zeros(1)])
    return Schedule(t=t, alpha=1 - sigma, sigma=sigma)
