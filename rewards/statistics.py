"""Picture statistics as a reward: mostly a monitor, at times a gate or a target."""

from __future__ import annotations

from flowrl.rewards.media import BOTH, check_positive, frames, mean_by_owner, scored

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.picture_statistics import STATISTICS, measure


class ImageStatistics:
    """One statistic of ``flowrl.scoring.picture_statistics`` as the score, all of them as components.

    statistic: its name; target: None for score = value, a number for score = -|value - target|. Of a video, the mean
    over frames 0, stride, 2 stride ...
    """

    name = "statistics"
    scope = "sample"
    media = BOTH
    minimum = 0.0
    backbone = ""
    deterministic = True
    licence = "Apache-2.0 (flowrl)"

    def __init__(self, statistic: str = "brightness", target: float | None = None, stride: int = 1) -> None:
        if statistic not in STATISTICS:
            raise UserError(f"{self.name}: statistic is {statistic!r}; use one of {', '.join(STATISTICS)}")
        check_positive(self.name, "stride", stride)
        self.statistic, self.target, self.stride = statistic, target, stride
        self.minimum = 0.0 if target is None else float("-inf")

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished pictures or videos; no prompt is read."""
        import numpy as np

        pictures, owner = frames(batch.images, self.stride)
        found = {name: mean_by_owner(values, owner, len(batch)) for name, values in measure(pictures).items()}
        value = found[self.statistic]
        return scored(value if self.target is None else -np.abs(value - np.float32(self.target)), found)
