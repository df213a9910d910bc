"""Settings of trajectories and credit that cannot work together, each refused with the reason before a model is loaded."""

from __future__ import annotations

import pytest

from flowrl.config import load, validate

FULL = ["rollout.window.kind=full", "rollout.window.first=0"]

CASES = {
    "ode": (
        ["rollout.kernel.name=ode"],
        "rollout.kernel.name: ode draws no noise, so no step has a log-probability to train; use precise, cps or flow_sde",
    ),
    "guard_ode": (
        ["objective.name=grpo_guard", "rollout.kernel.noise=0"],
        "rollout.kernel.noise: 0.0 leaves no step to train; use more than 0, such as 0.7",
    ),
    "window": (
        ["rollout.window.last=6"],
        "rollout.window.last: a window of 2 that starts at step 6 ends at step 7, past step 6, the last stochastic one of "
        "rollout.steps=8; use at most 5",
    ),
    "fraction": (
        ["rollout.window.fraction=0.3"],
        "rollout.window.fraction: 0.3 of 2 stochastic steps leaves none to train; raise it, or widen the window",
    ),
    "fraction_range": (
        ["rollout.window.fraction=1.5"],
        "rollout.window.fraction: 1.5 is out of range; use more than 0 and at most 1",
    ),
    "decaying": (
        ["rollout.window.kind=sliding", "rollout.window.strategy=decaying", "rollout.window.least=9"],
        "rollout.window.least: 9 iterations at the last place are more than the 5 at the first (rollout.window.every); use "
        "at most that",
    ),
    "seeds": (
        ["rollout.seeds=3"],
        "rollout.seeds: 16 members (batch.group_size) do not share out over 3; use a divisor",
    ),
    "seeds_alone": (
        ["rollout.seeds=4", "rollout.share_prefix=false"],
        "rollout.seeds: without rollout.share_prefix every member has a start noise of its own already; set "
        "share_prefix=true, or seeds=1",
    ),
    "leaves": (
        [*FULL, "rollout.splits=[0, 2]"],
        "rollout.splits: 1 seeds times 2 children at 2 steps make 4 leaves, and batch.group_size is 16; make them equal",
    ),
    "twice": (
        [*FULL, "rollout.splits=[0, 2, 4, 4]"],
        "rollout.splits: [0, 2, 4, 4] names a step twice; name each once",
    ),
    "split_outside": (
        ["rollout.window.size=4", "rollout.window.last=1", "rollout.splits=[0, 1, 2, 3]"],
        "rollout.splits: latents part by the noise of their step, and step 0 has none; use steps 1 to 4",
    ),
    "moving_tree": (
        ["rollout.splits=[1, 2, 3, 4]"],
        "rollout.splits: a tree needs a window that stays where it is; use window.kind=full, or first = last",
    ),
    "no_values": (
        ["advantage.name=dense_grpo"],
        "advantage.name: dense_grpo takes values of intermediate states; set credit.values=x0 (one-step estimates, no extra "
        "network calls) or credit.values=ode",
    ),
    "idle_values": (
        ["credit.values=x0"],
        "credit.values: x0 scores every trained step, and advantage.name=grpo does not read that; set it to none, or use "
        "vgpo, dense_grpo, stepwise or tp_grpo",
    ),
    "vgpo_zero": (
        ["advantage.name=vgpo", "credit.values=x0"],
        "advantage.options.shift: vgpo divides by values, and these rewards go down to 0; give a shift above 0, such as 0.1",
    ),
    "vgpo_unknown": (
        ["advantage.name=vgpo", "credit.values=x0", "rewards=[{name: jpeg}]"],
        "advantage.options.shift: vgpo divides by values, and the reward jpeg (weight 1.0) may be 0 or negative; give a "
        "shift that makes every value positive",
    ),
    "vgpo_negative": (
        ["advantage.name=vgpo", "credit.values=x0", "rewards=[{name: compositional, weight: -1.0}]"],
        "advantage.options.shift: vgpo divides by values, and the reward compositional (weight -1.0) may be 0 or negative; "
        "give a shift that makes every value positive",
    ),
    "dpok": (
        ["objective.name=dpok"],
        "objective.kl.form: dpok is defined with a penalty towards the pre-trained model; set objective.kl.form=paper and "
        "objective.kl.weight",
    ),
    "joint": (
        ["objective.name=grpo_guard", "objective.loss=gspo"],
        "objective.loss: gspo looks at whole trajectories of plain ratios, and grpo_guard has the ratio 'normalised'; use "
        "objective.ratio=plain, or objective.loss=ppo",
    ),
    "knapsack": (
        ["batch.allocation.name=knapsack", "rollout.seeds=4"],
        "batch.allocation.name: knapsack makes groups of unequal size, which do not share out over rollout.seeds or "
        "rollout.splits; use fixed",
    ),
    "knapsack_bounds": (
        ["batch.allocation.name=knapsack", "batch.allocation.low=20"],
        "batch.allocation: low = 20, high = 128 must hold batch.group_size = 16 between them, and low be at least 2",
    ),
    "selection": (
        ["batch.selection.name=d3s", "batch.selection.number=17"],
        "batch.selection.number: 17 members are no choice among 16 (batch.group_size); use 2 to that",
    ),
    "options": (
        ["objective.name=pcpo", "objective.loss_options={xi: 2}"],
        "objective.loss_options: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str) -> None:
    changes, message = CASES[name]
    problems = validate(load("demo", changes))
    assert len(problems) == 1 and problems[0].startswith(message), problems
    assert problems[0] == message or message.endswith(": ")


@pytest.mark.parametrize(
    "changes",
    [
        ["advantage.name=vgpo", "credit.values=x0", "advantage.options.shift=0.1"],
        ["advantage.name=step_credit", "credit.values=ode", "advantage.options.shaping=gain", "credit.ode_steps=2"],
        [*FULL, "rollout.splits=[0, 2, 4]", "rollout.seeds=2", "advantage.name=branch_grpo"],
        ["objective.name=grpo_guard", "objective.step_weight=inverse_dt", "objective.loss=dapo"],
        ["objective.name=dpok", "objective.kl.form=paper", "objective.kl.weight=0.1"],
        ["batch.selection.name=best_worst", "batch.allocation.name=vade"],
    ],
)
def test_accepted(changes: list[str]) -> None:
    assert validate(load("demo", changes)) == []
