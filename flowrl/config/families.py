"""Families of objectives: what kind of sample each learns from, known from its table in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from flowrl import registry

Family = Literal["trajectory", "forward", "direct"]
_TABLES: Mapping[str, Family] = MappingProxyType(
    {
        "flowrl.objectives.forms:FORMS": "trajectory",
        "flowrl.objectives.forward:FORWARD": "forward",
        "flowrl.objectives.differentiable:DIRECT": "direct",
    }
)


def family_of(name: str) -> Family:
    """The family of a named objective: trajectory (stochastic steps with log-probs), forward (finished samples, noised
    anew) or direct (a differentiable reward). An unknown name counts as trajectory: other checks refuse it.
    """
    return _TABLES.get(registry.targets("objective").get(name, ""), "trajectory")
