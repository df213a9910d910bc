"""A rollout with its credit, ready to be trained on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowrl.config.schema import Batch
from flowrl.records import Prompted, Trajectory


@dataclass(frozen=True)
class Visit:
    """Which iteration this is: the key of its noise, and the weights that draw."""

    seed: int
    iteration: int
    policy_version: int


def update_of(group_id: Tensor, batch: Batch, updates: int) -> Tensor:
    """The update, 0 to updates - 1, that each group belongs to: int64, a contiguous part of all processes' groups each."""
    return group_id % batch.groups * updates // batch.groups


@dataclass(frozen=True)
class TrainingBatch:
    """One rollout ready to be trained on. K transitions of each of B samples are trained; K is 1 without transitions.

    row: int64 [B], the row of ``prompted`` that belongs to each sample; advantage, weight: float32 [B, K]; element:
    bool [B, K], what is trained; minibatch: int64 [B], the update a sample belongs to. score: float64 [B], NaN where it
    is not valid; first_chunk: int64 [N], the samples of the rollout's first network call; visit: the key of its noise.
    process_advantage: float32 [B, K], a second stream of credit (euphonium).
    """

    trajectory: Trajectory
    prompted: Prompted
    row: Tensor
    advantage: Tensor
    weight: Tensor
    element: Tensor
    minibatch: Tensor
    score: Tensor | None = None
    first_chunk: Tensor | None = None
    visit: Visit | None = None
    process_advantage: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """bool [B]: samples with a trained element."""
        return self.element.any(dim=1)

    @property
    def signal(self) -> Tensor:
        """bool [B]: samples whose policy loss has a gradient."""
        return ((self.advantage != 0) & (self.weight != 0) & self.element).any(dim=1)
