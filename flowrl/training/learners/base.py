"""What a learner is given, and what it must say and do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flowrl.config.schema import Config
from flowrl.data.sampler import Drawn
from flowrl.distributed.backend import Backend
from flowrl.distributed.split import Steps
from flowrl.performance.counting import CallCounter
from flowrl.performance.timers import Stopwatch
from flowrl.protocols import PipelineAdapter
from flowrl.records import PromptRow
from flowrl.rollout.policy import Policy
from flowrl.rollout.sampling import RolloutPlan
from flowrl.scoring.runtime import RewardRuntime
from flowrl.training.batch import TrainingBatch, Visit
from flowrl.training.micro import MicroBatch
from flowrl.training.update import Reference
from flowrl.training.weights import Weights


@dataclass(frozen=True)
class Bench:
    """The parts of a trainer that a learner works with; it owns none of them.

    step: clips the gradients of the policy's weights, checks, steps, averages, and clears them; returns the gradient
    norm. A learner calls it once an update, after its backward passes, on every process alike. rate: the learning rate
    in effect. reference: ``with bench.reference(): ...`` runs the pre-trained model; None where the trainer has none.
    micro: how many samples a call takes.
    """

    config: Config
    policy: Policy
    rewards: RewardRuntime
    rows: Sequence[PromptRow]
    weights: Weights
    optimizer: Steps
    reference: Reference | None
    backend: Backend
    clock: Stopwatch
    counter: CallCounter
    step: Callable[[], float]
    micro: MicroBatch

    @property
    def adapter(self) -> PipelineAdapter:
        return self.policy.adapter

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


@dataclass(frozen=True)
class Draw:
    """What an iteration is to be about, decided for all processes: this one's part of it.

    groups: one prompt each; sizes: int64 [P], members of each; visit: the key of the noise.
    """

    groups: Sequence[Drawn]
    sizes: Tensor
    visit: Visit


class Learner:
    """How weights change, given scored samples. A learner of a family overrides what differs from this one.

    needs_rollout: the trainer draws, scores and credits samples and calls ``learn``; else it calls ``learn_from`` with
    the prompts alone, and the learner makes (and scores) its own samples. needs_transitions: the rollout has stochastic
    steps and keeps their latents and log-probs; else every step is deterministic, by any solver, and a trajectory is its
    x0, with one advantage a sample.
    """

    needs_rollout: ClassVar[bool] = True
    needs_transitions: ClassVar[bool] = True

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.config = bench.config

    def records_needed(self) -> frozenset[str]:
        """What the rollout must keep of each transition beside latents and log-probs; see RolloutPlan.keep."""
        return frozenset()

    def arrange(self, plan: RolloutPlan) -> RolloutPlan:
        """The plan of a rollout as this learner wants it drawn."""
        return plan

    def behaviour(self) -> AbstractContextManager[None]:
        """Within the block the network is the policy that draws the samples; it is not entered for evaluations."""
        return nullcontext()

    def learn(self, batch: TrainingBatch) -> dict[str, Any]:
        """Do the updates of one iteration; returns its part of the metrics row."""
        raise NotImplementedError(f"{type(self).__name__} learns from no rollout")

    def learn_from(self, draw: Draw) -> dict[str, Any]:
        """Do an iteration without the trainer's rollout; returns metrics, ``score/mean`` among them."""
        raise NotImplementedError(f"{type(self).__name__} learns from a rollout")

    def replicas(self) -> dict[str, Tensor]:
        """Further tensors, by name, of which every process must hold the same after an iteration."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the policy's weights and optimizer: nested tensors and numbers, or nothing.

        Old copies of the policy, critics with their optimizers, buffers, controllers: whatever the next ``learn`` reads.
        """
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave; {} where the checkpoint has none. Raises ValueError for one that does not fit."""
