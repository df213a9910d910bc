"""R2VPO, RAPO, CAPO and BGPO: worked numbers, plain loops, closed forms, gradients, bounds, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from flowrl.advantage.aggregation import aggregate
from flowrl.advantage.loss_record import PolicyLoss
from flowrl.advantage.regularised_losses import (
    Curvature,
    R2VPOState,
    bgpo,
    capo_curvature,
    forward_kl_reweighted,
    gaussian_curvature,
    gaussian_ratio_variance,
    lowrank_quadratics,
    r2vpo,
    r2vpo_update,
    rapo,
    ratio_spread,
    reward_trust,
)

NAN = math.nan


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def slope(loss: Tensor, log_prob: Tensor) -> list[list[float]]:
    rows: list[list[float]] = torch.autograd.grad(loss.sum(), log_prob, retain_graph=True)[0].tolist()
    return rows


def test_r2vpo_worked_numbers() -> None:
    d = f64([[0.8, 1.2]]).log().requires_grad_()
    result = r2vpo(d, torch.zeros(1, 2).double(), torch.ones(1).double(), ones(1, 2))
    assert -result.loss.mean().item() == pytest.approx(0.98, abs=1e-9)
    assert slope(result.loss, d)[0] == pytest.approx([-0.96, -0.96], abs=1e-9)
    assert result.low is None and result.high is None


def test_r2vpo_multiplier_comes_from_the_option_or_the_state() -> None:
    d = f64([[math.log(1.2)]]).requires_grad_()
    plain = (d, torch.zeros(1, 1).double(), f64([2.0]), ones(1, 1))
    weightless = r2vpo(*plain, multiplier=0.0).loss
    assert weightless.item() == pytest.approx(-2.4) and slope(weightless, d) == [[pytest.approx(-2.4)]]
    assert r2vpo(*plain, multiplier=3.0).loss.item() == pytest.approx(-2.4 + 0.12)
    assert r2vpo(*plain, None, R2VPOState.start(3.0), multiplier=9.0).loss.item() == pytest.approx(-2.4 + 0.12)
    assert R2VPOState.start().multiplier.item() == 0.5


def test_r2vpo_with_the_closed_form_of_gaussians() -> None:
    distance = f64([[0.09, NAN]]).requires_grad_()
    variance = gaussian_ratio_variance(distance, torch.tensor(1.0))
    mask = torch.tensor([[True, False]])
    loss = r2vpo(
        torch.zeros(1, 2).double(), torch.zeros(1, 2).double(), f64([1.0]), mask, variance, multiplier=2.0
    ).loss
    assert loss[0].tolist() == pytest.approx([-1 + 2 * math.expm1(0.09), 0.0])
    loss.sum().backward()
    assert distance.grad is not None and distance.grad[0, 0].item() == pytest.approx(2 * math.exp(0.09))


def test_r2vpo_dual_variable() -> None:
    state = R2VPOState.start(0.2)
    state = r2vpo_update(state, torch.tensor(0.04), limit=0.01, rate=2.0)
    assert state.multiplier.item() == pytest.approx(0.26) and state.multiplier.dtype == torch.float64
    assert r2vpo_update(state, torch.tensor(0.0), limit=0.3).multiplier.item() == 0.0
    assert r2vpo_update(state, torch.tensor(0.02)).multiplier.item() == pytest.approx(0.27)
    assert R2VPOState.from_state_dict(state.state_dict()).multiplier.item() == state.multiplier.item()
    assert state.multiplier.item() == pytest.approx(0.26)
    assert R2VPOState.start(0.0).multiplier.item() == 0.0
    for record, name in ((state, "multiplier"), (Curvature(Z, Z), "policy_shift")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, None)


def test_ratio_spread_is_the_mean_over_unmasked_steps_of_all_ranks() -> None:
    new = f64([[math.log(0.8), math.log(1.5)], [NAN, 0.0]])
    mask = torch.tensor([[True, True], [False, True]])
    old = torch.zeros(2, 2).double().masked_fill(~mask, NAN)
    assert ratio_spread(new, old, mask).item() == pytest.approx((0.04 + 0.25) / 3, abs=1e-6)
    assert ratio_spread(new, old, mask, reduce=lambda x: x + x).item() == pytest.approx((0.04 + 0.25) / 3, abs=1e-6)
    assert ratio_spread(old, new, mask).item() == pytest.approx((0.0625 + 1 / 9) / 3, abs=1e-6)


def test_ratio_variance_of_gaussians_is_exact() -> None:
    assert gaussian_ratio_variance(torch.tensor(0.09), torch.tensor(1.0)).item() == pytest.approx(0.0942, abs=1e-4)
    shift, sigma = 0.36, 0.8
    noise = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    weight = (-noise.square() / 2).exp()
    weight = weight / weight.sum()
    rho = (noise * shift / sigma - shift**2 / (2 * sigma**2)).exp()
    exact = gaussian_ratio_variance(f64(shift**2), f64(sigma)).item()
    assert (weight * (rho - 1).square()).sum().item() == pytest.approx(exact, rel=1e-9)
    assert exact == pytest.approx(math.expm1(0.2025), rel=1e-9)
    far = torch.tensor(50.0, requires_grad=True)
    cut = gaussian_ratio_variance(far, torch.tensor(1.0))
    assert cut.item() == pytest.approx(math.expm1(20), rel=1e-6)
    assert torch.autograd.grad(cut, far)[0].item() == 0.0
    assert gaussian_ratio_variance(torch.tensor(0.5).bfloat16(), torch.tensor(1.0)).dtype == torch.float32


LOSSES: dict[str, Callable[..., PolicyLoss]] = {
    "r2vpo": r2vpo,
    "bgpo": bgpo,
    "rapo": lambda *x: rapo(*x, torch.zeros_like(x[0]), torch.ones(len(x[0])), coef=0.0),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_on_policy_gradient_is_the_policy_gradient(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    log_prob = torch.randn(5, 4, generator=generator).requires_grad_()
    advantage = torch.randn(5, 4, generator=generator).requires_grad_()
    old = log_prob.detach().clone().requires_grad_()
    loss = LOSSES[name](log_prob, old, advantage, ones(5, 4)).loss
    assert torch.allclose(loss, -advantage, atol=1e-6)
    loss.sum().backward()
    assert log_prob.grad is not None and torch.allclose(log_prob.grad, -advantage, atol=1e-6)
    assert old.grad is None and advantage.grad is None


@pytest.mark.parametrize("seed", range(3))
def test_losses_against_plain_loops(seed: int) -> None:
    draw = random.Random(seed)
    new, old = ([[draw.gauss(-1, 0.5) for _ in range(5)] for _ in range(4)] for _ in range(2))
    mask = [[draw.random() < 0.7 for _ in range(5)] for _ in range(4)]
    advantage = [draw.gauss(0, 1) for _ in range(4)]
    new_tensor, old_tensor = f64(new), f64(old)
    new_tensor[~torch.tensor(mask)], old_tensor[~torch.tensor(mask)] = NAN, NAN
    new_tensor.requires_grad_()
    for name, loss in LOSSES.items():
        if name == "rapo":
            continue
        value = loss(new_tensor, old_tensor, f64(advantage), torch.tensor(mask)).loss
        gradient = slope(value, new_tensor)
        for i in range(4):
            for t in range(5):
                d, a = new[i][t] - old[i][t], advantage[i]
                rho = math.exp(d)
                if name == "r2vpo":
                    wanted, rise = -rho * a + 0.5 * (rho - 1) ** 2, -rho * (a - (rho - 1))
                else:
                    wanted, rise = (-a * (1 + d), -a) if a >= 0 else (-a * rho, -a * rho)
                assert value[i, t].item() == pytest.approx(wanted if mask[i][t] else 0.0, abs=1e-12)
                assert gradient[i][t] == pytest.approx(rise if mask[i][t] else 0.0, abs=1e-12)


def test_bgpo_worked_numbers() -> None:
    d = f64([[0.2, -0.1], [0.2, -0.1]])
    loss = bgpo(d, torch.zeros(2, 2).double(), f64([1.0, -1.0]), ones(2, 2)).loss
    assert (-loss.mean(1)).tolist() == pytest.approx([1.05, -1.0631], abs=1e-4)
    assert math.exp(0.05) == pytest.approx(1.0513, abs=1e-4)
    single = bgpo(f64([[0.7]]), torch.zeros(1, 1).double(), f64([-2.0]), ones(1, 1)).loss
    assert single.item() == pytest.approx(2 * math.exp(0.7), abs=1e-12)
    assert bgpo(f64([[0.7]]), torch.zeros(1, 1).double(), f64([0.0]), ones(1, 1)).loss.item() == 0.0


def test_bgpo_bounds_the_surrogate() -> None:
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(2000, 6, generator=generator, dtype=torch.float64)
    advantage = torch.randn(2000, generator=generator, dtype=torch.float64)
    mask = torch.rand(2000, 6, generator=generator) < 0.6
    mask[:, 0] = True
    loss = bgpo(d, torch.zeros_like(d), advantage, mask).loss
    size = mask.sum(1)
    original = -advantage * ((d * mask).sum(1) / size).exp()
    assert (loss.sum(1) / size >= original - 1e-9).all()
    whole = aggregate(loss, mask, "seq_mean_mean").item()
    assert whole == pytest.approx((loss.sum(1) / size).mean().item(), abs=1e-9)


def test_forward_kl_worked_numbers() -> None:
    log_u = f64([[0.0, math.log(2.0), -3.0]])
    log_prob = (-log_u).requires_grad_()
    trust, mask = torch.ones(1), ones(1, 3)
    value = forward_kl_reweighted(log_prob, torch.zeros(1, 3).double(), mask, trust)
    assert value[0].tolist() == pytest.approx([0.0, 0.3863, 1 - 4 * math.exp(-3)], abs=1e-4)
    assert slope(value, log_prob)[0] == pytest.approx([0.0, -2 * math.log(2), 3 * math.exp(-3)], abs=1e-9)
    near = forward_kl_reweighted(f64([[-1e-3]]), f64([[0.0]]), ones(1, 1), torch.ones(1))
    assert near.item() == pytest.approx(0.5e-6, rel=1e-2)
    far = forward_kl_reweighted(f64([[-50.0]]), f64([[0.0]]), ones(1, 1), torch.ones(1))
    assert far.item() == pytest.approx(9 * math.exp(10) + 1, rel=1e-9)
    cut = forward_kl_reweighted(f64([[-50.0]]), f64([[0.0]]), ones(1, 1), torch.ones(1), limit=0.5)
    assert cut.item() == pytest.approx(1 - 0.5 * math.exp(0.5), rel=1e-9)


def test_forward_kl_averages_to_the_exact_one_under_the_policy() -> None:
    policy, reference = f64([0.5, 0.3, 0.2]), f64([0.2, 0.2, 0.6])
    value = forward_kl_reweighted(policy.log()[None], reference.log()[None], ones(1, 3), torch.ones(1))
    exact = (reference * (reference / policy).log()).sum().item()
    assert (policy * value[0]).sum().item() == pytest.approx(exact, abs=1e-12)


def test_forward_kl_of_a_group_does_not_see_the_scale_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    new, reference = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    group, mask = torch.tensor([7, -2, 7, -2]), torch.rand(4, 3, generator=generator) < 0.8
    offset = torch.where(group == 7, 1.5, -0.5)[:, None]
    first = forward_kl_reweighted(new, reference, mask, torch.ones(4), group)
    assert torch.allclose(first, forward_kl_reweighted(new, reference + offset, mask, torch.ones(4), group), atol=1e-12)
    assert (first >= 0).all() and first[mask].min() > 0 and not first[~mask].any()
    row = new[:1].clone().requires_grad_()
    alone = forward_kl_reweighted(row, reference[:1], torch.zeros(1, 3, dtype=torch.bool), torch.ones(1), group[:1])
    assert not alone.any() and not torch.autograd.grad(alone.sum(), row)[0].any()


@pytest.mark.parametrize("seed", range(3))
def test_rapo_against_a_plain_loop(seed: int) -> None:
    draw = random.Random(seed)
    new, old, reference = ([[draw.gauss(-1, 0.5) for _ in range(4)] for _ in range(5)] for _ in range(3))
    mask = [[draw.random() < 0.7 for _ in range(4)] for _ in range(5)]
    advantage, trust = [draw.gauss(0, 1) for _ in range(5)], [draw.random() for _ in range(5)]
    group = [3, 90, 3, 3, 90]
    tensors = [f64(x).masked_fill(~torch.tensor(mask), NAN) for x in (new, old, reference)]
    tensors[0].requires_grad_()
    inputs = (*tensors[:2], f64(advantage), torch.tensor(mask), tensors[2], f64(trust))
    for grouped in (False, True):
        value = rapo(*inputs, torch.tensor(group) if grouped else None, coef=0.3).loss
        gradient = slope(value, tensors[0])
        u = [[math.exp(trust[i] * reference[i][t] - new[i][t]) for t in range(4)] for i in range(5)]
        for i in range(5):
            peers = [u[j][t] for j in range(5) for t in range(4) if group[j] == group[i] and mask[j][t]]
            scale = sum(peers) / len(peers) if grouped else 1.0
            for t in range(4):
                w, rho = u[i][t] / scale, math.exp(new[i][t] - old[i][t])
                wanted = -rho * advantage[i] + 0.3 * (w * math.log(w) - w + 1)
                rise = -rho * advantage[i] - 0.3 * w * math.log(w)
                assert value[i, t].item() == pytest.approx(wanted if mask[i][t] else 0.0, abs=1e-9)
                assert gradient[i][t] == pytest.approx(rise if mask[i][t] else 0.0, abs=1e-9)
    cut = rapo(*inputs, limit=0.1).loss - rapo(*inputs, limit=0.1, coef=0.0).loss
    assert 0 < cut.max().item() <= 0.01 * (1 - 0.9 * math.exp(0.1)) + 1e-9


def test_reward_trust_runs_from_the_worst_to_the_best_of_a_group() -> None:
    rewards = f64([1.0, 5.0, 3.0, 2.0, 2.0, NAN, 9.0])
    group = torch.tensor([4, 4, 9, 9, 9, 9, 1])
    trust = reward_trust(rewards, group)
    assert trust.dtype == torch.float32 and trust.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert reward_trust(f64([0.0, 1.0, 4.0]), torch.tensor([1, 1, 1])).tolist() == [0.0, 0.25, 1.0]
    kept = torch.tensor([True, True, False])
    assert reward_trust(f64([0.0, 1.0, 4.0]), torch.tensor([1, 1, 1]), kept).tolist() == [0.0, 1.0, 1.0]
    assert reward_trust(f64([2.0, 2.0]), torch.tensor([1, 1])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_lowrank_quadratics_against_full_matrices(fisher: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pi = torch.randn(2, 3, 4, generator=generator).softmax(-1)
    hidden, delta = torch.randn(2, 3, 5, generator=generator), torch.randn(4, 5, generator=generator)
    token = torch.randint(4, (2, 3), generator=generator)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantage = torch.tensor([1.5, -0.5])
    poisoned = torch.where(mask, token, -1)
    result = lowrank_quadratics(pi, poisoned, hidden, delta, advantage, mask, fisher=fisher)  # type: ignore[arg-type]
    flat = delta.reshape(-1).double()
    for i in range(2):
        for t in range(3):
            if not mask[i, t]:
                assert result.objective_shift[i, t] == 0 and result.policy_shift[i, t] == 0
                continue
            p, h, a = pi[i, t].double(), hidden[i, t].double(), advantage[i].item()
            e = torch.nn.functional.one_hot(token[i, t], 4).double() - p
            state = p.diag() - torch.outer(p, p)
            full = torch.outer(h, h)
            hessian = a * torch.kron(torch.outer(e, e) - state, full)
            objective = a * torch.kron(e, h) @ flat + flat @ hessian @ flat / 2
            policy = flat @ torch.kron(torch.outer(e, e) if fisher == "sampled" else state, full) @ flat / 2
            assert result.objective_shift[i, t].item() == pytest.approx(objective.item(), rel=1e-4, abs=1e-4)
            assert result.policy_shift[i, t].item() == pytest.approx(policy.item(), rel=1e-4, abs=1e-4)


def test_sampled_fisher_averages_to_the_exact_one_and_no_update_shifts_nothing() -> None:
    pi = torch.tensor([0.5, 0.3, 0.2]).expand(1, 3, 3)
    token, hidden = torch.tensor([[0, 1, 2]]), torch.tensor([0.4, -1.0]).expand(1, 3, 2)
    delta = torch.tensor([[0.3, 0.1], [-0.2, 0.5], [0.0, 0.7]])
    inputs = (pi, token, hidden)
    sampled = lowrank_quadratics(*inputs, delta, torch.ones(1), ones(1, 3))
    exact = lowrank_quadratics(*inputs, delta, torch.ones(1), ones(1, 3), fisher="exact")
    assert (pi[0, 0] * sampled.policy_shift[0]).sum().item() == pytest.approx(exact.policy_shift[0, 0].item(), rel=1e-5)
    still = lowrank_quadratics(*inputs, torch.zeros(3, 2), torch.ones(1, 3), ones(1, 3))
    assert not still.objective_shift.any() and not still.policy_shift.any()
    assert capo_curvature(still.objective_shift, still.policy_shift, ones(1, 3)).all()


def test_gaussian_curvature_is_the_second_order_of_the_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    eps, direction = (torch.randn(2, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([[0.5, 1.0, 2.0], [0.7, 0.3, 0.0]]).double()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantage = torch.tensor([2.0, -1.0]).double()
    gaps = []
    for size in (1e-2, 5e-3):
        dmu = size * direction
        inner, square = (eps * dmu).sum(-1), dmu.square().sum(-1)
        result = gaussian_curvature(inner, square, sigma, advantage, mask)
        d = inner / sigma - square / (2 * sigma**2)
        objective = advantage[:, None] * d.expm1()
        gaps.append((result.objective_shift - objective)[mask].abs().max().item())
        expected = (square / (2 * sigma**2))[mask]
        assert torch.allclose(result.policy_shift[mask].double(), expected, rtol=1e-5)
        assert not result.objective_shift[~mask].any() and result.policy_shift.dtype == torch.float32
    assert gaps[1] < gaps[0] / 6 < 1e-3
    same = gaussian_curvature(inner, square, sigma, advantage[:, None].expand(2, 3), mask)
    assert torch.equal(same.objective_shift, result.objective_shift)


def test_curvature_mask() -> None:
    mask = torch.tensor([[True] * 7 + [False]])
    objective = f64([[0.0, 0.25, -0.25, 0.26, -0.26, 0.0, 0.0, NAN]])
    policy = f64([[0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.51, NAN]])
    kept = capo_curvature(objective, policy, mask, low=-0.25, high=0.25, limit=0.5)
    assert kept[0].tolist() == [True, True, True, False, False, True, False, False]
    scale = f64([[0.039, 0.041, -0.041, 0.039]])
    shifts = f64([[0.99e-4, 0.0, 0.0, 1.01e-4]])
    assert capo_curvature(scale / 4, shifts, ones(1, 4)).tolist() == [[True, False, False, False]]
    assert torch.equal(capo_curvature(objective, policy, mask, low=-math.inf, high=math.inf, limit=math.inf), mask)
    assert capo_curvature(f64([[0.0]]), f64([[0.0]]), ones(1, 1), low=0.0, high=0.0, limit=0.0).all()


def test_half_precision_gives_float32() -> None:
    half = torch.zeros(1, 2).bfloat16()
    a, mask = torch.ones(1).bfloat16(), ones(1, 2)
    for loss in LOSSES.values():
        assert loss(half, half, a, mask).loss.dtype == torch.float32
    assert rapo(half, half, a, mask, half, a).loss.dtype == torch.float32


Z, M, A1 = torch.zeros(2, 3), ones(2, 3), torch.zeros(2)
IDS = torch.zeros(2, dtype=torch.int64)
PI, H, D = torch.full((2, 3, 4), 0.25), torch.zeros(2, 3, 5), torch.zeros(4, 5)
TOKEN = torch.zeros(2, 3, dtype=torch.int64)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: r2vpo(Z, Z, A1, M, multiplier=-1.0), "multiplier: expected a number >= 0, got -1"),
    (lambda: r2vpo(Z, Z, A1, M, torch.zeros(2)), r"ratio_variance: expected floating \[2, 3\]"),
    (lambda: r2vpo(Z, Z, A1, M, TOKEN), r"ratio_variance: expected floating \[2, 3\] like mask, got torch.int64"),
    (lambda: r2vpo(Z, Z, A1, Z), "mask: expected bool"),
    (lambda: R2VPOState.start(-0.1), "multiplier: expected a number >= 0, got -0.1"),
    (lambda: r2vpo_update(R2VPOState.start(), torch.zeros(1)), "spread: expected a finite scalar"),
    (lambda: r2vpo_update(R2VPOState.start(), torch.tensor(NAN)), "spread: expected a finite scalar, got nan"),
    (lambda: r2vpo_update(R2VPOState.start(), torch.tensor(0.0), limit=0.0), "limit, rate: expected numbers > 0"),
    (lambda: r2vpo_update(R2VPOState.start(), torch.tensor(0.0), rate=0.0), "limit, rate: expected numbers > 0"),
    (lambda: ratio_spread(Z, Z, Z), "mask: expected bool"),
    (lambda: ratio_spread(Z, Z[:1], M), r"old_log_prob: expected real \[2, 3\]"),
    (lambda: gaussian_ratio_variance(Z, torch.tensor(0.0)), "sigma: expected values > 0"),
    (lambda: rapo(Z, Z, A1, M, Z, A1, coef=-1.0), "coef: expected a number >= 0"),
    (lambda: rapo(Z, Z, A1, M, Z, A1, limit=0.0), "limit: expected a number > 0"),
    (lambda: rapo(Z, Z, A1, M, Z, A1, IDS.int()), r"group: expected int64 \[2\]"),
    (lambda: rapo(Z, Z, A1, M, Z, A1 + 1.1), r"trust: expected \[2\] in \[0, 1\]"),
    (lambda: rapo(Z, Z, A1, M, Z, A1 - 0.1), r"trust: expected \[2\] in \[0, 1\]"),
    (lambda: rapo(Z, Z, A1, M, Z, torch.zeros(3)), r"trust: expected \[2\] in \[0, 1\], got \[3\]"),
    (lambda: rapo(Z, Z, A1, M, Z[:1], A1), r"reference_log_prob: expected real \[2, 3\]"),
    (lambda: forward_kl_reweighted(Z[:1], Z, M, A1), r"log_prob: expected floating \[2, 3\]"),
    (lambda: forward_kl_reweighted(TOKEN, Z, M, A1), r"log_prob: expected floating \[2, 3\]"),
    (lambda: forward_kl_reweighted(Z, Z, Z, A1), "mask: expected bool"),
    (lambda: reward_trust(A1, IDS.int()), "group: expected int64"),
    (lambda: lowrank_quadratics(PI[0], TOKEN, H, D, A1, M), r"probability: expected \[2, 3, 'V'\]"),
    (lambda: lowrank_quadratics(PI[:, :2], TOKEN, H, D, A1, M), r"probability: expected \[2, 3, 'V'\]"),
    (lambda: lowrank_quadratics(PI, TOKEN.int(), H, D, A1, M), r"token: expected int64 \[2, 3\]"),
    (lambda: lowrank_quadratics(PI, TOKEN, H[0], D, A1, M), r"hidden: expected \[2, 3, 'H'\]"),
    (lambda: lowrank_quadratics(PI, TOKEN, H[:, :2], D, A1, M), r"hidden: expected \[2, 3, 'H'\]"),
    (lambda: lowrank_quadratics(PI, TOKEN, H, D.T, A1, M), r"delta: expected \[4, 5\], got \[5, 4\]"),
    (lambda: lowrank_quadratics(PI, TOKEN, H, D, Z[:1], M), r"advantage: expected real \[2, 3\]"),
    (lambda: lowrank_quadratics(PI, TOKEN, H, D, A1, M, fisher="full"), "fisher: expected 'sampled' or 'exact'"),  # type: ignore[arg-type]
    (lambda: gaussian_curvature(Z, Z, Z, A1, M), "sigma: expected values > 0, got a least value of 0"),
    (lambda: gaussian_curvature(Z[:1], Z, Z + 1, A1, M), "noise_shift: expected real"),
    (lambda: gaussian_curvature(Z, Z, Z + 1, A1, Z), "mask: expected bool"),
    (lambda: capo_curvature(Z, Z, M, low=0.2, high=0.1), "low, high, limit: expected low <= high"),
    (lambda: capo_curvature(Z, Z, M, limit=-1.0), "low, high, limit: expected low <= high"),
    (lambda: capo_curvature(Z[:1], Z, M), "objective_shift: expected real"),
    (lambda: capo_curvature(Z, Z[:1], M), "policy_shift: expected real"),
    (lambda: bgpo(Z[0], Z[0], A1, M[0]), r"log_prob: expected floating \[B, T\]"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
