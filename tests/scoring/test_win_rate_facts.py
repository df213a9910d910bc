"""Win rates as a reward within groups: what holds whatever the judged values are (entry 24 of the bench)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowrl.advantage import grpo
from flowrl.scoring.scopes import draw_pairs, win_rates


def rates(values: np.ndarray, opponents: int = 0) -> np.ndarray:
    """Win rates of members of given worth, every pair judged in both orders; equal worth is a tie."""
    pairs = draw_pairs(len(values), opponents, key=1)
    first, second = values[pairs[:, 0]], values[pairs[:, 1]]
    verdict = 0.5 * (1 + np.sign(first - second))
    return win_rates(pairs, verdict, 1 - verdict, len(values))


@pytest.mark.parametrize("count", [2, 5, 16])
@pytest.mark.parametrize("levels", [3, 1000])
def test_rates_lie_in_the_unit_interval_around_one_half(count: int, levels: int) -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).integers(0, levels, count).astype(float)
        found = rates(values)
        assert found.min() >= 0 and found.max() <= 1
        assert found.mean() == pytest.approx(0.5)


def test_a_monotone_map_of_the_values_changes_nothing() -> None:
    values = np.random.default_rng(0).normal(size=12)
    values[3] = values[7]  # a tie stays a tie
    for moved in (np.exp(3 * values), values**3, 5 * values - 2):
        np.testing.assert_array_equal(rates(moved), rates(values))
    assert not np.array_equal(rates(-values), rates(values))


def test_two_members_come_out_at_plus_and_minus_one() -> None:
    """However close the two are: a win rate of 1 against 0, so advantages of +- 1 (population deviation)."""
    for values in ([0.3, 0.300001], [5.0, -2.0]):
        reward = torch.from_numpy(rates(np.array(values)))
        advantage = grpo(reward, torch.zeros(2, dtype=torch.int64)).advantage
        wanted = [1.0, -1.0] if values[0] > values[1] else [-1.0, 1.0]
        assert advantage.tolist() == pytest.approx(wanted, abs=3e-4)
    tied = grpo(torch.from_numpy(rates(np.array([1.0, 1.0]))), torch.zeros(2, dtype=torch.int64)).advantage
    assert tied.tolist() == [0.0, 0.0]
