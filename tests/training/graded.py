"""Differentiable rewards for small pipelines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.records import Request
from flowrl.scoring.by_value import ScoredByValue


class Red(ScoredByValue):
    """How red a picture is: red minus the mean of the others."""

    name = "red"

    def value(self, x: Tensor, requests: Sequence[Request]) -> Tensor:
        return (x[:, 0] - x[:, 1:].mean(1)).mean((1, 2))


class Flat(ScoredByValue):
    """Minus the variance of x0: no picture is decoded."""

    name, differentiable = "flat", "latents"

    def value(self, x: Tensor, requests: Sequence[Request]) -> Tensor:
        return -x.flatten(1).var(1)


class Broken(ScoredByValue):
    """As Red, but the first ``bad`` samples of every call have no finite value, or no finite gradient."""

    name = "broken"

    def __init__(self, bad: int = 1, where: str = "value") -> None:
        self.bad, self.where = bad, where

    def value(self, x: Tensor, requests: Sequence[Request]) -> Tensor:
        found = x[:, 0].mean((1, 2))
        hit = torch.arange(len(x)) < self.bad
        if self.where == "value":
            return torch.where(hit, torch.nan, found)
        # Value 0, slope infinite times 0; the others must not meet it.
        flat = torch.sqrt(torch.where(hit, (x[:, 0] * 0).flatten(1).sum(1), 1.0))
        return torch.where(hit, flat, found)


class ClassByRed(ScoredByValue):
    """A classifier of two classes by colour: log p(y | picture) of the class that a request asks for, 0 without one."""

    name = "class_by_red"

    def value(self, x: Tensor, requests: Sequence[Request]) -> Tensor:
        logit = 20 * (x[:, 0] - x[:, 2]).mean((1, 2))
        asked = [request.metadata.get("condition", {}).get("hue") for request in requests]
        sign = torch.tensor([0.0 if y is None else 2.0 * y - 1 for y in asked])
        return torch.where(sign == 0, 0.0, torch.nn.functional.logsigmoid(sign * logit))
