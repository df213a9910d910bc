"""CoPG and REAL: worked numbers, loops over pairs, gradients against closed forms, limits, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowrl.advantage.aggregation import aggregate
from flowrl.advantage.contrastive_losses import contrasted_groups, copg, copg_rows, real, real_rows
from flowrl.advantage.estimators import rloo

NAN = math.nan
GROUP = [40, -3, 40, 40, -3, 7, 12, 12, 40, 12]
VALID = [True, True, True, True, True, True, True, True, False, True]


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def batch(seed: int) -> tuple[list[list[float]], list[list[float]], list[list[bool]], list[float]]:
    """Log-probs, reference, mask and rewards of 10 rows; row 4 has no reward and row 7 no step."""
    draw = random.Random(seed)
    new, old = ([[draw.gauss(-1, 0.5) for _ in range(4)] for _ in range(10)] for _ in range(2))
    mask = [[draw.random() < 0.7 for _ in range(4)] for _ in range(10)]
    mask[0][0] = mask[2][1] = mask[3][2] = mask[1][0] = mask[6][0] = mask[9][0] = True
    mask[7] = [False] * 4
    rewards = [draw.gauss(0, 1) for _ in range(10)]
    rewards[4] = NAN
    return new, old, mask, rewards


def poisoned(values: list[list[float]], mask: list[list[bool]]) -> Tensor:
    return f64(values).masked_fill(~torch.tensor(mask), NAN)


def row_drift(new: list[list[float]], old: list[list[float]], mask: list[list[bool]]) -> list[float]:
    return [sum(n - o for n, o, m in zip(*rows, strict=True) if m) for rows in zip(new, old, mask, strict=True)]


def test_copg_worked_numbers() -> None:
    log_prob = torch.zeros(3, 1).double().requires_grad_()
    inputs = (log_prob, torch.zeros(3, 1), ones(3, 1), f64([1.0, 0.2, 0.5]), torch.zeros(3, dtype=torch.int64))
    loss = copg(*inputs, beta=0.3, scale="squared").loss
    assert loss.sum().item() == pytest.approx(0.49, abs=1e-12)
    (slope,) = torch.autograd.grad(loss.sum(), log_prob)
    assert slope[:, 0].tolist() == pytest.approx([-1.3 * 0.3, 1.1 * 0.3, 0.2 * 0.3], abs=1e-12)
    scaled = copg(*inputs, beta=0.3).loss
    assert scaled.sum().item() == pytest.approx(0.49 / 0.6, abs=1e-12)
    (slope,) = torch.autograd.grad(scaled.sum(), log_prob)
    assert slope[:, 0].tolist() == pytest.approx([-0.65, 0.55, 0.1], abs=1e-12)
    drifted = copg(log_prob + 1, *inputs[1:3], f64([1.0, 0.2, 0.5]), inputs[4]).loss.sum()
    assert drifted.item() == pytest.approx(0.49 / 0.2, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_copg_gradient_is_rloo_of_the_regularised_rewards(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_prob = torch.randn(9, 4, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    group = torch.tensor([5, 5, 8, 5, 8, 8, 5, -1, 8])
    rewards = torch.randn(9, generator=generator, dtype=torch.float64)
    loss = copg(log_prob, reference, ones(9, 4), rewards, group, beta=0.7, scale="squared").loss
    (slope,) = torch.autograd.grad(loss.sum(), log_prob)
    regularised = rewards - 0.7 * (log_prob.detach() - reference).sum(1)
    expected = -1.4 * rloo(regularised, group).advantage.double()
    assert torch.allclose(slope, expected[:, None].expand(9, 4), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_copg_against_a_plain_loop_over_pairs(seed: int) -> None:
    new, reference, mask, rewards = batch(seed)
    drift = row_drift(new, reference, mask)
    value = [r - 0.4 * x for r, x in zip(rewards, drift, strict=True)]
    counts = [i for i in range(10) if VALID[i] and any(mask[i]) and not math.isnan(rewards[i])]
    kept = torch.tensor(mask)
    new_tensor = poisoned(new, mask).requires_grad_()
    inputs = (new_tensor, poisoned(reference, mask), kept, f64(rewards), torch.tensor(GROUP), torch.tensor(VALID))
    loss = copg(*inputs, beta=0.4, scale="squared").loss
    assert loss.shape == (10, 4) and not loss[~kept].any()
    for g in set(GROUP):
        rows = [i for i in counts if GROUP[i] == g]
        pairs = sum((value[i] - value[j]) ** 2 for i in rows for j in rows if i > j)
        wanted = pairs / (len(rows) - 1) if len(rows) > 1 else 0.0
        assert loss[torch.tensor(GROUP) == g].sum().item() == pytest.approx(wanted, abs=1e-9)
    for i in range(10):
        assert len({round(x, 12) for x in loss[i][kept[i]].tolist()}) <= 1
    loss.sum().backward()
    assert new_tensor.grad is not None and new_tensor.grad.isfinite().all() and not new_tensor.grad[~kept].any()
    trained = copg_rows(rewards=f64(rewards), group=torch.tensor(GROUP), mask=kept, valid=torch.tensor(VALID))
    alone = {g for g in GROUP if sum(GROUP[i] == g for i in counts) < 2}
    assert trained.tolist() == [i in counts and GROUP[i] not in alone for i in range(10)]
    assert contrasted_groups(torch.tensor(GROUP), trained).item() == 2


def test_copg_vanishes_at_its_optimum_and_on_two_rows_regresses_the_pair() -> None:
    rewards, reference = f64([1.0, -2.0, 0.5]), f64([[-1.0], [-2.0], [-0.5]])
    group = torch.tensor([1, 1, 1])
    best = reference + rewards[:, None] / 0.5 + 3.0
    assert copg(best, reference, ones(3, 1), rewards, group, beta=0.5).loss.abs().max().item() < 1e-12
    pair = copg(f64([[0.3], [-0.1]]), f64([[0.0], [0.0]]), ones(2, 1), f64([1.0, 0.0]), group[:2], scale="squared")
    assert pair.loss.sum().item() == pytest.approx((1.0 - 0.1 * 0.4) ** 2, abs=1e-12)


def test_differences_are_clamped_by_step() -> None:
    log_prob = f64([[30.0, 1.0], [-50.0, 0.0]]).requires_grad_()
    group, rewards = torch.tensor([0, 0]), f64([0.0, 0.0])
    loss = copg(log_prob, torch.zeros(2, 2), ones(2, 2), rewards, group, beta=1.0, scale="squared").loss
    assert loss.sum().item() == pytest.approx(41.0**2)
    (slope,) = torch.autograd.grad(loss.sum(), log_prob)
    assert slope.tolist() == [[0.0, pytest.approx(82.0)], [0.0, pytest.approx(-82.0)]]


def test_real_worked_numbers() -> None:
    group, correct = torch.tensor([3, 3]), torch.tensor([True, False])
    zero = torch.zeros(2, 2)
    assert real(zero, zero, ones(2, 2), correct, group).loss.sum().item() == pytest.approx(1.3863, abs=1e-4)
    log_prob = f64([[0.4, 0.0], [-0.3, 0.1]]).requires_grad_()
    loss = real(log_prob, zero.double(), ones(2, 2), correct, group).loss
    assert loss.sum().item() == pytest.approx(1.1112, abs=1e-4)
    assert loss[0].tolist() == pytest.approx([math.log1p(math.exp(-0.4)) / 2] * 2, abs=1e-9)
    wide = real(log_prob, zero.double(), ones(2, 2), correct, group, tau=2.0).loss.sum().item()
    assert wide == pytest.approx(math.log1p(math.exp(-0.1)) + math.log1p(math.exp(-0.05)), abs=1e-9)


def labels(seed: int) -> list[bool]:
    draw = random.Random(100 + seed)
    correct = [draw.random() < 0.5 for _ in range(10)]
    correct[0], correct[2], correct[1], correct[4] = True, False, True, True
    correct[6], correct[7], correct[9] = True, False, False
    return correct


@pytest.mark.parametrize("seed", range(3))
def test_real_against_a_plain_loop(seed: int) -> None:
    new, old, mask, _ = batch(seed)
    mask[4][1] = True
    correct = labels(seed)
    drift = row_drift(new, old, mask)
    kept = torch.tensor(mask)
    new_tensor = poisoned(new, mask).requires_grad_()
    inputs = (new_tensor, poisoned(old, mask), kept, torch.tensor(correct), torch.tensor(GROUP), torch.tensor(VALID))
    loss = real(*inputs).loss
    live = 0
    for g in set(GROUP):
        rows = [i for i in range(10) if GROUP[i] == g and VALID[i] and any(mask[i])]
        s = {i: drift[i] / sum(mask[i]) for i in rows}
        up, down = [i for i in rows if correct[i]], [i for i in rows if not correct[i]]
        first = math.log(1 + sum(math.exp(-s[i] / 0.5) for i in up))
        second = math.log(1 + sum(math.exp(s[i] / 0.5) for i in down))
        live += bool(up and down)
        for i in [j for j in range(10) if GROUP[j] == g]:
            wanted = 0.0
            if i in rows and up and down:
                wanted = first / len(up) if correct[i] else second / len(down)
            assert loss[i].sum().item() == pytest.approx(wanted, abs=1e-9)
    trained = real_rows(*inputs[3:5], kept, inputs[5])
    assert contrasted_groups(inputs[4], trained).item() == live == 2
    assert (loss.sum(1) > 0).tolist() == trained.tolist()
    loss.sum().backward()
    assert new_tensor.grad is not None and new_tensor.grad.isfinite().all() and not new_tensor.grad[~kept].any()


@pytest.mark.parametrize("tau", [0.5, 0.02])
def test_real_gradient_is_bounded_and_has_its_closed_form(tau: float) -> None:
    generator = torch.Generator().manual_seed(0)
    s = (3 * torch.randn(12, 1, generator=generator, dtype=torch.float64)).requires_grad_()
    correct, group = torch.arange(12) % 3 == 0, torch.arange(12) % 2
    loss = real(s, torch.zeros_like(s), ones(12, 1), correct, group, tau=tau).loss
    (slope,) = torch.autograd.grad(loss.sum(), s)
    assert loss.isfinite().all() and slope.abs().max().item() <= 1 / tau
    for i in range(12):
        sign = -1.0 if correct[i] else 1.0
        peers = [sign * s[j].item() / tau for j in range(12) if group[j] == group[i] and correct[j] == correct[i]]
        top = max(peers)
        denominator = math.exp(-top) + sum(math.exp(x - top) for x in peers)
        weight = math.exp(sign * s[i].item() / tau - top) / denominator / tau
        assert slope[i].item() == pytest.approx(sign * weight, abs=1e-9)


def test_real_falls_as_classes_part_and_vanishes_in_the_limit() -> None:
    correct, group = torch.tensor([True, False]), torch.tensor([0, 0])
    values = [
        real(f64([[x], [-x]]), torch.zeros(2, 1), ones(2, 1), correct, group).loss.sum().item()
        for x in (-20.0, -1.0, 0.0, 1.0, 19.0)
    ]
    assert values == sorted(values, reverse=True) and values[-1] < 1e-12
    assert values[0] == pytest.approx(80.0, rel=1e-9)


def test_mean_over_groups_and_permutation() -> None:
    new, old, mask, rewards = batch(7)
    correct, group, valid, kept = torch.tensor(labels(7)), torch.tensor(GROUP), torch.tensor(VALID), torch.tensor(mask)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    tensors = (poisoned(new, mask), poisoned(old, mask), kept)
    for loss, outcome in ((copg, f64(rewards)), (real, correct)):
        value = loss(*tensors, outcome, group, valid).loss  # type: ignore[operator]
        moved = loss(*(x[order] for x in tensors), outcome[order], group[order], valid[order]).loss  # type: ignore[operator]
        assert torch.allclose(moved, value[order], atol=1e-12)
        mean = aggregate(value, kept, "seq_sum_mean", 2.0)
        assert mean.item() == pytest.approx(value.sum().item() / 2)


def test_groups_without_a_contrast_give_zero_and_half_gives_float32() -> None:
    half, group = torch.zeros(3, 2).bfloat16(), torch.tensor([0, 0, 1])
    for correct in (torch.tensor([True, True, False]), torch.tensor([False, False, True])):
        loss = real(half, half, ones(3, 2), correct, group).loss
        assert loss.dtype == torch.float32 and not loss.any()
    loss = copg(half + 1, half, ones(3, 2), torch.tensor([1.0, 1.0, 5.0]).bfloat16(), group).loss
    assert loss.dtype == torch.float32 and not loss.any()


Z, M, R, G = torch.zeros(2, 3), ones(2, 3), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
C = torch.tensor([True, False])
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: copg(Z, Z, M, R, G, beta=0.0), "beta: expected a number > 0, got 0"),
    (lambda: copg(Z, Z, M, R, G, scale="raw"), "scale: expected 'policy_gradient' or 'squared'"),  # type: ignore[arg-type]
    (lambda: copg(Z, Z, Z, R, G), "mask: expected bool"),
    (lambda: copg(Z[:1], Z, M, R, G), r"log_prob: expected floating \[2, 3\] like mask, got torch.float32 \[1, 3\]"),
    (lambda: copg(Z.long(), Z, M, R, G), r"log_prob: expected floating \[2, 3\] like mask, got torch.int64"),
    (lambda: copg(Z, Z[:1], M, R, G), r"reference_log_prob: expected real \[2, 3\]"),
    (lambda: copg(Z, Z, M, torch.zeros(3), torch.zeros(3, dtype=torch.int64)), r"mask: expected bool \[3, T\]"),
    (lambda: copg(Z, Z, M, R * NAN, G), "rewards: every valid sample is NaN"),
    (lambda: copg(Z, Z, M, R, G.int()), "group: expected int64"),
    (lambda: real(Z, Z, M, C, G, tau=0.0), "tau: expected a number > 0, got 0"),
    (lambda: real(Z, Z[:1], M, C, G), r"old_log_prob: expected real \[2, 3\]"),
    (lambda: real(Z, Z, M, R, G), r"correct: expected bool \[2\], got torch.float32"),
    (lambda: real(Z, Z, M, C, G[:1]), r"group: expected int64 \[2\]"),
    (lambda: real(Z, Z, M, C, G.int()), "group: expected int64"),
    (lambda: real(Z, Z, M, C, G, R), "valid: expected bool"),
    (lambda: real_rows(C, G, Z), "mask: expected bool"),
    (lambda: contrasted_groups(G, R), r"counts: expected bool \[2\]"),
    (lambda: contrasted_groups(G.int(), C), r"group: expected int64 \[2\]"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
