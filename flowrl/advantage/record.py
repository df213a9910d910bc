"""What every estimator returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantage:
    """The result record. Weights are kept apart: nothing is folded into the advantage.

    S is the shape of the method: [B] (one value a sample, the same on all its steps) or [B, T]. advantage: float32 S,
    0 where masked or without signal; weight: float32 S, the factor of each element's loss, 0 where masked; loss_mask:
    bool S, the elements that are trained; live: bool [B], the sample's group has signal; group_mean, group_std: float32
    [B], statistics of the group's rewards (NaN for a group without any), None where the method has no groups.
    returns: float32 S, the critic's target; critic_mask: bool S, where the critic is trained (it may differ from
    loss_mask); clip_scale: float32 S, a factor of the clip range; channels: parts of the result by name (for instance
    low and high), float32, mostly S or [B]. None stands for: the method says nothing about it.
    """

    advantage: Tensor
    weight: Tensor
    loss_mask: Tensor
    live: Tensor
    group_mean: Tensor | None = None
    group_std: Tensor | None = None
    returns: Tensor | None = None
    critic_mask: Tensor | None = None
    clip_scale: Tensor | None = None
    channels: Mapping[str, Tensor] = field(default_factory=dict)

    def over_steps(self, mask: Tensor) -> Advantage:
        """Spread a [B] result over the steps of ``mask`` (bool [B, T]); a [B, T] result is returned as it is.

        Raises ValueError where the mask has another number of rows or another shape than a [B, T] result.
        """
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[: self.advantage.ndim] != self.advantage.shape:
            raise ValueError(
                f"mask: expected bool [B, T] that matches advantage {list(self.advantage.shape)}, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        if self.advantage.ndim == 2:
            return self
        kept = mask if bool(self.loss_mask.all()) else mask & self.loss_mask[:, None]

        def spread(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.where(mask, x[:, None], torch.zeros_like(x[:, None]))

        return replace(
            self,
            advantage=torch.where(kept, self.advantage[:, None], 0.0),
            weight=torch.where(kept, self.weight[:, None], 0.0),
            loss_mask=kept,
            returns=spread(self.returns),
            critic_mask=None if self.critic_mask is None else mask & self.critic_mask[:, None],
            clip_scale=spread(self.clip_scale),
        )
