"""Classifier-free guidance: one prediction out of a conditional and an unconditional one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from flowrl.protocols import GuidanceRule


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor, rule: GuidanceRule) -> Tensor:
    """Combine two predictions of one kind (2207.12598): ``g = unconditional + scale (conditional - unconditional)``.

    linear: g itself. norm_preserving: ``g ||conditional|| / ||g||`` with one norm a token, as Qwen-Image's public
    pipeline has it, so that a large scale turns the prediction without lengthening it. A scale of 1 gives the conditional
    prediction exactly, under both.
    conditional, unconditional: [B, ...]; norm_preserving takes packed latents [B, tokens, channels]. scale: one for all,
    or [B].
    Returns float32 [B, ...]. Raises ValueError for another rule, or for latents that are not packed; ``embedded``
    guidance happens inside the network and has nothing to combine.
    """
    if rule not in ("linear", "norm_preserving"):
        raise ValueError(
            f"guidance rule {rule!r} combines no predictions; use linear or norm_preserving in the adapter"
        )
    conditional, unconditional = conditional.float(), unconditional.float()
    if isinstance(scale, Tensor):
        scale = scale.reshape(-1, *[1] * (conditional.ndim - 1))
        guided = torch.where(scale == 1, conditional, unconditional + scale * (conditional - unconditional))
    elif scale == 1:
        return conditional
    else:
        guided = unconditional + scale * (conditional - unconditional)
    if rule == "linear":
        return guided
    if guided.ndim != 3:
        raise ValueError(
            f"norm_preserving guidance: latents of shape {tuple(guided.shape)} are not [B, tokens, channels]"
        )
    # The floor keeps a prediction of exactly 0 at 0 in place of 0 / 0.
    length: Tensor = vector_norm(guided, dim=-1, keepdim=True).clamp_min(1e-20)
    wanted: Tensor = vector_norm(conditional, dim=-1, keepdim=True)
    return guided * (wanted / length)
