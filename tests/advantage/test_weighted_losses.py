"""Weighted and gated policy losses, and the identities that all three modules of losses share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage import clipping, sequence_losses, weighted_losses
from flowrl.advantage.aggregation import aggregate
from flowrl.advantage.clipping import ppo
from flowrl.advantage.loss_record import PolicyLoss
from flowrl.advantage.method import Method
from flowrl.advantage.weighted_losses import (
    cispo,
    clip_cov,
    dcpo_bounds,
    dppo,
    dro,
    ess_lr,
    gaussian_probability,
    kl_cov,
    sapo,
)

from .test_clipping import Case, at_ratio, draw, gradient, plain

EVERY = (*clipping.METHODS, *sequence_losses.METHODS, *weighted_losses.METHODS)
LOSSES = [m for m in EVERY if m.kind == "policy_loss"]


def call(method: Method, case: Case) -> PolicyLoss:
    """The method at its defaults, with uniforms where it asks for them."""
    assert method.call is not None
    extra = (torch.full(case[3].shape, 0.5),) if method.call is clip_cov else ()
    out = method.call(*case, *extra)
    assert isinstance(out, PolicyLoss)
    return out


Step = tuple[float, float, bool, bool]  # loss, gradient, low, high


def _cispo(lp: float, old: float, a: float, lower: float, upper: float) -> Step:
    rho = math.exp(lp - old)
    weight = min(max(rho, lower), upper)
    return -weight * a * lp, -weight * a, rho < lower, rho > upper


def _sapo(lp: float, old: float, a: float, pos: float, neg: float) -> Step:
    rho, tau = math.exp(lp - old), pos if a > 0 else neg
    s = 1 / (1 + math.exp(-tau * (rho - 1)))
    return -a * 4 / tau * s, -a * 4 * s * (1 - s) * rho, False, False


def _dppo(lp: float, old: float, a: float, low: float, high: float, cap: float, kl: bool = False) -> Step:
    p, q = math.exp(lp), math.exp(old)
    far = q * math.log(q / p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8)) if kl else abs(p - q)
    lo, hi = a < 0 and p < q and far > low, a > 0 and p > q and far > high
    weight = 0.0 if lo or hi else min(p / q, cap)
    return -weight * a * lp, -weight * a, lo, hi


def _dro(lp: float, old: float, a: float, beta: float) -> Step:
    return -(a * lp - beta / 2 * (lp - old) ** 2), -(a - beta * (lp - old)), False, False


LOOPS: list[tuple[Callable[..., PolicyLoss], dict[str, Any], Callable[[float, float, float], Step]]] = [
    (cispo, {}, lambda lp, old, a: _cispo(lp, old, a, 0.8, 1.28)),
    (cispo, {"low": None, "high": 0.1}, lambda lp, old, a: _cispo(lp, old, a, -1.0, 1.1)),
    (cispo, {"low": 0.1, "high": 4.0}, lambda lp, old, a: _cispo(lp, old, a, 0.9, 5.0)),
    (sapo, {}, lambda lp, old, a: _sapo(lp, old, a, 1.0, 1.05)),
    (sapo, {"tau_pos": 2.0, "tau_neg": 0.5}, lambda lp, old, a: _sapo(lp, old, a, 2.0, 0.5)),
    (dppo, {}, lambda lp, old, a: _dppo(lp, old, a, 0.2, 0.2, 20)),
    (dppo, {"low": 0.05, "high": 0.02, "cap": 1.5}, lambda lp, old, a: _dppo(lp, old, a, 0.05, 0.02, 1.5)),
    (dppo, {"kind": "kl", "low": 0.05, "high": 0.01}, lambda lp, old, a: _dppo(lp, old, a, 0.05, 0.01, 20, True)),
    (dro, {}, lambda lp, old, a: _dro(lp, old, a, 0.05)),
    (dro, {"beta": 2.0}, lambda lp, old, a: _dro(lp, old, a, 2.0)),
]


@pytest.mark.parametrize(("loss", "options", "reference"), LOOPS)
def test_against_a_plain_loop(
    loss: Callable[..., PolicyLoss], options: dict[str, Any], reference: Callable[[float, float, float], Step]
) -> None:
    lp, old, a, mask = draw(0, spread=0.9)
    case = ((lp.detach() + 2.9).requires_grad_(), (old + 2.9).clamp(max=0.0), a, mask)  # probabilities up to 0.9
    value, grad = gradient(loss, case, **options)
    out = loss(*case, **options)
    flags = [torch.zeros_like(mask) if x is None else x for x in (out.low, out.high)]
    for i, t in mask.nonzero().tolist():
        want = reference(*(x[i, t].item() for x in case[:3]))
        assert (value[i, t].item(), grad[i, t].item()) == pytest.approx(want[:2], rel=1e-9, abs=1e-12)
        assert (flags[0][i, t].item(), flags[1][i, t].item()) == want[2:]
    for x in (value, grad, *flags):
        assert not x[~mask].any()


def _cov_loops(case: Case, uniform: Tensor, share: float, bounds: tuple[float, float]) -> tuple[set[Any], set[Any]]:
    """Cells that Clip-Cov takes out and that KL-Cov holds back."""
    lp, old, a, mask = case
    cells = [tuple(c) for c in mask.nonzero().tolist()]
    mean_a, mean_lp = (math.fsum(x[c].item() for c in cells) / len(cells) for x in (a, lp))
    cov = {c: (a[c].item() - mean_a) * (lp[c].item() - mean_lp) for c in cells}
    number = max(1, int(share * len(cells)))
    inside = []
    for c in cells:
        _, _, lo, hi = plain(math.exp(lp[c].item() - old[c].item()), a[c].item(), 0.8, 1.2)
        if bounds[0] < cov[c] < bounds[1] and not lo and not hi:
            inside.append(c)
    return set(sorted(inside, key=lambda c: uniform[c].item())[:number]), set(
        sorted(cells, key=lambda c: -cov[c])[:number]
    )


@pytest.mark.parametrize(("share", "bounds"), [(2e-4, (0.05, 5.0)), (0.25, (-0.2, 0.3)), (1.0, (0.0, 9.0))])
def test_covariance_losses_against_a_plain_loop(share: float, bounds: tuple[float, float]) -> None:
    case = draw(11)
    uniform = torch.rand(7, 5, generator=torch.Generator().manual_seed(1))
    uniform[~case[3]] = math.nan
    out, held = _cov_loops(case, uniform, share, bounds)
    assert out and held
    base, slope = gradient(ppo, case)
    value, grad = gradient(clip_cov, (*case, uniform), share=share, cov_low=bounds[0], cov_high=bounds[1])
    kl_value, kl_grad = gradient(kl_cov, case, share=share, coef=0.5)
    d = torch.where(case[3], (case[0] - case[1]).detach(), 0.0)
    plain_value = torch.where(case[3], -case[2] * d.exp(), 0.0)
    for c in [tuple(x) for x in torch.ones_like(case[3]).nonzero().tolist()]:
        assert value[c].item() == (0.0 if c in out else base[c].item())
        assert grad[c].item() == (0.0 if c in out else slope[c].item())
        extra = 0.5 if c in held else 0.0
        assert kl_value[c].item() == pytest.approx(plain_value[c].item() + extra * abs(d[c].item()))
        assert kl_grad[c].item() == pytest.approx(plain_value[c].item() + extra * math.copysign(1, d[c].item()))
    flags, same = clip_cov(*case, uniform), ppo(*case)
    assert torch.equal(flags.low, same.low) and torch.equal(flags.high, same.high)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [m for m in LOSSES if "on_policy" not in m.exempt], ids=lambda m: m.key)
def test_on_policy_gradient(method: Method) -> None:
    lp, _, a, mask = draw(12)
    case = (lp, lp.detach().clone(), a, mask)
    minus_a = torch.where(mask, -a, 0.0)
    loss = call(method, case).loss
    (grad,) = torch.autograd.grad(loss.sum(), lp, retain_graph=True)
    assert torch.allclose(grad, minus_a, atol=1e-12)
    (grad,) = torch.autograd.grad(aggregate(loss, mask, "seq_mean_mean"), lp)
    length = mask.sum(1, keepdim=True).clamp(min=1)
    assert torch.allclose(grad, minus_a / length / mask.any(1).sum(), atol=1e-12)


def test_cispo_coefficients() -> None:
    case = at_ratio([(0.7, 1.0), (0.7, -1.0), (1.4, 1.0), (1.4, -1.0)])
    assert (-gradient(cispo, case)[1])[0].tolist() == pytest.approx([0.8, -0.8, 1.28, -1.28])
    far = at_ratio([(0.01, 1.0), (4.9, 1.0), (6.0, -1.0)])
    assert (-gradient(cispo, far, low=None, high=4.0)[1])[0].tolist() == pytest.approx([0.01, 4.9, -5.0])
    at_one = cispo(*at_ratio([(1.0, 1.0)]), low=0, high=0)
    assert at_one.low is not None and at_one.high is not None and not at_one.low.any() and not at_one.high.any()


def test_sapo_worked_numbers() -> None:
    case = at_ratio([(0.5, 1.0), (1.0, 1.0), (1.5, 1.0)])
    value, grad = gradient(sapo, case)
    assert (-value)[0].tolist() == pytest.approx([1.5102, 2.0, 2.4898], abs=1e-4)
    assert (-grad)[0, 1].item() == pytest.approx(1.0)
    value, grad = gradient(sapo, at_ratio([(1.0, -1.0), (1.0, 2.0)]), tau_pos=8.0, tau_neg=0.5)
    assert value[0].tolist() == pytest.approx([4.0, -0.5]) and grad[0].tolist() == pytest.approx([1.0, -2.0])


def _probabilities(pairs: list[tuple[float, float]], a: float) -> Case:
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in zip(*pairs, strict=True))
    return p.requires_grad_(), q, torch.tensor([a]).double(), torch.ones_like(p, dtype=torch.bool)


def test_dppo_drops_only_the_harmful_way() -> None:
    pairs = [(0.9, 0.5), (0.6, 0.5), (0.2, 0.5), (0.9, 0.01), (1.0, 0.5), (1.0, 1.0)]
    up, down = _probabilities(pairs, 1.0), _probabilities(pairs, -1.0)
    assert (-gradient(dppo, up)[1])[0].tolist() == pytest.approx([0, 1.2, 0.4, 0, 0, 1])
    assert gradient(dppo, down)[1][0].tolist() == pytest.approx([1.8, 1.2, 0, 20, 2, 1])
    assert gradient(dppo, down, cap=50.0)[1][0, 3].item() == pytest.approx(50)
    # The binary KL of (0.5, 0.6) is 0.0204, of (0.5, 0.9) 0.5108, and from 0.5 to 1 it is large but finite.
    kl = {"kind": "kl", "low": 0.05, "high": 0.0205}
    assert (-gradient(dppo, up, **kl)[1])[0].tolist() == pytest.approx([0, 1.2, 0.4, 0, 0, 1])
    assert (-gradient(dppo, up, **(kl | {"high": 0.0204}))[1])[0, 1].item() == 0.0
    assert (-gradient(dppo, up, **(kl | {"high": 8.8}))[1])[0, 4].item() == pytest.approx(2.0)
    assert (-gradient(dppo, up, **(kl | {"high": 8.5}))[1])[0, 4].item() == 0.0
    given = torch.tensor([[0.1, 0.3, 0.3, 0.2, 0.2, 0.3]], dtype=torch.float64)
    assert (-gradient(dppo, (*up, given))[1])[0].tolist() == pytest.approx([1.8, 0, 0.4, 20, 2, 1])
    assert gradient(dppo, (*down, given))[1][0].tolist() == pytest.approx([1.8, 1.2, 0, 20, 2, 1])
    edge = torch.tensor([[0.0, 0.2, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64)
    none = _probabilities(pairs, 0.0)
    for case, kept in ((up, edge), (down, edge), (none, 9 * edge)):
        out = dppo(*case, kept)
        assert out.low is not None and out.high is not None and not out.low.any() and not out.high.any()
    dense = (up[0] + 30, up[1] + 30, *up[2:])
    assert torch.equal(dppo(*dense, given).high, dppo(*up, given).high)  # type: ignore[arg-type]


def test_dro_gradient_vanishes_at_its_optimum() -> None:
    old, a = torch.full((1, 3), -5.0, dtype=torch.float64), torch.tensor([[0.05, -0.1, 0.2]]).double()
    case = (old + a / 0.05, old, a, torch.ones(1, 3, dtype=torch.bool))
    assert torch.allclose(gradient(dro, case)[1], torch.zeros(1, 3).double(), atol=1e-12)
    assert gradient(dro, case, beta=0.1)[1][0].tolist() == pytest.approx([0.05, -0.1, 0.2])


def test_clip_cov_takes_the_smallest_uniforms() -> None:
    a = torch.tensor([[2.0, -2.0, 2.0, -2.0, 2.0, -2.0]], dtype=torch.float64)
    lp = torch.tensor([[-1.0, -3.0, -1.0, -3.0, -3.0, -1.0]], dtype=torch.float64).requires_grad_()
    mask = torch.ones(1, 6, dtype=torch.bool)  # cov = 2 on the first four, -2 on the last two
    uniform = torch.tensor([[0.9, 0.3, 0.1, 0.8, 0.0, 0.0]])
    for share, lost in ((2e-4, [2]), (0.4, [1, 2]), (0.5, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        loss = clip_cov(lp, lp.detach(), a, mask, uniform, share=share).loss
        assert (loss[0] == 0).nonzero().flatten().tolist() == lost
    for edge in ({"cov_low": 2.0}, {"cov_high": 2.0}):
        assert (clip_cov(lp, lp.detach(), a, mask, uniform, share=1.0, **edge).loss != 0).all()
    assert (clip_cov(lp, lp.detach(), a, mask, uniform).loss == 0).sum() == 1
    default = {"share": 2e-4, "cov_low": 1.0, "cov_high": 5.0, "low": 0.2, "high": 0.2}
    for scale in (0.7, 1.2, 2.4, 2.6):  # cov 0.98, 2.88, 11.5 / 2 ... on both sides of the default bounds
        case = (lp, lp.detach() + torch.tensor([0.3, -0.3, 0.1, -0.1, 0, 0]), a * scale, mask, uniform)
        assert torch.equal(clip_cov(*case).loss, clip_cov(*case, **default).loss)
        assert bool((clip_cov(*case).loss == 0).any()) == (scale in (0.7, 1.2, 2.4))


def test_clip_cov_without_candidates_is_ppo() -> None:
    case = draw(13)
    uniform = torch.zeros(7, 5)
    assert torch.equal(clip_cov(*case, uniform, cov_low=50.0, cov_high=60.0).loss, ppo(*case).loss)
    other = {"low": 0.1, "high": 0.4}
    assert torch.equal(clip_cov(*case, uniform, cov_low=50.0, cov_high=60.0, **other).loss, ppo(*case, **other).loss)
    nothing = (*case[:3], torch.zeros_like(case[3]))
    assert not clip_cov(*nothing, uniform).loss.any() and not kl_cov(*nothing).loss.any()


def test_kl_cov_holds_back_the_greatest() -> None:
    old = torch.tensor([[-1.5, -2.0, -3.5]], dtype=torch.float64)
    lp = (old + torch.tensor([0.5, -0.5, -0.5])).requires_grad_()
    a = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    plain_loss = torch.tensor([-2 * math.exp(0.5), 0.0, math.exp(-0.5)])
    for share, held in ((2e-4, [1, 0, 0]), (0.67, [1, 0, 1]), (1.0, [1, 1, 1])):
        loss = kl_cov(lp, old, a, mask, share=share).loss[0]
        assert loss.tolist() == pytest.approx((plain_loss + 0.5 * torch.tensor(held)).tolist())
    assert torch.allclose(kl_cov(lp, old, a, mask, coef=0.0).loss[0], plain_loss.double())
    assert torch.equal(kl_cov(lp, old, a, mask).loss, kl_cov(lp, old, a, mask, share=2e-4, coef=1.0).loss)


@pytest.mark.parametrize("loss", [clip_cov, kl_cov])
def test_covariance_means_over_ranks(loss: Callable[..., PolicyLoss]) -> None:
    """Another rank with very low advantages makes every step here an above-average one."""
    lp, old, a, mask = draw(14)
    extra = (torch.rand(7, 5, generator=torch.Generator().manual_seed(2)),) if loss is clip_cov else ()
    bounds = {"cov_low": 0.0, "cov_high": 100.0, "share": 0.3} if loss is clip_cov else {"share": 0.3}
    other = torch.stack([torch.tensor([-400.0, 50.0]), torch.tensor([-200.0, 50.0])]).double()
    calls: list[int] = []

    def reduce(x: Tensor) -> Tensor:
        calls.append(1)
        return x + other[(len(calls) - 1) // 2] if x.shape == (2,) else x

    ours = loss(lp, old, a, mask, *extra, reduce=reduce, **bounds).loss
    wide = [torch.cat([x, torch.full((10, 5), fill).to(x)]) for x, fill in ((lp, -4.0), (old, -4.0), (a, -8.0))]
    mask_of_all = torch.cat([mask, torch.ones(10, 5, dtype=torch.bool)])
    mean_a, mean_lp = (x[mask_of_all].mean() for x in (wide[2], wide[0]))
    cov = torch.where(mask, (a - mean_a) * (lp - mean_lp), -math.inf).detach()
    number = int(0.3 * mask.sum())
    if loss is kl_cov:
        touched = ours != torch.where(mask, -a * (lp - old).exp(), 0.0)
        assert set(touched.flatten().nonzero().flatten().tolist()) == set(cov.flatten().topk(number).indices.tolist())
    else:
        base = ppo(lp, old, a, mask)
        inside = (cov > 0) & ~(base.low | base.high)  # type: ignore[operator]
        order = torch.where(inside, extra[0], 2.0).flatten().argsort()[:number]
        touched = (ours == 0) & mask & (base.loss != 0)
        zero = {c for c in order.tolist() if base.loss.flatten()[c] != 0 and inside.flatten()[c]}
        assert set(touched.flatten().nonzero().flatten().tolist()) == zero and zero
    assert not torch.equal(ours, loss(lp, old, a, mask, *extra, **bounds).loss)


def test_dcpo_worked_numbers() -> None:
    q = torch.tensor([1.0, 0.9, 0.01, 0.0], dtype=torch.float64)
    lower, upper = dcpo_bounds(q)
    assert lower.tolist() == pytest.approx([0.8, 0.7687, 0.5, 0.5], abs=1e-4)
    assert upper.tolist() == pytest.approx([1.1708, 1.1872, 5.0, 10.0], abs=1e-4)
    some = torch.linspace(0.0, 1.0, 50, dtype=torch.float64)
    lower, upper = dcpo_bounds(some, low=0.1, high=0.3, cap=3.0)
    assert (lower.diff() >= 0).all() and (upper.diff() <= 0).all() and upper.max() == 3.0
    assert (lower[30] * (1 - lower[30]) * some[30]).item() == pytest.approx(0.1)
    assert (upper[30] * (upper[30] - 1) * some[30]).item() == pytest.approx(0.3)


def test_gaussian_probability() -> None:
    q = gaussian_probability(torch.tensor([[0.0, 4.0, 8.0]]), dimensions=4)
    assert q[0].tolist() == pytest.approx([1.0, math.exp(-0.5), math.exp(-1.0)]) and q.dtype == torch.float32
    assert gaussian_probability(torch.tensor([2.0]), dimensions=1).item() == pytest.approx(math.exp(-1))


def test_ess_lr_worked_numbers() -> None:
    assert ess_lr(torch.full((8,), 0.3), lr=2e-5).item() == pytest.approx(2e-5)
    assert ess_lr(torch.tensor([1e9, 1.0, 1.0, 1.0]), lr=2e-5).item() == pytest.approx(1e-5)
    assert ess_lr(torch.tensor([2.0, 1.0, 1.0])).item() == pytest.approx(math.sqrt(16 / 6 / 3))
    assert ess_lr(torch.tensor([2.0, 1.0, 1.0]), reference=0.5).item() == pytest.approx(math.sqrt(16 / 6 / 1.5))
    valid = torch.tensor([True, False, True, True])
    out = ess_lr(torch.tensor([2.0, math.nan, 1.0, 1.0]).half(), valid)
    assert out.item() == pytest.approx(math.sqrt(16 / 6 / 3)) and out.dtype == torch.float32
    assert ess_lr(torch.zeros(3)).item() == 0.0 and ess_lr(torch.ones(3), lr=0).item() == 0.0
    assert ess_lr(torch.ones(4), ~torch.ones(4, dtype=torch.bool)).item() == 0.0
    other = torch.tensor([3.0, 5.0, 2.0]).double()
    ranks = ess_lr(torch.tensor([2.0, 1.0, 1.0]), reduce=lambda x: x + other)
    assert ranks.item() == pytest.approx(math.sqrt(49 / 11 / 5))


@pytest.mark.parametrize("method", LOSSES, ids=lambda m: m.key)
def test_half_precision_and_no_gradient_elsewhere(method: Method) -> None:
    lp, old, a, mask = draw(8, dtype=torch.bfloat16)
    old.requires_grad_()
    a.requires_grad_()
    before = [x.detach().clone() for x in (lp, old, a)]
    loss = call(method, (lp, old, a, mask)).loss
    assert loss.dtype == torch.float32 and not loss[~mask].any()
    loss.sum().backward()
    assert old.grad is None and a.grad is None and lp.grad is not None
    assert lp.grad.isfinite().all() and not lp.grad[~mask].any() and lp.grad.any()
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip((lp, old, a), before, strict=True))


ONE: Case = at_ratio([(1.0, 1.0)])
DENSE = (ONE[0] + 9, ONE[1], *ONE[2:])
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: cispo(*ONE, low=-1), "low: expected a finite number >= 0, got -1"),
    (lambda: cispo(*ONE, high=-1), "high: expected a finite number >= 0, got -1"),
    (lambda: sapo(*ONE, tau_pos=0), "tau_pos: expected a finite number > 0, got 0"),
    (lambda: sapo(*ONE, tau_neg=0), "tau_neg: expected a finite number > 0, got 0"),
    (lambda: dppo(*ONE, kind="js"), "kind: expected 'tv' or 'kl', got 'js'"),  # type: ignore[arg-type]
    (lambda: dppo(*ONE, low=-1), "low: expected"),
    (lambda: dppo(*ONE, high=-1), "high: expected"),
    (lambda: dppo(*ONE, cap=0), "cap: expected a finite number > 0"),
    (lambda: dppo(*ONE, torch.tensor([[-0.5]])), "divergence: expected numbers >= 0, got -0.5"),
    (lambda: dppo(*ONE, torch.ones(1)), r"divergence: expected real \[1, 1\] like mask"),
    (lambda: dppo(*DENSE), "log_prob: expected log-probabilities <= 0, got up to 4; a density needs a substitute"),
    (lambda: dppo(ONE[0], ONE[1] + 5.002, *ONE[2:]), "old_log_prob: expected log-probabilities <= 0, got up to 0.002"),
    (lambda: gaussian_probability(torch.tensor([-1.0]), dimensions=2), "square: expected numbers >= 0"),
    (lambda: gaussian_probability(torch.tensor([1.0]), dimensions=0), "dimensions: expected a finite number >= 1"),
    (lambda: dcpo_bounds(torch.ones(1), low=0), "low: expected a finite number > 0, got 0"),
    (lambda: dcpo_bounds(torch.ones(1), high=0), "high: expected a finite number > 0, got 0"),
    (lambda: dcpo_bounds(torch.ones(1), cap=1), "cap: expected a finite number > 1, got 1"),
    (lambda: dcpo_bounds(torch.tensor([1.1])), r"old_prob: expected probabilities in \[0, 1\]"),
    (lambda: dcpo_bounds(torch.tensor([-0.1])), r"old_prob: expected probabilities in \[0, 1\]"),
    (lambda: dro(*ONE, beta=0), "beta: expected a finite number > 0, got 0"),
    (lambda: clip_cov(*ONE, torch.zeros(1, 1), share=-1), "share: expected"),
    (lambda: clip_cov(*ONE, torch.zeros(1, 1), cov_high=0.5), "cov_high: expected a finite number >= 1, got 0.5"),
    (lambda: clip_cov(*ONE, torch.zeros(1, 1), cov_low=math.nan), "cov_low: expected a finite number"),
    (lambda: clip_cov(*ONE, torch.zeros(1, 1), low=-1), "low, high: expected numbers >= 0"),
    (lambda: clip_cov(*ONE, torch.zeros(1)), r"uniform: expected real \[1, 1\] like mask"),
    (lambda: clip_cov(*ONE, torch.full((1, 1), math.inf)), "uniform: 1 unmasked steps are not finite"),
    (lambda: kl_cov(*ONE, share=-1), "share: expected"),
    (lambda: kl_cov(*ONE, coef=-1), "coef: expected"),
    (lambda: ess_lr(torch.ones(1, 2)), r"importance: expected floating \[B\], got torch.float32 \[1, 2\]"),
    (lambda: ess_lr(torch.ones(0)), r"importance: expected floating \[B\]"),
    (lambda: ess_lr(torch.ones(2, dtype=torch.int64)), r"importance: expected floating \[B\], got torch.int64"),
    (lambda: ess_lr(torch.ones(2), torch.ones(2)), r"valid: expected bool \[2\]"),
    (lambda: ess_lr(torch.tensor([1.0, -1.0])), "importance: expected finite numbers >= 0 in valid rows"),
    (lambda: ess_lr(torch.tensor([1.0, math.inf])), "importance: expected finite numbers >= 0 in valid rows"),
    (lambda: ess_lr(torch.ones(2), lr=-1), "lr: expected a finite number >= 0"),
    (lambda: ess_lr(torch.ones(2), reference=0), "reference: expected a finite number > 0"),
]


@pytest.mark.parametrize(("function", "message"), BAD)
def test_bad_input(function: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function()


def test_a_rounded_probability_of_one_is_taken() -> None:
    lp = torch.tensor([[5e-4]])
    ones = torch.ones(1, 1)
    loss = dppo(lp, torch.zeros(1, 1), ones, ones.bool(), low=0.0, high=0.0)
    assert loss.high is not None and not loss.high.any()
    limit = torch.tensor([[1e-3]], dtype=torch.float64)
    assert dppo(limit, limit, ones, ones.bool()).loss.item() == -1e-3
