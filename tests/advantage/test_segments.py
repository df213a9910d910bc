"""Group reductions against plain loops, for ids of any spacing, and their masks."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from flowrl.advantage import (
    drop_thin_groups,
    group_count,
    group_max,
    group_mean,
    group_min,
    group_std,
    group_sum,
)

FAR = [7_000_000_000, -3, 7_000_000_000, -3, 5]


def _members(group: list[int], valid: list[bool], i: int) -> list[int]:
    return [j for j in range(len(group)) if group[j] == group[i] and valid[j]]


@pytest.mark.parametrize("seed", range(20))
def test_against_plain_loops(seed: int) -> None:
    draw = random.Random(seed)
    size = draw.randint(1, 40)
    ids = [draw.choice([7_000_000_000, -3, 0, 2**62, -(2**62)]) for _ in range(size)]
    x = [draw.gauss(0, 3) for _ in range(size)]
    valid = [draw.random() < 0.8 for _ in range(size)]
    tensors = torch.tensor(x, dtype=torch.float64), torch.tensor(ids), torch.tensor(valid)
    spreads = {ddof: group_std(*tensors, ddof=ddof) for ddof in (0, 1)}
    total, mean = group_sum(*tensors), group_mean(*tensors)
    low, high, count = group_min(*tensors), group_max(*tensors), group_count(*tensors[1:])
    for i in range(size):
        values = [x[j] for j in _members(ids, valid, i)]
        assert count[i] == len(values)
        assert total[i].item() == pytest.approx(sum(values), abs=1e-12)
        if not values:
            empty = (mean[i], low[i], high[i], *(s[i] for s in spreads.values()))
            assert all(math.isnan(statistic) for statistic in empty)
            continue
        assert mean[i].item() == pytest.approx(statistics.fmean(values), abs=1e-12)
        assert (low[i].item(), high[i].item()) == (min(values), max(values))
        assert spreads[0][i].item() == pytest.approx(statistics.pstdev(values), abs=1e-12)
        sample = statistics.stdev(values) if len(values) > 1 else 0.0
        assert spreads[1][i].item() == pytest.approx(sample, abs=1e-12)


def test_far_apart_ids() -> None:
    x = torch.tensor([1.0, 10.0, 3.0, 20.0, 4.0])
    assert group_mean(x, torch.tensor(FAR)).tolist() == [2.0, 15.0, 2.0, 15.0, 4.0]
    assert group_count(torch.tensor(FAR)).tolist() == [2, 2, 2, 2, 1]


def test_what_the_mask_excludes_is_never_read() -> None:
    group = torch.tensor(FAR)
    valid = torch.tensor([True, True, False, True, False])
    for junk in (math.nan, math.inf, 1e30):
        x = torch.tensor([1.0, 10.0, junk, 20.0, junk])
        assert group_sum(x, group, valid).tolist() == [1.0, 30.0, 1.0, 30.0, 0.0]
        assert group_max(x, group, valid)[:4].tolist() == [1.0, 20.0, 1.0, 20.0]
        assert group_std(x, group, valid)[:4].tolist() == [0.0, 5.0, 0.0, 5.0]


def test_order_does_not_matter() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2000, generator=draw, dtype=torch.float64) * 1e3 + 1e6
    group = torch.randint(0, 5, (2000,), generator=draw)
    order = torch.randperm(2000, generator=draw)
    for reduce in (group_mean, group_std):
        straight, shuffled = reduce(x, group)[order], reduce(x[order], group[order])
        assert torch.allclose(straight, shuffled, rtol=1e-12, atol=0)


def test_spread_survives_a_large_offset() -> None:
    x = torch.tensor([1e9, 1e9 + 1.0], dtype=torch.float64)
    assert group_std(x, torch.tensor([0, 0]))[0].item() == 0.5


def test_dtypes() -> None:
    group = torch.tensor([0, 0])
    for dtype, result in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert group_mean(torch.ones(2, dtype=dtype), group).dtype == result


def test_drop_thin_groups() -> None:
    group = torch.tensor([4, 4, 4, 9, 9, 9])
    valid = torch.tensor([True, True, False, True, False, False])
    assert drop_thin_groups(valid, group, 2).tolist() == [True, True, False, False, False, False]
    assert drop_thin_groups(valid, group, 1).tolist() == valid.tolist()
    assert not drop_thin_groups(valid, group, 3).any()


@pytest.mark.parametrize(
    ("x", "group", "valid", "message"),
    [
        (torch.ones(0), torch.ones(0, dtype=torch.int64), None, "group: expected int64 [B] with B >= 1"),
        (torch.ones(2), torch.ones(2, dtype=torch.int32), None, "group: expected int64 [B]"),
        (torch.ones(2), torch.ones(2, 1, dtype=torch.int64), None, "x: expected floating [2, 1] like group"),
        (torch.ones(3), torch.ones(2, dtype=torch.int64), None, "x: expected floating [2] like group"),
        (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), None, "x: expected floating [2]"),
        (torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(2), "valid: expected bool [2] like group"),
        (torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(3, dtype=torch.bool), "valid: expected bool [2]"),
    ],
)
def test_bad_input_is_named(x: torch.Tensor, group: torch.Tensor, valid: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError) as error:
        group_mean(x, group, valid)
    assert message in str(error.value)
