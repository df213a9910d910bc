"""Settings of policy gradients on deterministic sampling from neighbouring noises, and their checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowrl.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """How objective.name=neighbor_grpo draws and compares the members of a group; no other objective reads it.

    sigma: distance of the start noises in (0, 1], each sqrt(1 - sigma^2) times one noise of the group plus sigma times its
    own. anchors: members a group whose step is made again under the present weights. temperature: of the softmax over
    squared distances; null takes the group's own mean squared distance at the step, so that no member is out of reach in
    high dimension. power: of the quasi-norm that advantages of a group are divided by, in (0, 2]; 2 is the usual
    deviation but for the root of the group's size. 2511.16955 has 0.3, 4, 1 and 0.8.
    """

    sigma: float = 0.3
    anchors: int = 4
    temperature: float | None = None
    power: float = 0.8


def problems(config: Config) -> Iterator[str]:
    """Say what is wrong with ``neighbours`` and what the method asks of the rest, one line each."""
    n, o = config.neighbours, config.objective
    if o.name != "neighbor_grpo":
        if n != Neighbours():
            yield (
                f"neighbours: objective.name={o.name} compares no neighbours; remove the section, or use "
                "objective.name=neighbor_grpo"
            )
        return
    if not 0 < n.sigma <= 1:
        yield f"neighbours.sigma: {n.sigma} is out of range; use more than 0 and at most 1"
    if not 1 <= n.anchors <= config.batch.group_size:
        yield (
            f"neighbours.anchors: {n.anchors} members are no choice among {config.batch.group_size} (batch.group_size); "
            "use 1 to that"
        )
    if n.temperature is not None and not n.temperature > 0:
        yield f"neighbours.temperature: {n.temperature} is out of range; use more than 0, or null"
    if not 0 < n.power <= 2:
        yield f"neighbours.power: {n.power} is out of range; use more than 0 and at most 2"
    rollout = config.rollout
    if rollout.share_prefix or rollout.seeds > 1 or rollout.splits:
        yield (
            "rollout.share_prefix: members of neighbor_grpo start from neighbouring noises and share no latent; set "
            "share_prefix=false, without seeds and splits"
        )
    if o.kl.form != "none":
        yield "objective.kl.form: neighbor_grpo has no penalty towards the pre-trained model; set it to none"
    if config.credit.values != "none":
        yield "credit.values: neighbor_grpo credits whole samples; set it to none"
    if o.step_weight:
        yield f"objective.step_weight: {o.step_weight} weighs by noise, and neighbor_grpo draws none; remove it"
