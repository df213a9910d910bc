"""A rollout with its credit, ready to be trained on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowrl.records import Trajectory
from flowrl.rollout.policy import Prompted


@dataclass(frozen=True)
class TrainingBatch:
    """One rollout ready to be trained on. K transitions of each of B samples are trained.

    row: int64 [B], the row of ``prompted`` that belongs to each sample; advantage, weight: float32 [B, K]; element:
    bool [B, K], what is trained; minibatch: int64 [B], the update a sample belongs to.
    """

    trajectory: Trajectory
    prompted: Prompted
    row: Tensor
    advantage: Tensor
    weight: Tensor
    element: Tensor
    minibatch: Tensor

    @property
    def mask(self) -> Tensor:
        """bool [B]: samples with a trained element."""
        return self.element.any(dim=1)

    @property
    def signal(self) -> Tensor:
        """bool [B]: samples whose policy loss has a gradient."""
        return ((self.advantage != 0) & (self.weight != 0) & self.element).any(dim=1)
