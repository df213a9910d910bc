"""Rewards of intermediate states, through the real rollout: exact on Gaussian data, masked where they fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowrl.training.trainer import Trainer
from tests.training.toy import GaussianAdapter, LatentReward, rows, toy_config

BASE = {
    "rollout.share_prefix": False, "advantage.name": "stepwise", "rollout.window.kind": "random", "rollout.window.size": 3,
    "rollout.window.first": 2, "rollout.window.last": 2, "batch.group_size": 16,
}  # fmt: skip


def values_of(reward=lambda x0: x0.flatten(1).sum(1), **changes: object):
    adapter = GaussianAdapter(10, mean=1.0, spread=0.5)
    trainer = Trainer(toy_config(**(BASE | changes)), adapter, LatentReward(reward), rows(4))
    found = trainer._collect()
    return found, adapter, trainer


def test_one_step_values_are_the_posterior_mean() -> None:
    """Linear reward b = 1 on N(m, s^2): R = E[x0 | x_t] = m + s^2 (1 - t) / D (x - (1 - t) m); no further call."""
    found, adapter, trainer = values_of(**{"credit.values": "x0"})
    t = adapter.grid[2:5].double()
    d = (1 - t) ** 2 * 0.25 + t**2
    x = torch.cat([found.trajectory.x[:, :1], found.trajectory.x_next[:, :-1]], 1).reshape(64, 3).double()
    expected = 1 + 0.25 * (1 - t) / d * (x - (1 - t))
    got = torch.cat([found.values.start[:, None], found.values.step], 1)
    torch.testing.assert_close(got[:, :3], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[:, 3], torch.from_numpy(found.scored.scores).double(), rtol=1e-6, atol=1e-6)
    assert trainer.counter.counts.forward_samples == 64 * 10


def test_ode_values_are_what_the_path_ends_in() -> None:
    """Each remaining step scales the distance from the mean by 1 - k(t) dt."""
    found, adapter, trainer = values_of(**{"credit.values": "ode"})
    grid = adapter.grid.double()
    for slot, state in enumerate((2, 3, 4)):
        x = found.trajectory.x[:, 0] if slot == 0 else found.trajectory.x_next[:, slot - 1]
        x = x.flatten().double()
        for t, s in zip(grid[state:-1], grid[state + 1 :], strict=True):
            x = x + (s - t) * (-1 + adapter.network.slope(t) * (x - (1 - t)))
        got = found.values.start if slot == 0 else found.values.step[:, slot - 1]
        torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)
    assert trainer.counter.counts.forward_samples == 64 * (10 + 8 + 7 + 6)


def test_gains_telescope_to_the_outcome() -> None:
    found, _, _ = values_of(**{"credit.values": "x0"})
    steps = torch.cat([found.values.start[:, None], found.values.step], 1)
    torch.testing.assert_close(
        steps.diff(dim=1).sum(1), torch.from_numpy(found.scored.scores).double() - found.values.start
    )


def test_a_reward_that_fails_on_the_way_masks_that_step() -> None:
    """Scores that are not numbers at intermediate states take their steps out of the loss, and no outcome with them."""
    calls = []

    def reward(x0: torch.Tensor) -> torch.Tensor:
        calls.append(len(x0))
        scores = x0.flatten(1).sum(1).clone()
        if len(calls) == 3:  # the second valued state: after the first trained step
            scores[5] = np.nan
        return scores

    found, _, trainer = values_of(reward, **{"credit.values": "x0"})
    assert calls == [64, 64, 64, 64] and bool(found.scored.valid.all())
    assert found.values.step[:, 0].isnan().nonzero().flatten().tolist() == [5]
    batch, _ = trainer._credit(found)
    assert batch.element[5].tolist() == [False, False, True]  # the two gains that it bounds
    assert bool(batch.element[torch.arange(64) != 5].all())


@pytest.mark.parametrize("values", ["x0", "ode"])
@pytest.mark.parametrize("name", ["vgpo", "dense_grpo", "stepwise", "tp_grpo", "step_credit"])
def test_every_estimator_of_values_trains(values: str, name: str) -> None:
    options = {"shift": 20.0} if name == "vgpo" else {}
    adapter = GaussianAdapter(10)
    config = toy_config(**(
        BASE | {"credit.values": values, "advantage.name": name, "advantage.options": options, "optimizer.lr": 0.02}
    ))  # fmt: skip
    trainer = Trainer(config, adapter, LatentReward(lambda x0: x0.flatten(1).sum(1)), rows(4))
    before = trainer.iterate()["score/mean"]
    for _ in range(12):
        after = trainer.iterate()["score/mean"]
    assert after > before + 0.05


@pytest.mark.parametrize(
    ("name", "values"),
    [("gae", "x0"), ("open_reasoner_zero", "x0"), ("ma_rlhf", "x0"), ("mt_ppo", "x0"), ("rubricem", "x0"),
     ("prorag", "x0"), ("spo_chain", "ode"), ("spo_tree", "none"), ("gigpo", "none"), ("grpo_ma", "none")],
)  # fmt: skip
def test_token_methods_read_values_and_trees_of_a_trajectory(name: str, values: str) -> None:
    tree = {"rollout.share_prefix": True, "rollout.splits": [2, 3], "rollout.children": 4} if values == "none" else {}
    adapter = GaussianAdapter(10)
    config = toy_config(**(BASE | tree | {"credit.values": values, "advantage.name": name, "optimizer.lr": 0.02}))
    trainer = Trainer(config, adapter, LatentReward(lambda x0: x0.flatten(1).sum(1)), rows(4))
    before = trainer.iterate()["score/mean"]
    for _ in range(12):
        after = trainer.iterate()["score/mean"]
    assert after > before + 0.05


def test_a_failed_value_takes_its_sample_out_of_methods_without_gaps() -> None:
    """gae reads the values of all states of a sample: one that failed leaves the loss, and the others keep theirs."""

    def reward(x0: torch.Tensor) -> torch.Tensor:
        calls.append(len(x0))
        scores = x0.flatten(1).sum(1).clone()
        if len(calls) == 3 and broken:
            scores[5] = np.nan
        return scores

    found = {}
    for broken in (True, False):
        calls: list[int] = []
        collected, _, trainer = values_of(reward, **{"credit.values": "x0", "advantage.name": "gae"})
        found[broken] = trainer._credit(collected)[0]
    assert not bool(found[True].element[5].any()) and bool(found[False].element.all())
    others = torch.arange(64) != 5
    torch.testing.assert_close(found[True].advantage[others], found[False].advantage[others])
