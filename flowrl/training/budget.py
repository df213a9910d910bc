"""Where an iteration's samples go: which prompts, how many members each, and which members are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowrl import rng
from flowrl.advantage.bandits import BetaState, decay_update, vade
from flowrl.advantage.selection import best_worst_k, knapsack_allocate, max_variance_subset
from flowrl.config.schema import Batch, Selection
from flowrl.data.sampler import Drawn


class Budget:
    """What is believed about each prompt's success rate, and the decisions that follow from it.

    Beliefs are Beta(alpha, beta) a prompt, updated from the scores of all processes, so that all decide alike.
    """

    def __init__(self, batch: Batch, prompts: int) -> None:
        self.batch = batch
        ones = torch.ones(prompts, dtype=torch.float64)
        self.beliefs = BetaState(ones, ones.clone())

    @property
    def remembers(self) -> bool:
        return self.batch.allocation.name != "fixed"

    def draw(self, drawn: Sequence[Drawn], seed: int, iteration: int) -> list[Drawn]:
        """Replace the prompts of the groups by those whose success is least certain (vade), else leave them."""
        if self.batch.allocation.name != "vade":
            return list(drawn)
        generator = torch.Generator().manual_seed(rng.key(seed, iteration, step=2, stream="sampler"))
        chosen = vade(self.beliefs, number=len(drawn), generator=generator).tolist()
        return [Drawn(prompt, 0, d.group_id) for prompt, d in zip(chosen, drawn, strict=True)]

    def sizes(self, drawn: Sequence[Drawn]) -> Tensor:
        """Members of each group, int64 [P], of all processes' groups; their sum is that of the configured size."""
        allocation, size = self.batch.allocation, self.batch.group_size
        if allocation.name != "knapsack":
            return torch.full((len(drawn),), size)
        slot = torch.tensor([d.prompt_id for d in drawn])
        rate = (self.beliefs.alpha / (self.beliefs.alpha + self.beliefs.beta))[slot]
        high = max(allocation.high, size)
        return knapsack_allocate(rate, budget=size * len(drawn), low=min(allocation.low, size), high=high)

    def learn(self, prompt_id: Tensor, scores: Tensor, valid: Tensor) -> None:
        """Update the beliefs with an iteration's scores of all processes, all [B]."""
        if self.remembers:
            success = (scores >= self.batch.allocation.success).double()
            self.beliefs = decay_update(
                self.beliefs, prompt_id, success, valid, visited=self.batch.allocation.memory, unvisited=1.0
            )

    def state(self) -> dict[str, Any]:
        return {"beliefs": self.beliefs.state_dict()} if self.remembers else {}

    def load(self, state: dict[str, Any]) -> None:
        if self.remembers:
            self.beliefs = BetaState.from_state_dict(state["beliefs"])


def chosen_members(selection: Selection, rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Which members of all processes' groups are trained, by their scores: bool [B]."""
    match selection.name:
        case "best_worst":
            return best_worst_k(rewards, group, valid, number=selection.number)
        case "d3s":
            return max_variance_subset(rewards, group, valid, number=selection.number)
    return torch.ones_like(valid)
