"""Several process rewards as one value of a latent, and which noise levels of each may give credit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.credit.networks import noise_level
from flowrl.credit.process.guard import Asked, ask, ask_gradient
from flowrl.credit.quality import linear_fit, pair_counts, rank_correlation
from flowrl.protocols import ProcessReward
from flowrl.records import Prompted

LEVELS = 8
LEAST_PAIRS = 64
"""Pairs that a level must have been seen with before it may be left out."""


@dataclass(frozen=True)
class ProcessMember:
    """One process reward of a run. temperature: values are divided by that of their noise level, as many levels as there
    are numbers, () for none; min_accuracy: pair accuracy below which a level gives no credit, 0 takes all; known: pair
    accuracy of each of ``levels`` levels and its number of pairs, from a quality report made before the run.
    """

    label: str
    reward: ProcessReward
    weight: float = 1.0
    temperature: Sequence[float] = ()
    min_accuracy: float = 0.0
    levels: int = LEVELS
    known: Sequence[tuple[float, int]] = ()

    def ask(self, x: Tensor, t: Tensor, prompted: Prompted) -> Asked:
        """Values over the temperature of their level; see `guard.ask`."""
        found = ask(self.label, self.reward, x, t, prompted)
        if not self.temperature:
            return found
        return Asked(found.values / self._heat(t, found.values), found.valid, None, found.error)

    def ask_gradient(self, x: Tensor, t: Tensor, prompted: Prompted) -> Asked:
        """Values and gradients over the temperature of their level; see `guard.ask_gradient`."""
        found = ask_gradient(self.label, self.reward, x, t, prompted)
        if not self.temperature or found.gradient is None:
            return found
        heat = self._heat(t, found.values)
        gradient = found.gradient / heat.view(-1, *[1] * (x.ndim - 1))
        return Asked(found.values / heat, found.valid, gradient, found.error)

    def _heat(self, t: Tensor, values: Tensor) -> Tensor:
        heat = torch.tensor(list(self.temperature), device=values.device)
        return heat[noise_level(t, len(self.temperature)).to(values.device)]


@dataclass(frozen=True)
class Combined:
    """Values at one noise level. total: float64 [B], the weighted sum over the members that may give credit there, NaN where
    one of them failed; by_label: each member's own, NaN where it failed; error: what went wrong first, or "".
    """

    total: Tensor
    by_label: Mapping[str, Tensor]
    error: str


class ProcessSet:
    """The process rewards of a run, and what was seen of their quality: pairs in the right order, and all pairs, by member
    and noise level, each iteration weighing ``decay`` times the next.
    """

    def __init__(self, members: Sequence[ProcessMember], decay: float = 0.9) -> None:
        self.members, self.decay = list(members), decay
        self.seen = {m.label: _start(m) for m in self.members}
        self.invalid = dict.fromkeys(self.seen, 0)
        self.asked = 0
        self.first_error = ""
        self.fresh = {label: torch.zeros_like(seen) for label, seen in self.seen.items()}

    def __getitem__(self, label: str) -> ProcessMember:
        """The member of that label; KeyError where there is none."""
        return {m.label: m for m in self.members}[label]

    @property
    def credited(self) -> list[ProcessMember]:
        """Those that take part in credit: weight 0 leaves a member to guidance."""
        return [m for m in self.members if m.weight]

    def usable(self, t: float) -> list[ProcessMember]:
        """Members that may give credit at time t: those not known to be worse there than their ``min_accuracy``."""
        return [m for m in self.credited if self._allowed(m, t)]

    def _allowed(self, member: ProcessMember, t: float) -> bool:
        right, pairs = self.seen[member.label][int(noise_level(torch.tensor([t]), member.levels))].tolist()
        return bool(pairs < LEAST_PAIRS or right >= member.min_accuracy * pairs)

    def values(self, x: Tensor, t: Tensor, prompted: Prompted) -> Combined:
        """Ask every credited member about latents that are all at one time. x: [B, ...]; t: float32 [B]."""
        usable = {m.label for m in self.usable(float(t[0]))}
        total = torch.zeros(len(x), dtype=torch.float64)
        by_label, error = {}, ""
        self.asked += len(x)
        for member in self.credited:
            found = member.ask(x, t, prompted)
            error = error or found.error
            value = torch.where(found.valid, found.values, torch.nan).double().cpu()
            by_label[member.label] = value
            self.invalid[member.label] += found.invalid
            if member.label in usable:
                total = total + member.weight * value
        self.first_error = self.first_error or error
        return Combined(total, by_label, error)

    def begin_iteration(self) -> None:
        """Count failures anew."""
        self.invalid = dict.fromkeys(self.invalid, 0)
        self.asked = 0
        self.first_error = ""
        self.fresh = {label: torch.zeros_like(seen) for label, seen in self.seen.items()}

    def observe(self, label: str, t: float, counts: Tensor) -> None:
        """Note (pairs in the right order, pairs), float64 [2], of this process, at time t; `settle` makes them count."""
        self.fresh[label][int(noise_level(torch.tensor([t]), self[label].levels))] += counts

    def settle(self, total: Callable[[Tensor], Tensor]) -> None:
        """End an iteration: what was seen before weighs less, what was noted counts from now on. total: sum over processes.

        So what an iteration may give credit by never rests on its own outcomes.
        """
        for label, seen in self.seen.items():
            seen.mul_(self.decay).add_(total(self.fresh[label]))
        self.fresh = {label: torch.zeros_like(seen) for label, seen in self.seen.items()}

    def accuracy(self, label: str) -> list[float | None]:
        """Pair accuracy of each noise level so far, None where no pair was seen."""
        return [right / pairs if pairs else None for right, pairs in self.seen[label].tolist()]

    def state(self) -> dict[str, Any]:
        return {label: seen.clone() for label, seen in self.seen.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; ValueError where it is of other members."""
        if {k: tuple(v.shape) for k, v in state.items()} != {k: tuple(v.shape) for k, v in self.seen.items()}:
            raise ValueError("checkpoint: its process rewards are not those of this run; was process changed?")
        for label, seen in state.items():
            self.seen[label].copy_(seen)


def _start(member: ProcessMember) -> Tensor:
    seen = torch.zeros(member.levels, 2, dtype=torch.float64)
    for level, (accuracy, pairs) in enumerate(member.known):
        seen[level] = torch.tensor([accuracy * pairs, pairs], dtype=torch.float64)
    return seen


def observed(value: Tensor, outcome: Tensor, group: Tensor) -> tuple[Tensor, dict[str, float | None]]:
    """Measure values at one state against outcomes: (float64 [2] of pairs in the right order and pairs, facts).

    value, outcome: float64 [B], NaN where there is none; group: int64 [B]. facts: Kendall's tau within groups (``tau``) and
    the least-squares slope of the outcome on the value (``slope``).
    """
    known = value.isfinite() & outcome.isfinite()
    value, outcome, group = value[known], outcome[known], group[known]
    counts = torch.tensor(pair_counts(value, outcome, group), dtype=torch.float64)
    return counts, {"tau": rank_correlation(value, outcome, group), "slope": linear_fit(value, outcome)[0]}
