"""Windows, seeds and trees through the real rollout: who shares what, and what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowrl.plan import plan
from flowrl.rollout.sampling import MEMBERS, block_sizes, first_of_each
from tests.training.helpers import make, small_config

TREE = {"rollout.window.kind": "full", "rollout.splits": [0, 2], "rollout.children": 2}


def collected(config):
    trainer = make(config)
    found = []
    train = trainer._train
    trainer._train = lambda batch: found.append(batch) or train(batch)
    row = trainer.iterate()
    return found[0], row, trainer


def test_a_tree_shares_latents_until_its_members_part(tiny_sd3: Path) -> None:
    """4 leaves, parting at steps 0 and 2 of 4 (step 3 is deterministic): 1, 2, 2, 4 latents before the steps."""
    batch, row, _ = collected(small_config(tiny_sd3, **TREE))
    t = batch.trajectory
    assert t.step[0].tolist() == [0, 1, 2]
    assert [len(set(t.state[:4, k].tolist())) for k in range(3)] == [1, 2, 2]
    assert [len(set(t.node[:4, k].tolist())) for k in range(3)] == [2, 2, 4]
    for k in range(3):
        for ids, latents in ((t.state, t.x), (t.node, t.x_next)):
            for i in range(4):
                for j in range(4):
                    assert bool(ids[i, k] == ids[j, k]) == torch.equal(latents[i, k], latents[j, k])
    # 2 groups: 2 (1 + 2 + 2 + 4) rollout; 2 (1 + 2 + 2) update, forward and backward.
    assert row["calls/forward_samples"] == 18 + 10 and row["calls/backward_samples"] == 10
    assert t.parent.tolist() == [g * MEMBERS for g in t.group_id.tolist()]


def test_a_fan_at_the_first_stochastic_step_is_a_shared_prefix(tiny_sd3: Path) -> None:
    at = {"rollout.window.first": 1, "rollout.window.last": 1}
    plain, _, _ = collected(small_config(tiny_sd3, **at))
    tree, _, _ = collected(small_config(tiny_sd3, **at, **{"rollout.splits": [1], "rollout.children": 4}))
    assert torch.equal(plain.trajectory.x0, tree.trajectory.x0)
    assert torch.equal(plain.trajectory.old_log_prob, tree.trajectory.old_log_prob)


def test_seeds_share_start_noise_within_and_not_across(tiny_sd3: Path) -> None:
    at = {"rollout.window.first": 0, "rollout.window.last": 0, "rollout.seeds": 2}
    batch, row, _ = collected(small_config(tiny_sd3, **at))
    x = batch.trajectory.x[:4, 0]
    assert torch.equal(x[0], x[1]) and torch.equal(x[2], x[3]) and not torch.equal(x[0], x[2])
    assert len(set(batch.trajectory.parent[:4].tolist())) == 2
    assert row["calls/forward_samples"] == (4 + 3 * 8) + (4 + 8)


def test_iso_temporal_groups_have_steps_of_their_own(tiny_sd3: Path) -> None:
    config = small_config(tiny_sd3, **{
        "rollout.window.kind": "iso_temporal", "rollout.window.size": 1, "rollout.window.last": 2, "batch.groups": 6,
        "objective.skip_silent": False,
    })  # fmt: skip
    batch, row, _ = collected(config)
    steps = batch.trajectory.step[:, 0].reshape(6, 4)
    assert bool((steps == steps[:, :1]).all()) and len(steps[:, 0].unique()) > 1
    assert row["policy/ratio_max_deviation"] == 0.0
    # Of each group: the steps up to its own once, the rest four times; the update once a group.
    own = steps[:, 0]
    assert row["calls/forward_samples"] == int((own + 1 + 4 * (3 - own)).sum()) + 6
    named = {f"policy/ratio_mean/step_{s}" for s in own.tolist()}
    assert named <= row.keys()


def test_a_part_of_the_stochastic_steps_is_trained(tiny_sd3: Path) -> None:
    config = small_config(tiny_sd3, **{
        "rollout.window.kind": "full", "rollout.window.fraction": 0.67, "batch.groups": 4, "rollout.share_prefix": False,
    })  # fmt: skip
    batch, row, trainer = collected(config)
    t = batch.trajectory
    assert t.stochastic_mask.sum(1).unique().tolist() == [3] and t.trained_mask.sum(1).unique().tolist() == [2]
    assert t.x.shape[1] == 2 and len(t.step[::4].unique(dim=0)) > 1
    assert row["calls/backward_samples"] == 32 == plan(config).update_backward.samples.mean
    trainer.iterate()


@pytest.mark.parametrize(
    "changes",
    [
        TREE,
        {"rollout.window.first": 1, "rollout.window.last": 1, "rollout.seeds": 2},
        {"rollout.window.first": 0, "rollout.window.last": 0, "batch.micro_batch": 3},
        {"rollout.window.first": 0, "rollout.window.last": 0, "rollout.window.size": 1, "rollout.solver": "heun"},
        {"rollout.window.first": 1, "rollout.window.last": 1, "credit.values": "ode", "advantage.name": "dense_grpo"},
        {**TREE, "credit.values": "ode", "credit.ode_steps": 1, "credit.stride": 2, "advantage.name": "stepwise"},
        {"rollout.window.first": 0, "rollout.window.last": 0, "credit.values": "x0", "advantage.name": "stepwise"},
    ],
)
def test_the_plan_counts_what_the_hooks_count(tiny_sd3: Path, changes: dict) -> None:
    config = small_config(tiny_sd3, **{"objective.skip_silent": False, **changes})
    _, row, _ = collected(config)
    made = plan(config)
    assert made.forward.samples.mean == row["calls/forward_samples"]
    assert made.forward.calls.mean == row["calls/forward"]
    assert made.update_backward.samples.mean == row["calls/backward_samples"]


@pytest.mark.parametrize("estimator", ["branch_grpo", "tree_grpo"])
def test_node_advantages_train_each_node_once(tiny_sd3: Path, estimator: str) -> None:
    batch, row, _ = collected(small_config(tiny_sd3, **TREE, **{"advantage.name": estimator}))
    for k in range(3):
        for node in batch.trajectory.node[:, k].unique():
            members = batch.trajectory.node[:, k] == node
            assert float(batch.weight[members, k].sum()) == pytest.approx(1.0)
            assert len(batch.advantage[members, k].unique()) == 1
    assert row["update/steps"] == 1


def test_block_sizes() -> None:
    stochastic = torch.tensor([[True, True, True, False], [False, True, True, False]])
    sizes = torch.tensor([8, 8])
    assert block_sizes(sizes, stochastic, False, 1, {}).tolist() == [[1] * 5] * 2
    assert block_sizes(sizes, stochastic, True, 2, {}).tolist() == [[4, 1, 1, 1, 1], [4, 4, 1, 1, 1]]
    assert block_sizes(sizes, stochastic, True, 2, {1: 2, 2: 2}).tolist() == [[4, 4, 2, 1, 1]] * 2
    with pytest.raises(ValueError, match="leave 2 members in one place"):
        block_sizes(sizes, stochastic, True, 2, {1: 2})
    with pytest.raises(ValueError, match=r"\[4, 4\] members cannot part into 3 at step 1"):
        block_sizes(sizes, stochastic, True, 2, {1: 3})
    with pytest.raises(ValueError, match="do not share out over 3 seeds"):
        block_sizes(sizes, stochastic, True, 3, {})


def test_first_of_each() -> None:
    first, place = first_of_each(torch.tensor([7, 3, 7, 9, 3]))
    assert (first.tolist(), place.tolist()) == ([0, 1, 3], [0, 1, 0, 2, 1])
