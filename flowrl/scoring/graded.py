"""Rewards with a gradient: the same reward classes, asked through torch instead of finished uint8 pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.config.rewards import Shape, apply_preset, labels, read_shaping, short_name, split_preset
from flowrl.config.schema import RewardEntry
from flowrl.errors import UserError
from flowrl.protocols import DifferentiableReward, TextReward
from flowrl.records import Request
from flowrl.registry import check_arguments, resolve

Decode = Callable[[Tensor, Request], Tensor]
"""(x0 with gradient, request) -> pictures float32 [B, 3, H, W] in [0, 1], as an adapter's ``decode``."""


@dataclass(frozen=True)
class Graded:
    """What the rewards say of latents and how that changes with them; everything detached.

    loss: float32 [B]; gradient: d loss / d x0 like x0, 0 where not valid; score: float32 [B], the weighted sum; scores: by
    label, float32 [B], each reward on its own scale; valid: bool [B], value and gradient are finite.
    """

    loss: Tensor
    gradient: Tensor
    score: Tensor
    scores: Mapping[str, Tensor]
    valid: Tensor

    @staticmethod
    def join(parts: Sequence[Graded]) -> Graded:
        """All rows, in order."""
        return Graded(
            torch.cat([p.loss for p in parts]),
            torch.cat([p.gradient for p in parts]),
            torch.cat([p.score for p in parts]),
            {label: torch.cat([p.scores[label] for p in parts]) for label in parts[0].scores},
            torch.cat([p.valid for p in parts]),
        )


class GradedRewards:
    """The trained rewards of a run, each loaded once more beside the runtime's, for their gradient.

    Raises UserError for a reward that declares no gradient, or shaping that has none.
    """

    def __init__(self, entries: Sequence[RewardEntry]) -> None:
        self._members: list[tuple[str, float, DifferentiableReward | TextReward, tuple[Shape, ...]]] = []
        for label, entry in zip(labels(entries), entries, strict=True):
            if entry.duty == "train":
                reward, divisor = _load(entry)
                self._members.append((label, entry.weight / divisor, reward, _smooth(entry)))

    @property
    def needs_pictures(self) -> bool:
        return any(reward.differentiable == "pictures" for _, _, reward, _ in self._members)

    @property
    def needs_text(self) -> bool:
        return any(isinstance(reward, TextReward) for _, _, reward, _ in self._members)

    @property
    def nbytes(self) -> int:
        """Bytes that these second copies say they hold."""
        return sum(int(getattr(reward, "nbytes", 0)) for _, _, reward, _ in self._members)

    def grade(
        self,
        x0: Tensor,
        requests: Sequence[Request],
        decode: Decode,
        objective: Callable[[Tensor], Tensor],
        text: Tensor | None = None,
    ) -> Graded:
        """Score latents and differentiate. x0: [B, ...]; objective: score [B] -> loss [B], each sample's own.

        text: pooled text [B, D], for rewards that read it (TextReward).

        Decodes once, with gradient, and only where a reward reads pictures.
        """
        with torch.enable_grad():
            point = x0.detach().float().requires_grad_()
            pictures = decode(point, requests[0]) if self.needs_pictures else None
            total = torch.zeros(len(x0), device=x0.device)
            scores = {}
            for label, weight, reward, shapes in self._members:
                value = _value(label, reward, point, pictures, requests, text)
                scores[label] = value.detach()
                total = total + weight * _shaped(value, shapes)
            loss = objective(total)
            (gradient,) = torch.autograd.grad(loss.sum(), point, allow_unused=True)
        gradient = torch.zeros_like(point) if gradient is None else gradient
        valid = torch.isfinite(total.detach()) & torch.isfinite(gradient).flatten(1).all(1)
        mask = valid.reshape(-1, *[1] * (x0.ndim - 1))
        # where, not a product: 0 times infinity is no number.
        gradient = torch.where(mask, gradient, torch.zeros_like(gradient))
        return Graded(loss.detach(), gradient, total.detach(), scores, valid)


def _load(entry: RewardEntry) -> tuple[DifferentiableReward | TextReward, float]:
    key, _ = split_preset(entry.name)
    found = resolve("reward", key)
    args, divisor = apply_preset(entry.name, entry.args, found)
    problems = check_arguments("reward", key, args) if isinstance(found, type) else []
    if problems:
        raise UserError(f"reward {key!r}: args: " + "; ".join(problems))
    made: Any = found(**args) if isinstance(found, type) else found
    if not isinstance(made, DifferentiableReward) or made.differentiable not in ("pictures", "latents"):
        raise UserError(
            f"reward {short_name(entry.name)!r}: it declares no gradient (differentiable = 'pictures' or 'latents' and a "
            "method value); use one that does, or an objective that needs none, such as flow_grpo"
        )
    return made, divisor


def _smooth(entry: RewardEntry) -> tuple[Shape, ...]:
    shapes = read_shaping(entry.shaping)[0]
    for shape in shapes:
        if shape.kind in ("rank", "gate"):
            raise UserError(f"reward {short_name(entry.name)!r}: shaping by {shape.kind} has no gradient; remove it")
    return shapes


def _value(
    label: str,
    reward: DifferentiableReward | TextReward,
    x0: Tensor,
    pictures: Tensor | None,
    requests: Sequence[Request],
    text: Tensor | None,
) -> Tensor:
    read = x0 if reward.differentiable == "latents" or pictures is None else pictures
    if isinstance(reward, TextReward):
        if text is None:
            raise ValueError(f"reward {label!r}: it reads pooled text, and none was given")
        value = reward.value(read, requests, text)
    else:
        value = reward.value(read, requests)
    if value.shape != (len(x0),):
        raise UserError(
            f"reward {label!r}: value returned shape {list(value.shape)} for {len(x0)} samples; return one number a sample"
        )
    return value.float()


def _shaped(value: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """The runtime's shaping steps, in torch."""
    for shape in shapes:
        first, second = shape.numbers
        if shape.kind == "affine":
            value = first * value + second
        elif shape.kind == "clip":
            value = value.clamp(first, second)
        else:
            value = torch.sigmoid((value - first) / second)
    return value
