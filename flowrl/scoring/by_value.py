"""A reward that is one differentiable function: the base of rewards that need no ``score`` of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from flowrl.errors import UserError
from flowrl.records import Request, RewardBatch, RewardResult

if TYPE_CHECKING:
    from torch import Tensor


class ScoredByValue:
    """A reward that is its differentiable ``value`` on finished pictures: it needs no ``score`` of its own."""

    name = ""
    differentiable: Literal["pictures", "latents"] = "pictures"

    def value(self, x: Tensor, requests: Sequence[Request]) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no value")

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score uint8 pictures, or the latents that came with them, by ``value``."""
        import numpy as np
        import torch

        if self.differentiable == "latents":
            if batch.latents is None:
                raise UserError(f"{self.name}: reads latents, and none came with these pictures")
            x = batch.latents.float()
        else:
            x = torch.from_numpy(np.ascontiguousarray(batch.images)).float().movedim(-1, 1) / 255
        height, width = batch.images.shape[-3:-1]
        requests = [
            Request(prompt, -1, height, width, metadata=data)
            for prompt, data in zip(batch.prompts, batch.metadata, strict=True)
        ]
        with torch.no_grad():
            scores = self.value(x, requests).float().cpu().numpy()
        valid = np.isfinite(scores)
        told = [None if ok else f"{self.name}: the value is not finite" for ok in valid]
        return RewardResult(np.where(valid, scores, np.nan).astype(np.float32), valid, told)
