"""What an iteration of every method on trajectories costs: literal numbers of network samples, counted by hooks.

Two groups of four, ten steps, all eight members in one call. With T steps, K of them trained, s of them shared before the
members part, c branches of guidance and E passes, a sample of a group of G costs

    rollout c (s / G + T - s)    reference c K, whatever E    update c E K forwards, and as many backwards

and less where members that share the latent of a step share its call: the first stochastic step of a shared start costs one
sample a group. A higher-order solver, values by deterministic runs and losses over whole trajectories add their own.
"""

from __future__ import annotations

import pytest

from flowrl import registry
from flowrl.config.families import family_of
from flowrl.config.schema import Config
from flowrl.plan import plan
from flowrl.training.trainer import Trainer
from tests.training.toy import GaussianAdapter, LatentReward, reference_offsets, rows, toy_config

ALL = {"rollout.share_prefix": False}  # every member has its own start noise; steps 0 to 8 are trained
WINDOW = {
    "rollout.window.kind": "random", "rollout.window.size": 2, "rollout.window.first": 2, "rollout.window.last": 2,
}  # fmt: skip
TREE = {"rollout.splits": [0, 3]}
KL = {"objective.kl.form": "paper", "objective.kl.weight": 0.1}

FULL_ROLLOUT = 8 * 10
# Steps 0 and 1 once a group, step 2 from one latent a group, steps 3 to 9 for all.
WINDOW_ROLLOUT = 2 * 2 + 2 + 8 * 7
# One latent a group at step 0, two at steps 1 to 3, four at steps 4 to 9.
TREE_ROLLOUT = 2 + 3 * 4 + 6 * 8
TREE_UPDATE = 2 + 3 * 4 + 5 * 8

