"""Scoring heads on top of an embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.rewards.loading import load_head

from flowrl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

LINEAR_STACK = (0, 2, 4, 6, 7)
"""Places of the linear layers in the ``layers`` of the LAION aesthetic predictor and of ImageReward (the rest is dropout)."""

Layer = tuple["torch.Tensor", "torch.Tensor"]


def read_linear_stack(
    path: str, reward: str, width: int, places: Sequence[int] = LINEAR_STACK, prefix: str = "layers"
) -> list[Layer]:
    """Weight [out, in] and bias [out] of each layer ``<prefix>.<place>``, checked to fit one another and ``width``.

    Raises UserError (see ``loading.load_head``), also where the first layer takes another width.
    """
    names = [f"{prefix}.{place}" for place in places]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        shapes |= {f"{name}.weight": (-1, -1), f"{name}.bias": (-1,)}
    tensors = load_head(path, reward, shapes)
    layers = [(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names]
    expected = width
    for name, (weight, bias) in zip(names, layers, strict=True):
        if weight.shape[1] != expected or len(bias) != len(weight):
            raise UserError(
                f"{reward}: {path!r}: {name} takes {weight.shape[1]} numbers where {expected} arrive; the head belongs to "
                "another backbone"
            )
        expected = len(weight)
    return layers


def linear_stack(x: torch.Tensor, layers: Sequence[Layer]) -> torch.Tensor:
    """x <- W x + b for each layer, with nothing between them. x: float32 [N, D]; returns [N, out]."""
    for weight, bias in layers:
        x = x @ weight.T + bias
    return x
