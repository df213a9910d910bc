"""The quality report of process rewards: pairs by a plain loop, known correlations, calibration of a known model."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.credit.quality import (
    calibration_error,
    linear_fit,
    pair_counts,
    quality,
    quality_text,
    rank_correlation,
    usable_levels,
)


def by_loop(value, reward, group) -> tuple[float, int]:
    right, pairs = 0.0, 0
    for i in range(len(value)):
        for j in range(i):
            if group[i] == group[j] and reward[i] != reward[j]:
                pairs += 1
                product = (value[i] - value[j]) * (reward[i] - reward[j])
                right += 1.0 if product > 0 else 0.5 if product == 0 else 0.0
    return right, pairs


def test_pairs_against_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(0, 5, (40,), generator=generator).double()
    reward = torch.randint(0, 4, (40,), generator=generator).double()
    group = torch.randint(0, 6, (40,), generator=generator)
    assert pair_counts(value, reward, group) == by_loop(value.tolist(), reward.tolist(), group.tolist())


def test_kendall_tau_equals_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(1)
    value = torch.randint(0, 6, (30,), generator=generator).double()
    reward = torch.randint(0, 3, (30,), generator=generator).double()
    group = torch.arange(30) // 10
    expected = [stats.kendalltau(value[group == g], reward[group == g]).statistic for g in range(3)]
    assert rank_correlation(value, reward, group) == pytest.approx(sum(expected) / 3, abs=1e-12)
    assert rank_correlation(value, torch.ones(30), group) is None


def test_groups_are_not_compared_with_one_another() -> None:
    """A value that knows the prompt alone is at chance, however well it correlates over all samples."""
    group = torch.arange(40) // 4
    reward = group.double() + torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64).repeat(10)
    found = quality(group.double(), torch.ones(40, dtype=torch.bool), reward, group, torch.full((40,), 0.5), levels=2)
    assert (found[1].accuracy, found[1].pairs, found[1].rank_correlation) == (0.5, 60, None)
    assert found[1].explained > 0.99 and found[0].accuracy is None and found[0].samples == 0


def test_levels_invalid_samples_and_time() -> None:
    t = torch.tensor([0.0, 0.1, 0.6, 0.7, 1.0, 1.0])
    value = torch.tensor([1.0, 2.0, 2.0, 1.0, torch.nan, 5.0])
    valid = torch.tensor([True, True, True, True, True, False])
    reward = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    found = quality(
        value, valid, reward, torch.zeros(6, dtype=torch.int64), t, levels=4, seconds=[0.01, None, 0.02, 0.03]
    )
    assert [q.samples for q in found] == [2, 0, 2, 2] and [q.invalid for q in found] == [0, 0, 0, 2]
    assert [q.accuracy for q in found] == [1.0, None, 0.0, None]
    assert [q.milliseconds for q in found] == pytest.approx([5.0, None, 10.0, 15.0])
    assert found[0].slope == pytest.approx(1.0) and found[2].slope == pytest.approx(-1.0)
    assert usable_levels(found, 0.55) == [True, False, False, False]
    text = quality_text(found)
    assert len(text.splitlines()) == 5 and "0.75 to 1" in text.splitlines()[1]


def test_calibration_error_of_a_true_model_falls_to_zero_and_of_an_overconfident_one_does_not() -> None:
    """Outcomes drawn from sigmoid(gap): stated chances hold; with gaps three times too large they do not."""
    generator = torch.Generator().manual_seed(3)
    n = 4000
    gap = torch.randn(n, generator=generator).double()
    won = torch.rand(n, generator=generator) < torch.sigmoid(gap)
    value = torch.stack([gap, torch.zeros(n, dtype=torch.float64)], 1)
    reward = torch.stack([won.double(), (~won).double()], 1).flatten()
    group = torch.arange(n).repeat_interleave(2)
    few = slice(0, 2 * 1500)  # pairs of all rows are listed, so keep the matrix small
    true = calibration_error(value.flatten()[few], reward[few], group[few])
    loud = calibration_error(3 * value.flatten()[few], reward[few], group[few])
    assert true < 0.05 and loud > 0.1
    assert calibration_error(torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.int64)) is None


def test_linear_fit_of_a_line_with_noise() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    y = 2 * x - 1 + torch.tensor([0.1, -0.1, -0.1, 0.1], dtype=torch.float64)
    slope, offset, explained = linear_fit(x, y)
    assert (slope, offset) == (pytest.approx(2.0), pytest.approx(-1.0))
    assert explained == pytest.approx(1 - 0.04 / (0.04 + 20))
    assert linear_fit(torch.ones(3), x[:3]) == (None, None, None)
    assert linear_fit(x, torch.ones(4))[2] is None and math.isclose(linear_fit(x, torch.ones(4))[0], 0.0)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="must be equally long"):
        quality(
            torch.zeros(3),
            torch.ones(2, dtype=torch.bool),
            torch.zeros(3),
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(3),
        )
