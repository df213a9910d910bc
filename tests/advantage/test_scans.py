"""The backward scans and the small functions around them."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.advantage.checks import check_choice, check_share
from flowrl.advantage.scans import backward_scan, gae_scan, last_step, next_step, read_path
from flowrl.advantage.statistics import step_result

from .paths import NAN


@pytest.mark.parametrize("lam", [1.0, 0.9])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_a_long_scan_stays_exact(lam: float, bootstrapped: bool) -> None:
    """Within 1e-5 of a float64 recursion at 1,024 steps with holes, whatever the masked steps hold."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.rand(16, 1024, generator=draw) < 0.8
    reward, value = (torch.randn(16, 1024, generator=draw) for _ in range(2))
    after = torch.randn(16, generator=draw) if bootstrapped else None
    ahead = torch.zeros(16).double() if after is None else after.double()
    carried = torch.zeros(16, dtype=torch.float64)
    wanted = torch.zeros(16, 1024, dtype=torch.float64)
    for t in reversed(range(1024)):
        delta = reward[:, t].double() + ahead - value[:, t].double()
        carried = torch.where(mask[:, t], delta + lam * carried, carried)
        ahead = torch.where(mask[:, t], value[:, t].double(), ahead)
        wanted[:, t] = torch.where(mask[:, t], carried, 0.0)
    junk = [torch.where(mask, x, NAN) for x in (reward, value)]
    out = gae_scan(junk[0], junk[1], mask, 1.0, lam, after)
    assert out.dtype == torch.float32 and float((out - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("steps", [1, 63, 64, 65, 130])
def test_backward_scan_against_a_plain_loop(steps: int) -> None:
    x, factor = torch.randn(3, steps, dtype=torch.float64), torch.rand(3, steps)
    before = x.clone()
    out, carried = backward_scan(x, factor), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(steps)):
        carried = x[:, t] + factor[:, t] * carried
        assert float((out[:, t] - carried).abs().max()) < 1e-12
    assert torch.equal(x, before)


def test_last_and_next_step() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert last_step(mask).tolist() == [3, -1, 4]
    assert next_step(mask).tolist() == [[1, 3, 3, 5, 5], [5] * 5, [1, 2, 3, 4, 5]]


def test_read_path_leaves_out_rows_without_a_value() -> None:
    mask = torch.tensor([[True, False], [True, True], [False, False], [True, True]])
    path = read_path(torch.tensor([[NAN, 0.0], [NAN, 2.0], [0.0, 0.0], [0.0, 0.0]]), mask)
    assert path.live.tolist() == [False, True, False, True]
    assert path.kept.tolist() == [[False, False], [True, True], [False, False], [True, True]]
    assert path.reward.tolist() == [[0, 0], [0, 2], [0, 0], [0, 0]]


def test_step_result_weighs_the_kept_steps() -> None:
    kept = torch.tensor([[True, False]])
    x = torch.ones(1, 2, dtype=torch.float64)
    out = step_result(x, kept, kept.any(1), x, kept, {"part": x})
    assert out.advantage.dtype == torch.float32 and out.weight.tolist() == [[1, 0]] and out.loss_mask is kept
    assert out.returns is not None and out.returns.dtype == torch.float32 and out.critic_mask is kept
    assert set(out.channels) == {"part"}
    bare = step_result(x, kept, kept.any(1))
    assert bare.returns is None and bare.critic_mask is None and bare.channels == {}


def test_checks_of_options() -> None:
    check_share("gamma", 0)
    check_share("gamma", 1)
    check_choice("pool", "a", ("a", "b"))
    for wrong in (-1e-9, 1 + 1e-9, math.nan):
        with pytest.raises(ValueError, match=r"^gamma: expected"):
            check_share("gamma", wrong)
    with pytest.raises(ValueError, match=r"^pool: expected one of .* got 'c'"):
        check_choice("pool", "c", ("a", "b"))
