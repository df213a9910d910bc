"""A new condition beside the prompt: which attributes it has, and where it enters the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowrl.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Condition:
    """attributes: {name: number of classes}; empty: no new condition. tensor: the conditioning tensor of the adapter that the
    classes' vectors are added to (sd3: pooled; stable_diffusion: hidden).

    A prompt asks for classes in its metadata, ``condition: {name: class}``; those without any are served by the pre-trained
    model. Training rows are multiplied out: every prompt with every choice of classes, an attribute left out among them.
    """

    attributes: dict[str, int] = field(default_factory=dict)
    tensor: str = "pooled"


def problems(config: Config) -> Iterator[str]:
    """Say what is wrong with ``condition``, one line each."""
    condition = config.condition
    if config.objective.name == "ctrl" and not condition.attributes:
        yield "condition.attributes: ctrl learns a new condition; name it, as in condition.attributes={colour: 6}"
    if not condition.attributes:
        return
    for name, classes in condition.attributes.items():
        if classes < 2:
            yield f"condition.attributes.{name}: {classes} class is no choice; use at least 2"
    if config.model.train == "full":
        yield "model.train: full changes what the model makes without the condition as well; use lora with condition"
