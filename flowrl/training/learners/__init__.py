"""Learners: what turns scored samples into updates. The trainer draws, scores and credits; its learner does the rest.

One iteration of `flowrl.training.trainer.Trainer`:

    draw                 which prompts, how many members each                                     trainer
    roll out, score      within ``learner.behaviour()``; transitions only if needs_transitions    trainer
    credit               estimator of the config: advantage, weight, element [B, K]               trainer
    learn(batch)         losses, backward passes, ``bench.step()`` once an update                 learner
    learn_from(draw)     in place of the three above where needs_rollout is False                 learner

A family of objectives is one module here with a subclass of `Learner` (``base``): it reads its part of the config, keeps
what it needs between iterations, and returns that from ``state``, which a checkpoint stores under the key "learner". The
losses are pure functions in ``flowrl.objectives``. To add a family: name its objectives in ``flowrl.registry.OBJECTIVES``
with a table of their own, map that table in ``flowrl.config.families``, and add its line to LEARNERS.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from flowrl.config.families import family_of
from flowrl.training.learners.base import Bench, Draw, Learner
from flowrl.training.update import Reference

LEARNERS: Mapping[str, str] = MappingProxyType(
    {
        "trajectory": "flowrl.training.learners.trajectory:TrajectoryLearner",
        "euphonium": "flowrl.training.learners.euphonium:EuphoniumLearner",
        "forward": "flowrl.training.learners.forward:ForwardLearner",
        "ac_flow": "flowrl.training.learners.actor_critic:ActorCriticLearner",
        "dpo": "flowrl.training.learners.preference:PreferenceLearner",
        "direct": "flowrl.training.learners.direct:DirectLearner",
        "neighbor_grpo": "flowrl.training.learners.neighbours:NeighbourLearner",
        "adjoint_matching": "flowrl.training.learners.adjoint:AdjointLearner",
    }
)
"""Family of objectives, or a single objective's name, to its learner; a name goes before its family."""


def build(bench: Bench) -> Learner:
    """Make the learner of ``objective.name``."""
    name = bench.config.objective.name
    target = LEARNERS.get(name) or LEARNERS[family_of(name)]
    module, _, attribute = target.partition(":")
    made: Learner = vars(importlib.import_module(module))[attribute](bench)
    return made


__all__ = ["LEARNERS", "Bench", "Draw", "Learner", "Reference", "build"]
