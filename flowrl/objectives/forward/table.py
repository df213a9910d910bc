"""Which objectives learn from re-noised samples, and what each asks of its draws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from flowrl.objectives import actor_critic
from flowrl.objectives.forward import matching, preferences
from flowrl.objectives.forward.errors import ErrorWeight

INPUTS = frozenset(
    {
        *("value", "target", "old", "reference", "x0_scale", "t", "advantage", "group"),
        *("error", "old_error", "reference_error"),
    }
)
"""What the update can hand to a loss; a loss names those that it takes, and its options are keyword-only."""


@dataclass(frozen=True)
class ForwardForm:
    """One objective. loss: its pure function. weight: of its error, where the config names none. joint: it looks at all
    members of a group at one draw. shared: those need the same (t, noise). silent: a member with advantage 0 has no
    gradient. pairs: only the best and the worst member are trained. surrogate: a policy loss of the engine may take its
    place. offline: it learns from given pairs of pictures, without a rollout.
    """

    loss: Callable[..., Tensor]
    weight: ErrorWeight = "uniform"
    joint: bool = False
    shared: bool = False
    silent: bool = False
    pairs: bool = False
    surrogate: bool = False
    offline: bool = False

    def inputs(self, surrogate: str = "") -> frozenset[str]:
        """What the loss takes, names of INPUTS; surrogate: the policy loss that stands in its place, "" for none."""
        if surrogate:
            return frozenset({"error", "old_error", "advantage"})
        parameters = inspect.signature(self.loss).parameters.values()
        return frozenset(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)

    def needs(self, surrogate: str, anchor: str) -> tuple[bool, bool]:
        """(whether the old policy's outputs are needed, whether the reference's are); anchor: of the penalty, "" for none."""
        names = self.inputs(surrogate)
        old = bool(names & {"old", "old_error"}) or anchor == "old"
        return old, bool(names & {"reference", "reference_error"}) or anchor == "reference"


FORWARD: Mapping[str, ForwardForm] = MappingProxyType(
    {
        "nft": ForwardForm(matching.nft),
        "awm": ForwardForm(matching.awm, silent=True, surrogate=True),
        "orw": ForwardForm(matching.orw),
        "ram": ForwardForm(matching.ram),
        "dpo": ForwardForm(preferences.dpo, joint=True, shared=True, pairs=True, silent=True, offline=True),
        "dpo_online": ForwardForm(preferences.dpo, joint=True, shared=True, pairs=True, silent=True),
        "dgpo": ForwardForm(preferences.dgpo, joint=True, shared=True, silent=True),
        "crd": ForwardForm(preferences.crd, joint=True),
        "ac_flow": ForwardForm(actor_critic.ac_flow),
    }
)
