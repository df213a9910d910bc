"""Settings of guidance by a process reward, of the objective that learns from it, and of search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flowrl.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Guide:
    """The gradient of a process reward moves the steps of the rollout.

    reward: label of an entry of ``process``; "": no guidance. mode: langevin (Euphonium: the score moves, so steps with
    noise do) | exact_tilt (the velocity moves too, on every step; exact where the reward is the value of the outcome) |
    langevin_weighted (langevin, with weights that correct it; objective.name=euphonium counts members by them). scale:
    1 / beta, at least 0; 0 asks for nothing. first, last: steps of the schedule, both inclusive; last null: to the end.
    gradient: autograd, or spsa (values alone: ``draws`` pairs of calls at the distance ``radius`` in units of the latent).
    unit: divide each latent's gradient by its norm. log_prob: of the old policy, by its own mean (unguided) or by the
    guided one that drew the step (then the ratio is an importance weight; objective.name=euphonium).
    """

    reward: str = ""
    mode: Literal["langevin", "exact_tilt", "langevin_weighted"] = "langevin"
    scale: float = 1.0
    first: int = 0
    last: int | None = None
    gradient: Literal["autograd", "spsa"] = "autograd"
    radius: float = 0.01
    draws: int = 1
    unit: bool = False
    log_prob: Literal["unguided", "guided"] = "unguided"

    @property
    def active(self) -> bool:
        return self.reward != "" and self.scale != 0


@dataclass(frozen=True, kw_only=True)
class Euphonium:
    """What objective.name=euphonium learns from; no other objective reads it.

    outcome, process: weights of the two clipped surrogates, that of the scores' advantages (``advantage``) and that of the
    step values' (``credit.values``); 0 leaves one out. state: whose value is a step's, of the state that it led to
    (after) or started from (before: what the released script is described to do; given the state it is noise). shaping,
    normaliser: of the step values, as of the estimator step_credit. distil: weight of ``||v - (v_target - kappa grad R /
    beta)||^2``, a mean over latent elements, which brings guidance into the network; target: whose velocity v_target is,
    the pre-trained model's (a fixed aim) or the one that drew the step (moves on with every iteration).
    """

    outcome: float = 1.0
    process: float = 1.0
    state: Literal["after", "before"] = "after"
    shaping: Literal["value", "gain", "cumulative"] = "value"
    normaliser: Literal["per_step", "joint", "global"] = "per_step"
    distil: float = 0.0
    target: Literal["reference", "rollout"] = "reference"


@dataclass(frozen=True, kw_only=True)
class Search:
    """Search at evaluation, by ``flowrl eval``; training never reads it.

    kind: none | best_of (``width`` start noises) | beam (``width`` latents, ``children`` of each at the steps of ``at``) |
    particles (``width`` samples weighted by exp(scale reward), resampled where their effective number falls below
    ``threshold`` of them). reward: label of an entry of ``process``; "": the score of the evaluation's rewards. at: steps
    that draw noise, by rollout.kernel; empty: all but the last. pick: what particles return, one drawn by its weight or
    the best.
    """

    kind: Literal["none", "best_of", "beam", "particles"] = "none"
    width: int = 4
    children: int = 2
    reward: str = ""
    at: tuple[int, ...] = ()
    scale: float = 1.0
    threshold: float = 0.5
    pick: Literal["draw", "best"] = "draw"


def takes_values(config: Config) -> bool:
    """Whether the objective itself learns from step values, beside the estimator."""
    return config.objective.name == "euphonium" and config.euphonium.process > 0


def takes_start(config: Config) -> bool:
    """Whether it reads the value of the state before the first trained step."""
    return takes_values(config) and (config.euphonium.state == "before" or config.euphonium.shaping == "gain")
