"""Differentiable statistics of pixels: no network, no file. For first runs and for tests of what follows a gradient.

They are easily hacked, which is what they are good for: a model that follows one shows at once what it leaves behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from flowrl.rewards.media import IMAGE

from flowrl.errors import UserError
from flowrl.records import Request
from flowrl.scoring.by_value import ScoredByValue

if TYPE_CHECKING:
    import torch

Statistic = Literal["redness", "brightness", "contrast", "smoothness"]


class PixelStatistic(ScoredByValue):
    """One number of a picture in [0, 1], by ``statistic``.

    redness: mean of R - (G + B) / 2; brightness: mean; contrast: standard deviation over pixels of the mean channel;
    smoothness: minus the mean absolute difference of neighbours.
    """

    name = "pixels"
    scope = "sample"
    media = IMAGE
    minimum = -1.0
    backbone = ""
    deterministic = True
    licence = "Apache-2.0 (flowrl)"
    presets = get_args(Statistic)

    def __init__(self, statistic: Statistic = "redness", preset: str = "") -> None:
        self.statistic = preset or statistic
        if self.statistic not in self.presets:
            raise UserError(f"{self.name}: statistic is {self.statistic!r}; use {', '.join(self.presets)}")

    def value(self, x: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """float [B, 3, H, W] in [0, 1] to float [B]."""
        if self.statistic == "redness":
            return (x[:, 0] - x[:, 1:].mean(1)).mean((1, 2))
        if self.statistic == "brightness":
            return x.mean((1, 2, 3))
        if self.statistic == "contrast":
            return x.mean(1).flatten(1).std(1)
        across, down = x.diff(dim=-1).abs(), x.diff(dim=-2).abs()
        return -(across.mean((1, 2, 3)) + down.mean((1, 2, 3))) / 2


class ColourClass(ScoredByValue):
    """A classifier of a picture's leading primary: ``log softmax(s mean RGB)`` of the class that a request asks for.

    Classes 0, 1, 2 are red, green, blue; a request names its own by ``condition: {attribute: class}``, and one that names
    none scores 0. sharpness: s. It stands for the offline classifier of a new condition (CTRL, 2406.12120).
    """

    name = "colour_class"
    scope = "sample"
    media = IMAGE
    minimum = float("-inf")
    backbone = ""
    deterministic = False  # its score depends on the condition too
    licence = "Apache-2.0 (flowrl)"

    def __init__(self, attribute: str = "colour", sharpness: float = 10.0) -> None:
        self.attribute, self.sharpness = attribute, sharpness

    def value(self, x: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """float [B, 3, H, W] in [0, 1] to float [B], at most 0."""
        known = (self.sharpness * x.mean((2, 3))).log_softmax(1)
        asked = [request.metadata.get("condition", {}).get(self.attribute, -1) for request in requests]
        if not all(isinstance(y, int) and -1 <= y < 3 for y in asked):
            raise UserError(f"{self.name}: condition.{self.attribute} must be 0, 1 or 2, found {asked}")
        classes = x.new_tensor(asked).long()
        found = known.gather(1, classes.clamp(min=0)[:, None])[:, 0]
        return found.masked_fill(classes < 0, 0.0)