# method: (settings, forwards, backwards)
CASES: dict[str, tuple[dict[str, object], int, int]] = {
    "flow_grpo": ({**ALL, **KL}, FULL_ROLLOUT + 72 + 72, 72),
    "flow_grpo, guidance": ({**ALL, **KL, "rollout.guidance": 3.0}, 2 * (FULL_ROLLOUT + 72 + 72), 2 * 72),
    "flow_grpo, guidance, conditional": (
        {**ALL, "rollout.guidance": 3.0, "rollout.cfg_gradient": "conditional"}, 2 * (FULL_ROLLOUT + 72), 72,
    ),
    "flow_grpo, two passes, KL": ({**ALL, **KL, "objective.passes": 2}, FULL_ROLLOUT + 72 + 2 * 72, 2 * 72),
    "flow_grpo_fast": ({**WINDOW, "objective.name": "flow_grpo_fast"}, WINDOW_ROLLOUT + 10, 10),
    "dance_grpo": ({"rollout.window.fraction": 0.6, **ALL, "objective.name": "dance_grpo"}, FULL_ROLLOUT + 5 * 8, 5 * 8),
    "mix_grpo": (
        {"rollout.window.kind": "sliding", "rollout.window.size": 4, "rollout.window.last": 5, "rollout.solver": "dpmpp_2m",
         "objective.name": "mix_grpo"},
        2 + 8 * 9 + 26, 2 + 3 * 8,
    ),
    "mix_grpo, heun": (  # two calls at each step after the window but the last
        {"rollout.window.kind": "sliding", "rollout.window.size": 4, "rollout.window.last": 5, "rollout.solver": "heun",
         "objective.name": "mix_grpo"},
        2 + 8 * (3 + 2 * 5 + 1) + 26, 2 + 3 * 8,
    ),
    "grpo_guard": ({**ALL, "objective.name": "grpo_guard", "objective.passes": 4}, FULL_ROLLOUT + 4 * 72, 4 * 72),
    "tempflow": (  # two start noises a group, one stochastic step
        {**WINDOW, "rollout.window.size": 1, "rollout.seeds": 2, "objective.name": "tempflow"}, 4 * 3 + 8 * 7 + 4, 4,
    ),
    "flash_grpo": (
        {"rollout.window.kind": "iso_temporal", "rollout.window.size": 1, "rollout.window.first": 3,
         "rollout.window.last": 3, "objective.name": "flash_grpo"},
        2 * 3 + 2 + 8 * 6 + 2, 2,
    ),
    "flow_dppo": ({**ALL, "objective.name": "flow_dppo", "objective.passes": 2}, FULL_ROLLOUT + 2 * 72, 2 * 72),
    "pcpo": ({**ALL, "objective.name": "pcpo"}, FULL_ROLLOUT + 72, 72),
    "policy_flow": ({**ALL, "objective.name": "policy_flow", "objective.passes": 2}, FULL_ROLLOUT + 2 * 72, 2 * 72),
    "ddpo": ({**ALL, "objective.name": "ddpo"}, FULL_ROLLOUT + 72, 72),
    "dpok": ({**ALL, **KL, "objective.name": "dpok"}, FULL_ROLLOUT + 72 + 72, 72),
    "neighbor_grpo": (  # two anchors a group, nine trained steps, two passes
        {**ALL, "objective.name": "neighbor_grpo", "neighbours.anchors": 2, "objective.passes": 2},
        FULL_ROLLOUT + 2 * 9 * 4, 2 * 9 * 4,
    ),
    # One-step values come with the rollout; deterministic runs cost what is left of the schedule from each state.
    "vgpo": (
        {**ALL, "advantage.name": "vgpo", "advantage.options": {"shift": 20.0}, "credit.values": "x0"}, FULL_ROLLOUT + 72, 72,
    ),
    "dense_grpo": (
        {**WINDOW, "advantage.name": "dense_grpo", "credit.values": "ode"}, WINDOW_ROLLOUT + (2 * 8 + 8 * 7) + 10, 10,
    ),
    "dense_grpo, two steps, stride 2": (
        {**ALL, "advantage.name": "dense_grpo", "credit.values": "ode", "credit.ode_steps": 2, "credit.stride": 2},
        FULL_ROLLOUT + 8 * 2 * 5 + 72, 72,  # states 0, 2, 4, 6 and 8
    ),
    "stepwise": ({**ALL, "advantage.name": "stepwise", "credit.values": "x0"}, FULL_ROLLOUT + 72, 72),
    "tp_grpo": (
        {**WINDOW, "advantage.name": "tp_grpo", "credit.values": "ode", "objective.skip_silent": False},
        WINDOW_ROLLOUT + (2 * 8 + 8 * 7) + 10, 10,
    ),
    "branch_grpo": ({**TREE, "advantage.name": "branch_grpo"}, TREE_ROLLOUT + TREE_UPDATE, TREE_UPDATE),
    "tree_grpo": ({**TREE, "advantage.name": "tree_grpo"}, TREE_ROLLOUT + TREE_UPDATE, TREE_UPDATE),
    "best_worst": (
        {**ALL, "batch.selection.name": "best_worst", "batch.selection.number": 2}, FULL_ROLLOUT + 4 * 9, 4 * 9,
    ),
    "d3s": ({**ALL, "batch.selection.name": "d3s", "batch.selection.number": 2}, FULL_ROLLOUT + 4 * 9, 4 * 9),
    # Whole-trajectory ratios are known before their gradient: off policy, one more forward a transition.
    "gspo": (
        {**ALL, "objective.loss": "gspo", "objective.loss_options": {"high": 0.1, "low": 0.1}, "objective.passes": 2},
        FULL_ROLLOUT + 72 + 2 * 72, 2 * 72,
    ),
}  # fmt: skip

ELSEWHERE = {"euphonium"}  # guided sampling asks a process reward: counted in tests/rollout/test_guided.py


def configured(changes: dict[str, object]) -> Config:
    return toy_config(**({"batch.groups": 2, "batch.group_size": 4, "batch.micro_batch": 8} | changes))


@pytest.mark.parametrize("method", CASES)
def test_network_samples_of_an_iteration(method: str) -> None:
    changes, forward, backward = CASES[method]
    config, adapter = configured(changes), GaussianAdapter(10)
    reference = reference_offsets(adapter.network)
    reward = LatentReward(lambda x0: x0.flatten(1).sum(1))
    row = Trainer(config, adapter, reward, rows(2), reference=reference).iterate()
    assert (row["calls/forward_samples"], row["calls/backward_samples"]) == (forward, backward)
    if config.batch.selection.name == "all":  # what a selection leaves out is known only after the rollout
        made = plan(config)
        assert made.update_backward.samples.mean == backward
        foreseen = made.forward.samples
        sliding = config.rollout.window.kind == "sliding"  # the plan's mean is over the places of the window
        assert foreseen.least <= forward <= foreseen.most if sliding else foreseen.mean == forward


def test_every_objective_is_counted() -> None:
    named = {name for name in registry.names("objective") if family_of(name) == "trajectory"}
    assert named <= {name.split(",")[0] for name in CASES} | ELSEWHERE
