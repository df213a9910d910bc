"""Row-level policy losses: worked numbers, row gradients by autograd, plain loops, identities and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.aggregation import aggregate
from flowrl.advantage.clipping import ppo
from flowrl.advantage.loss_record import PolicyLoss
from flowrl.advantage.sequence_losses import dhpo, entropy_share, gmpo, gspo, luspo, sequence_ratio, vespo

from .test_clipping import Case, at_ratio, draw, gradient, plain

Row = list[tuple[float, float, float]]  # (d, A, log_prob) of the unmasked steps
Step = tuple[float, float, bool, bool]  # loss, gradient, low, high


def _gspo(row: Row, low: float, high: float, factor: float = 1.0) -> list[Step]:
    s = math.exp(sum(d for d, _, _ in row) / len(row))
    out = []
    for _, a, _ in row:
        value, coefficient, is_low, is_high = plain(s, a, 1 - low, 1 + high)
        out.append((factor * value, -factor * coefficient * a, is_low, is_high))
    return out


def _gmpo(row: Row, low: float, high: float) -> list[Step]:
    flags = [(a < 0 and d < -low, a > 0 and d > high) for d, a, _ in row]
    kept = [
        0.0 if a == 0 else -low if lo else high if hi else d for (d, a, _), (lo, hi) in zip(row, flags, strict=True)
    ]
    s = math.exp(sum(kept) / len(row))
    return [(-a * s, 0.0 if lo or hi else -a * s, lo, hi) for (_, a, _), (lo, hi) in zip(row, flags, strict=True)]


def _vespo(row: Row, positive: tuple[float, float], negative: tuple[float, float]) -> list[Step]:
    w = min(max(math.exp(sum(d for d, _, _ in row)), 1e-8), math.exp(20))
    out = []
    for _, a, lp in row:
        k, lam = negative if a < 0 else positive
        phi = w**k * math.exp(lam * (1 - w))
        out.append((-phi * a * lp, -phi * a, False, False))
    return out


def _dhpo(row: Row, w: float, step: float, seq: float) -> list[Step]:
    out = []
    for (d, a, _), of_row in zip(row, _gspo(row, seq, seq), strict=True):
        value, coefficient, lo, hi = plain(math.exp(d), a, 1 - step, 1 + step)
        loss, grad = w * value + (1 - w) * of_row[0], -w * coefficient * a + (1 - w) * of_row[1]
        out.append((loss, grad, lo or of_row[2], hi or of_row[3]))
    return out


LOOPS: list[tuple[Callable[..., PolicyLoss], dict[str, float], Callable[[Row], list[Step]]]] = [
    (gspo, {}, lambda row: _gspo(row, 3e-4, 4e-4)),
    (gspo, {"low": 0.2, "high": 0.3}, lambda row: _gspo(row, 0.2, 0.3)),
    (luspo, {}, lambda row: _gspo(row, 2e-3, 2.5e-3, len(row))),
    (luspo, {"low": 0.2, "high": 0.3}, lambda row: _gspo(row, 0.2, 0.3, len(row))),
    (gmpo, {}, lambda row: _gmpo(row, 0.4, 0.4)),
    (gmpo, {"low": 0.2, "high": 0.7}, lambda row: _gmpo(row, 0.2, 0.7)),
    (vespo, {}, lambda row: _vespo(row, (2, 3), (3, 2))),
    (vespo, {"k_pos": 1, "lambda_pos": 0, "k_neg": 0, "lambda_neg": 0.5}, lambda row: _vespo(row, (1, 0), (0, 0.5))),
    (dhpo, {}, lambda row: _dhpo(row, 0.5, 0.2, 0.1)),
    (dhpo, {"step_share": 0.2, "step_low": 0.1, "step_high": 0.1}, lambda row: _dhpo(row, 0.2, 0.1, 0.1)),
    (dhpo, {"seq_low": 0.3, "seq_high": 0.3}, lambda row: _dhpo(row, 0.5, 0.2, 0.3)),
]


@pytest.mark.parametrize(("loss", "options", "reference"), LOOPS)
@pytest.mark.parametrize("seed", [0, 3])
def test_against_a_plain_loop(
    loss: Callable[..., PolicyLoss], options: dict[str, float], reference: Callable[[Row], list[Step]], seed: int
) -> None:
    case = draw(seed, spread=0.9)
    value, grad = gradient(loss, case, **options)
    out = loss(*case, **options)
    flags = [torch.zeros_like(case[3]) if x is None else x for x in (out.low, out.high)]
    lp, old, a, mask = case
    for i in range(len(mask)):
        kept = mask[i].nonzero().flatten().tolist()
        row = [((lp[i, t] - old[i, t]).item(), a[i, t].item(), lp[i, t].item()) for t in kept]
        for t, want in zip(kept, reference(row) if row else [], strict=True):
            assert (value[i, t].item(), grad[i, t].item()) == pytest.approx(want[:2], rel=1e-9, abs=1e-12)
            assert (flags[0][i, t].item(), flags[1][i, t].item()) == want[2:]
    for x in (value, grad, *flags):
        assert not x[~mask].any()


def test_gspo_worked_number_and_gradient() -> None:
    d = torch.tensor([[0.1, -0.2, 0.3, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    old = torch.full_like(d, -2.0)
    lp = (old + d).requires_grad_()
    loss = gspo(lp, old, torch.ones(1), mask, low=0.5, high=0.5).loss
    assert (-loss)[0].tolist() == pytest.approx([1.0689] * 3 + [0.0], abs=1e-4)
    (ours,) = torch.autograd.grad(aggregate(loss, mask, "seq_mean_mean"), lp)
    (exact,) = torch.autograd.grad(-(torch.where(mask, lp - old, 0.0).sum() / 3).exp(), lp)
    assert torch.allclose(ours, exact, atol=1e-15)
    assert ours[0].tolist() == pytest.approx([-1.0689 / 3] * 3 + [0.0], abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"low": 0.2, "high": 0.3}])
def test_gspo_of_one_step_is_ppo(options: dict[str, float]) -> None:
    lp, old, a, _ = draw(1)
    lp, old, a = (x.detach().nan_to_num(nan=-1.0)[:, :1] for x in (lp, old, a))
    ones = torch.ones_like(lp, dtype=torch.bool)
    bounds = options or {"low": 3e-4, "high": 4e-4}
    assert all(
        torch.allclose(x, y, atol=1e-12)
        for x, y in zip(
            gradient(gspo, (lp, old, a, ones), **options), gradient(ppo, (lp, old, a, ones), **bounds), strict=True
        )
    )
    pad = torch.full((len(lp), 2), math.nan)
    wide = tuple(torch.cat([pad, x], 1) for x in (lp, old, a))
    mask = torch.cat([pad == pad, ones], 1)
    assert torch.allclose(gspo(*wide, mask, **options).loss[:, 2:], ppo(lp, old, a, ones, **bounds).loss, atol=1e-12)


def test_gspo_limits_its_log() -> None:
    far = at_ratio([(math.exp(10.5), -1.0), (math.exp(10.5), -1.0)])
    value, grad = gradient(gspo, far)
    assert value[0].tolist() == pytest.approx([math.exp(10)] * 2) and not grad.any()
    value, grad = gradient(gspo, far, limit=11.0)
    assert value[0].tolist() == pytest.approx([math.exp(10.5)] * 2) and torch.allclose(value, grad)
    at_limit = gradient(gspo, at_ratio([(1.0, -1.0)]), limit=0.0)
    assert at_limit[0].item() == 1.0 and at_limit[1].item() == 1.0
    value, grad = gradient(luspo, far)
    assert value[0].tolist() == pytest.approx([2 * math.exp(10)] * 2) and not grad.any()
    assert torch.allclose(gradient(luspo, far, limit=11.0)[1][0], torch.full((2,), 2 * math.exp(10.5)).double())
    lp, old, _, mask = far
    assert sequence_ratio(lp, lp - old, mask)[0].tolist() == pytest.approx([math.exp(10)] * 2)


def test_gmpo_without_clipping_is_gspo() -> None:
    case = draw(2, spread=0.8)
    wide = {"low": 1e3, "high": 1e3}
    nonzero = (*case[:2], case[2].nan_to_num() + 0.01, case[3])
    for ours, same in zip(gradient(gmpo, nonzero, **wide), gradient(gspo, nonzero, **wide), strict=True):
        assert torch.allclose(ours, same, atol=1e-12)
    # verl: one loss a row, the mean over rows, for an advantage that does not vary along a row.
    lp, old, _, mask = case
    a = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 0.0]).double()
    keep = mask.any(1)
    d, sign = torch.where(mask, lp - old, 0.0), a.sign()[:, None]
    least = sign * torch.minimum(sign * d, sign * d.clamp(-0.4, 0.4))
    verl = (-a * (least.sum(1) / mask.sum(1).clamp(min=1)).exp())[keep].mean()
    ours_loss = aggregate(gmpo(lp, old, a, mask).loss, mask, "seq_mean_mean")
    assert ours_loss.item() == pytest.approx(verl.item(), abs=1e-12)
    for ours, same in zip(torch.autograd.grad(ours_loss, lp), torch.autograd.grad(verl, lp), strict=True):
        assert torch.allclose(ours, same, atol=1e-12)


def test_gmpo_at_its_bounds_and_without_advantage() -> None:
    d, a = torch.tensor([[0.5, -0.5, 2.0, -2.0]]).double(), torch.tensor([[1.0, -1.0, 0.0, 0.0]]).double()
    case = ((d - 5).requires_grad_(), torch.full_like(d, -5.0), a, torch.ones_like(d, dtype=torch.bool))
    value, grad = gradient(gmpo, case, low=0.5, high=0.5)
    out = gmpo(*case, low=0.5, high=0.5)
    assert value[0].tolist() == grad[0].tolist() == [-1.0, 1.0, 0.0, 0.0]
    assert out.low is not None and out.high is not None and not out.low.any() and not out.high.any()


def test_luspo_is_gspo_scaled_by_length() -> None:
    case = draw(5)
    mask = case[3]
    bounds = {"low": 2e-3, "high": 2.5e-3}
    ours, base = luspo(*case), gspo(*case, **bounds)
    assert torch.allclose(ours.loss, base.loss * mask.sum(1, keepdim=True), atol=1e-12)
    full = mask.any(1)
    one = aggregate(ours.loss[full], mask[full], "seq_mean_mean")
    assert one.item() == pytest.approx(aggregate(base.loss[full], mask[full], "length_scaled").item(), abs=1e-12)
    cost = torch.tensor([0.0, 1, 2, 3, 4, 5, 0.5])
    assert torch.allclose(luspo(*case, cost).loss, base.loss * cost.double()[:, None], atol=1e-12)
    on_policy = (case[0], case[0].detach(), *case[2:])
    _, grad = gradient(luspo, on_policy)
    assert torch.allclose(grad, torch.where(mask, -case[2] * mask.sum(1, keepdim=True), 0.0), atol=1e-12)


def test_vespo_worked_numbers() -> None:
    for w, positive, negative in ((1.0, 1.0, 1.0), (0.5, 1.1204, 0.3398), (2.0, 0.1991, 1.0827)):
        half = math.sqrt(w)  # the row's ratio is the product over its steps
        case = at_ratio([(half, 1.0), (half, -1.0)])
        value, grad = gradient(vespo, case)
        assert (-grad)[0].tolist() == pytest.approx([positive, -negative], abs=1e-4)
        assert torch.allclose(value, grad * case[0].detach())


def test_vespo_holds_the_ratio_in_bounds() -> None:
    tiny = at_ratio([(math.exp(-15.0), 1.0), (math.exp(-10.0), -1.0)])
    expected = [-(1e-16) * math.exp(3), 1e-24 * math.exp(2)]
    assert gradient(vespo, tiny)[1][0].tolist() == pytest.approx(expected, rel=1e-6)
    huge = at_ratio([(math.exp(12.0), 1.0), (math.exp(12.0), -1.0)])
    assert gradient(vespo, huge, k_pos=1, lambda_pos=0)[1][0].tolist() == pytest.approx([-math.exp(20), 0.0])


def test_dhpo_worked_number() -> None:
    case = at_ratio([(1.5, 1.0), (0.9, 1.0)])
    value, grad = gradient(dhpo, case)
    assert (-value)[0].tolist() == pytest.approx([1.15, 1.0])
    assert (-grad)[0].tolist() == pytest.approx([0.0, 0.45])
    assert gradient(gspo, case, low=1, high=1)[0][0].tolist() == pytest.approx([-1.1619] * 2, abs=1e-4)


def test_dhpo_ends_are_ppo_and_gspo() -> None:
    case = draw(9, spread=0.7)
    ends = {"step_low": 0.1, "step_high": 0.3, "seq_low": 0.05, "seq_high": 0.2}
    shares = (torch.ones_like(case[0]), torch.zeros_like(case[0]))
    for share, number, loss, bounds in zip(
        shares, (1.0, 0.0), (ppo, gspo), ({"low": 0.1, "high": 0.3}, {"low": 0.05, "high": 0.2}), strict=True
    ):
        same = gradient(loss, case, **bounds)
        for ours in (gradient(dhpo, (*case, share), **ends), gradient(dhpo, case, step_share=number, **ends)):
            assert torch.equal(ours[0], same[0]) and torch.equal(ours[1], same[1])
    mixed = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).expand_as(case[0]).double()
    out = gradient(dhpo, (*case, mixed), **ends)[0]
    for k, w in enumerate(mixed[0].tolist()):
        assert torch.equal(out[:, k], gradient(dhpo, case, step_share=w, **ends)[0][:, k])


def test_entropy_share() -> None:
    entropy = torch.tensor([[1.0, 3.0], [math.nan, 2.0]])
    mask = torch.tensor([[True, True], [False, True]])
    score = 1 / math.sqrt(2 / 3)
    low, high = 1 / (1 + math.exp(score)), 1 / (1 + math.exp(-score))
    out = entropy_share(entropy, mask)
    assert out.flatten().tolist() == pytest.approx([low, high, 0.0, 0.5]) and out.dtype == torch.float32
    assert entropy_share(torch.full((2, 2), 7.0), mask).flatten().tolist() == [0.5, 0.5, 0.0, 0.5]
    calls: list[Tensor] = []

    def twice(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    assert torch.allclose(entropy_share(entropy, mask, reduce=twice), out) and len(calls) == 2


ONE: Case = at_ratio([(1.0, 1.0)])
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: gspo(*ONE, low=-1), "low, high: expected numbers >= 0"),
    (lambda: gspo(*ONE, limit=-1), "limit: expected a finite number >= 0"),
    (lambda: gmpo(*ONE, low=-1), "low: expected a finite number >= 0"),
    (lambda: gmpo(*ONE, high=-1), "high: expected a finite number >= 0"),
    (lambda: luspo(*ONE, torch.ones(2)), r"cost: expected finite numbers >= 0 \[1\], got torch.float32 \[2\]"),
    (lambda: luspo(*ONE, torch.tensor([-1.0])), "cost: expected finite numbers >= 0"),
    (lambda: luspo(*ONE, torch.tensor([math.inf])), "cost: expected finite numbers >= 0"),
    (lambda: vespo(*ONE, k_pos=-1), "k_pos: expected"),
    (lambda: vespo(*ONE, lambda_pos=-1), "lambda_pos: expected"),
    (lambda: vespo(*ONE, k_neg=-1), "k_neg: expected"),
    (lambda: vespo(*ONE, lambda_neg=-1), "lambda_neg: expected"),
    (lambda: dhpo(*ONE, step_share=1.5), r"share: expected numbers in \[0, 1\], got 1.5 to 1.5"),
    (lambda: dhpo(*ONE, torch.tensor([[-0.5]])), r"share: expected numbers in \[0, 1\], got -0.5 to -0.5"),
    (lambda: dhpo(*ONE, torch.ones(1, 2)), r"share: expected real \[1, 1\] like mask"),
    (lambda: dhpo(*ONE, step_low=-1), "low, high: expected numbers >= 0"),
    (lambda: dhpo(*ONE, seq_high=-1), "low, high: expected numbers >= 0"),
    (lambda: entropy_share(torch.ones(2), ONE[3]), "entropy: expected real"),
    (lambda: entropy_share(torch.ones(1, 1), torch.ones(1, 1)), "mask: expected bool"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
