"""Checks at run time: the start-up self-check and what happens to numbers that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.errors import UserError
from flowrl.rollout.policy import Policy
from flowrl.training.batch import TrainingBatch
from flowrl.training.update import replay_log_prob

MAX_SKIPPED = 3


@torch.no_grad()
def self_check(policy: Policy, batch: TrainingBatch, rows: Tensor, exact: bool) -> float:
    """Recompute the rollout's log-probs through the update's path, at the batch shape of the rollout.

    Returns the largest absolute difference. Raises UserError where it is above 0 (``exact``: CPU, float32) or above 1e-6
    times max(1, |log-prob|): the ratio would not start at 1, and every update would follow a wrong gradient.
    """
    stored = batch.trajectory.old_log_prob
    if stored is None:
        raise ValueError("self_check: the trajectory holds no log-probs")
    worst = 0.0
    for k in range(stored.shape[1]):
        now = replay_log_prob(policy, batch, rows, k)
        old = stored[rows, k]
        difference = (now - old).abs()
        allowed = torch.zeros_like(old) if exact else 1e-6 * old.abs().clamp(min=1)
        finite = torch.isfinite(old)
        worst = max(worst, float(difference[finite].max()) if finite.any() else 0.0)
        if bool((difference[finite] > allowed[finite]).any()):
            step = int(batch.trajectory.step[0, k]) if batch.trajectory.step is not None else k
            raise UserError(
                f"start-up self-check: the log-prob of step {step} recomputed for the update differs from the rollout's by "
                f"up to {float(difference[finite].max()):.3g}. Rollout and update must run the network alike: check the "
                "adapter for dropout or state kept between calls, use one attention backend, or set model.dtype=fp32."
            )
    return worst


class SkippedUpdates:
    """Counts updates whose gradient was not finite; such an update changes nothing."""

    def __init__(self) -> None:
        self.total = 0
        self.consecutive = 0

    def note(self, finite: bool) -> None:
        self.consecutive = 0 if finite else self.consecutive + 1
        self.total += not finite

    @property
    def hopeless(self) -> bool:
        return self.consecutive >= MAX_SKIPPED

    def state(self) -> dict[str, int]:
        return {"total": self.total, "consecutive": self.consecutive}

    def load(self, state: dict[str, int]) -> None:
        self.total, self.consecutive = state["total"], state["consecutive"]
