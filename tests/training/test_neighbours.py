"""Neighbor GRPO through the real rollout and trainer: neighbouring starts, deterministic steps, the gradient by a plain loop."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.config import load, validate
from flowrl.training.trainer import Trainer
from tests.training.toy import GaussianAdapter, LatentReward, rows, toy_config

BASE = {
    "objective.name": "neighbor_grpo", "rollout.share_prefix": False, "advantage.name": "grpo", "batch.groups": 2,
    "batch.group_size": 6, "neighbours.anchors": 3, "objective.clip_range": 0.2,
}  # fmt: skip


def trainer_of(shape: tuple[int, ...] = (1, 2, 2), sign: float = 1.0, **changes: object) -> Trainer:
    adapter = GaussianAdapter(10, shape=shape)
    reward = LatentReward(lambda x0: sign * x0.flatten(1).sum(1))
    return Trainer(toy_config(**(BASE | changes)), adapter, reward, rows(2))


def seen_batch(trainer: Trainer):
    kept = []
    train = trainer._train
    trainer._train = lambda batch: kept.append(batch) or train(batch)
    row = trainer.iterate()
    return kept[0], row


def test_members_start_near_one_noise_and_walk_without_noise() -> None:
    trainer = trainer_of((1, 40, 40), **{"neighbours.sigma": 0.5, "batch.group_size": 4})
    batch, row = seen_batch(trainer)
    t = batch.trajectory
    start = t.x[:, 0].flatten(1)
    correlation = torch.corrcoef(start)
    same = t.group_id[:, None] == t.group_id[None]
    wanted = torch.where(same, 1 - 0.5**2, 0.0).fill_diagonal_(1.0)
    assert (correlation - wanted).abs().max() < 4 / math.sqrt(1600)
    assert float((start.var(1) - 1).abs().max()) < 4 * math.sqrt(2 / 1600)
    # Every step is Euler's on the exact velocity k(t) x of N(0, 1); the ninth ends before the last, which is not trained.
    grid = trainer.adapter.grid
    for k in range(9):
        moved = t.x[:, k] * (1 + (grid[k + 1] - grid[k]) * (2 * grid[k] - 1) / ((1 - grid[k]) ** 2 + grid[k] ** 2))
        torch.testing.assert_close(t.x_next[:, k], moved, rtol=1e-5, atol=1e-6)
    assert not bool(t.stochastic_mask.any()) and t.old_log_prob is None
    assert (row["policy/ratio_mean"], row["update/steps"]) == (pytest.approx(1.0, abs=1e-5), 1)


def test_the_gradient_is_that_of_a_plain_loop() -> None:
    """-sum_i A_i (2 / T) <dx/d offset, x_i - sum_j p_j x_j> over anchors, members and steps; dx/d offset = -dt."""
    trainer = trainer_of(**{"neighbours.temperature": 1.5})
    gradients = []
    trainer._step = lambda: gradients.append(trainer.adapter.network.delta.grad.clone()) or 0.0
    batch, _ = seen_batch(trainer)
    t = batch.trajectory
    grid, anchors = trainer.adapter.grid.tolist(), trainer.learner._anchors(batch).tolist()
    assert sorted(t.group_id[anchors].tolist()) == sorted(t.group_id.unique().repeat_interleave(3).tolist())
    raw = batch.advantage[:, 0]
    expected = [0.0] * 10
    for k in range(9):
        for anchor in anchors:
            members = [i for i in range(12) if t.group_id[i] == t.group_id[anchor]]
            norm = sum(abs(float(raw[i])) ** 0.8 for i in members) ** (1 / 0.8)
            apart = [float((t.x_next[i, k] - t.x_next[anchor, k]).square().sum()) for i in members]
            total = sum(math.exp(-d / 1.5) for d in apart)
            mean = sum(math.exp(-d / 1.5) / total * t.x_next[i, k] for d, i in zip(apart, members, strict=True))
            for i in members:
                pull = 2 / 1.5 * float((t.x_next[i, k] - mean).sum())
                expected[k] += float(raw[i]) / norm * pull * (grid[k] - grid[k + 1]) / (9 * 6 * 6)
    torch.testing.assert_close(gradients[0], torch.tensor(expected), rtol=1e-3, atol=1e-6)
    assert float(gradients[0].abs().max()) > 1e-4


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_it_learns_either_way(sign: float, temperature: float | None) -> None:
    trainer = trainer_of(
        sign=sign, **{"neighbours.temperature": temperature, "optimizer.lr": 0.03, "objective.passes": 2}
    )
    for _ in range(10):
        row = trainer.iterate()
    offsets = trainer.adapter.network.delta.detach()
    assert bool((sign * offsets[:9] < 0).all()), "a lower velocity raises x0"
    assert row["policy/ratio_max_deviation"] > 0
    assert float(offsets[9]) == 0.0, "the last step is not trained"


def test_storage_and_a_window_of_its_own() -> None:
    """Latents are kept of the trained steps alone, rounded as the next step reads them; a solver takes over afterwards."""
    changes = {
        "rollout.window.kind": "random", "rollout.window.size": 2, "rollout.window.first": 3, "rollout.window.last": 3,
        "rollout.storage_dtype": "bf16", "rollout.solver": "heun",
    }  # fmt: skip
    batch, row = seen_batch(trainer_of(**changes))
    t = batch.trajectory
    assert t.step.tolist() == [[3, 4]] * 12 and t.x.dtype == torch.bfloat16
    assert torch.equal(t.x[:, 1], t.x_next[:, 0])
    # Steps 0 to 4 once, 5 to 8 twice, the last once; then 2 steps of 2 x 3 anchors.
    assert (row["calls/forward_samples"], row["calls/backward_samples"]) == (12 * (5 + 4 * 2 + 1) + 12, 12)


CASES = {
    "other": (
        ["objective.name=flow_grpo", "rollout.share_prefix=true", "neighbours.sigma=0.5"],
        "neighbours: objective.name=flow_grpo compares no neighbours; remove the section, or use "
        "objective.name=neighbor_grpo",
    ),
    "sigma": (["neighbours.sigma=0"], "neighbours.sigma: 0.0 is out of range; use more than 0 and at most 1"),
    "anchors": (
        ["neighbours.anchors=17"],
        "neighbours.anchors: 17 members are no choice among 16 (batch.group_size); use 1 to that",
    ),
    "temperature": (
        ["neighbours.temperature=0"], "neighbours.temperature: 0.0 is out of range; use more than 0, or null",
    ),
    "power": (["neighbours.power=3"], "neighbours.power: 3.0 is out of range; use more than 0 and at most 2"),
    "shared": (
        ["rollout.share_prefix=true"],
        "rollout.share_prefix: members of neighbor_grpo start from neighbouring noises and share no latent; set "
        "share_prefix=false, without seeds and splits",
    ),
    "kl": (
        ["objective.kl.form=velocity", "objective.kl.weight=0.1"],
        "objective.kl.form: neighbor_grpo has no penalty towards the pre-trained model; set it to none",
    ),
    "weight": (
        ["objective.step_weight=std"],
        "objective.step_weight: std weighs by noise, and neighbor_grpo draws none; remove it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str) -> None:
    changes, message = CASES[name]
    found = validate(load("demo", ["objective.name=neighbor_grpo", "rollout.share_prefix=false", *changes]))
    assert found == [message]
