"""Ratios, the clipped surrogate, KL estimators and aggregation: tables by hand, plain loops, exact expectations."""

from __future__ import annotations

import math
import random

import pytest
import torch

from flowrl.advantage import (
    AGGREGATIONS,
    aggregate,
    clip_fraction,
    clipped,
    clipped_high,
    clipped_low,
    k1,
    k2,
    k3,
    log_ratio,
    ratio,
)


def test_ratio_is_exactly_one_on_policy() -> None:
    log_prob = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e4
    assert torch.equal(ratio(log_prob, log_prob.clone()), torch.ones(1000))


def test_ratio_values_clamp_and_gradient() -> None:
    new = torch.tensor([math.log(1.5), 30.0, -30.0, 0.0], requires_grad=True)
    old = torch.zeros(4, requires_grad=True)
    rho = ratio(new, old)
    assert rho.tolist() == pytest.approx([1.5, math.exp(20), math.exp(-20), 1.0], rel=1e-6)
    rho.sum().backward()
    assert new.grad is not None and new.grad.tolist() == pytest.approx([1.5, 0.0, 0.0, 1.0])
    assert old.grad is None
    assert log_ratio(torch.tensor([math.nan]), torch.zeros(1)).isnan().all()


def test_half_precision_log_probs_are_widened_before_the_difference() -> None:
    new, old = torch.tensor([2000.0]).half(), torch.tensor([1.0]).half() / 3
    assert log_ratio(new, old).dtype == torch.float32
    assert log_ratio(torch.tensor([10.0]).bfloat16(), old.bfloat16()).item() == 10.0 - old.bfloat16().float().item()


def test_log_ratio_refuses_to_broadcast() -> None:
    with pytest.raises(ValueError, match=r"old_log_prob: expected \[3\] like log_prob, got \[3, 1\]"):
        log_ratio(torch.zeros(3), torch.zeros(3, 1))


# rho, A, loss, d loss / d log rho, by hand for low 0.2 and high 0.28.
CLIP_TABLE = [
    (0.7, 1.0, -0.7, -0.7),
    (0.7, -1.0, 0.8, 0.0),
    (1.4, 1.0, -1.28, 0.0),
    (1.4, -1.0, 1.4, 1.4),
    (1.0, 2.0, -2.0, -2.0),
    (1.0, -2.0, 2.0, 2.0),
    (1.25, 2.0, -2.5, -2.5),
    (0.9, -2.0, 1.8, 1.8),
    (3.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("rho", "advantage", "loss", "slope"), CLIP_TABLE)
def test_clipped_value_and_gradient_table(rho: float, advantage: float, loss: float, slope: float) -> None:
    log_rho = torch.tensor([math.log(rho)], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([advantage], dtype=torch.float64, requires_grad=True)
    value = clipped(log_rho.exp(), scale, 0.2, 0.28)
    assert value.item() == pytest.approx(loss, abs=1e-12)
    value.sum().backward()
    assert log_rho.grad is not None and log_rho.grad.item() == pytest.approx(slope, abs=1e-12)
    assert scale.grad is None


def test_one_bound_serves_both_sides() -> None:
    rho, advantage = torch.tensor([1.25, 0.75]), torch.tensor([1.0, -1.0])
    assert torch.equal(clipped(rho, advantage, 0.2), clipped(rho, advantage, 0.2, 0.2))
    assert clipped(rho, advantage, 0.2).tolist() == pytest.approx([-1.2, 0.8])


@pytest.mark.parametrize("seed", range(5))
def test_clipped_against_a_plain_loop(seed: int) -> None:
    draw = random.Random(seed)
    rho = [[math.exp(draw.gauss(0, 0.5)) for _ in range(6)] for _ in range(5)]
    advantage = [draw.gauss(0, 1) for _ in range(5)]
    ours = clipped(torch.tensor(rho).double(), torch.tensor(advantage).double()[:, None], 0.1, 0.3)
    hits = 0
    for row, a, ours_row in zip(rho, advantage, ours.tolist(), strict=True):
        for r, value in zip(row, ours_row, strict=True):
            bounded = 0.9 if r < 0.9 else 1.3 if r > 1.3 else r
            assert value == pytest.approx(-min(a * r, a * bounded), abs=1e-6)
            hits += (a > 0 and r > 1.3) or (a < 0 and r < 0.9)
    fraction = clip_fraction(torch.tensor(rho), torch.tensor(advantage)[:, None], 0.1, 0.3)
    assert fraction.item() == pytest.approx(hits / 30) and hits > 0


def test_clipped_on_policy_is_the_policy_gradient() -> None:
    advantage = torch.randn(50, generator=torch.Generator().manual_seed(0))
    log_prob = torch.zeros(50, requires_grad=True)
    loss = clipped(ratio(log_prob, torch.zeros(50)), advantage, 1e-4)
    loss.sum().backward()
    assert torch.equal(loss, -advantage) and log_prob.grad is not None and torch.equal(log_prob.grad, -advantage)


def test_clip_fraction_counts_stopped_gradients_only() -> None:
    rho = torch.tensor([0.7, 0.7, 1.4, 1.4, 1.25, 1.0, 9.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0, 0.0])
    assert clipped_low(rho, advantage, 0.2).tolist() == [False, True, False, False, False, False, False]
    assert clipped_high(rho, advantage, 0.28).tolist() == [False, False, True, False, False, False, False]
    assert clip_fraction(rho, advantage, 0.2, 0.28).item() == pytest.approx(2 / 7)
    assert clip_fraction(rho, advantage, 0.2).item() == pytest.approx(3 / 7)


def test_clipped_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match=r"advantage: expected as many dimensions as ratio \[4, 2\], got \[4\]"):
        clipped(torch.ones(4, 2), torch.ones(4), 0.2)
    for low, high in ((-0.1, None), (0.2, -0.1), (math.nan, None)):
        with pytest.raises(ValueError, match="low, high: expected numbers >= 0"):
            clipped(torch.ones(2), torch.ones(2), low, high)


POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)


def test_k1_and_k3_average_to_the_exact_kl() -> None:
    exact = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)
    for estimator in (k1, k3):
        assert (POLICY * estimator(POLICY.log(), REFERENCE.log())).sum().item() == pytest.approx(exact, abs=1e-12)


def test_kl_values() -> None:
    x = torch.tensor([0.5, -0.5, 2.0]).double()
    zero = torch.zeros(3).double()
    assert k1(x, zero).tolist() == [0.5, -0.5, 2.0]
    assert k2(x, zero).tolist() == [0.125, 0.125, 2.0]
    assert k3(x, zero).tolist() == pytest.approx([0.10653, 0.14872, 1.13534], abs=1e-5)
    assert k3(torch.tensor([-15.0]), torch.zeros(1)).item() == 10.0
    assert k3(torch.tensor([-15.0]), torch.zeros(1), limit=1e9).item() == pytest.approx(math.exp(15) - 16)


def test_k3_is_never_negative_and_keeps_small_digits() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    value = k3(x, torch.zeros(10_000))
    assert (value >= 0).all()
    assert torch.allclose(value.double(), x.double() ** 2 / 2, rtol=2e-2, atol=1e-10)


def test_k2_gradient_is_the_exact_kl_gradient() -> None:
    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(dim=0)

    logits = POLICY.log().requires_grad_()
    (exact,) = torch.autograd.grad(
        (probabilities(logits).exp() * (probabilities(logits) - REFERENCE.log())).sum(), logits
    )
    for estimator, expected in ((k2, exact), (k1, torch.zeros(3).double())):
        sampled = (POLICY * estimator(probabilities(logits), REFERENCE.log())).sum()
        (gradient,) = torch.autograd.grad(sampled, logits)
        assert torch.allclose(gradient, expected, atol=1e-12)


def test_kl_estimators_vanish_on_policy() -> None:
    for estimator in (k1, k2, k3):
        assert not estimator(POLICY.log(), POLICY.log()).any()
        reference = REFERENCE.log().requires_grad_()
        estimator(POLICY.log().requires_grad_(), reference).sum().backward()
        assert reference.grad is None


RAGGED = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, math.nan], [math.nan] * 3])
RAGGED_MASK = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
RAGGED_VALUES = {
    "step_mean": 15 / 5,
    "step_mean_local": 15 / 5,
    "step_sum": 15.0,
    "seq_sum_mean": 15 / 3,
    "seq_sum_norm": 15 / 9,
    "seq_mean_mean": (2 + 4.5) / 2,
    "length_scaled": (2 * 3 + 4.5 * 2) / 3,
    "own_mean_sum": 2 + 4.5,
}


@pytest.mark.parametrize("mode", sorted(AGGREGATIONS))
def test_aggregate_worked_numbers(mode: str) -> None:
    loss = RAGGED.clone().requires_grad_()
    value = aggregate(loss, RAGGED_MASK, mode)
    assert value.item() == pytest.approx(RAGGED_VALUES[mode], rel=1e-6)
    value.backward()
    assert loss.grad is not None and not loss.grad[~RAGGED_MASK].any() and (loss.grad[RAGGED_MASK] > 0).all()


@pytest.mark.parametrize("mode", ["step_mean", "step_mean_local", "seq_mean_mean"])
def test_ones_average_to_one(mode: str) -> None:
    assert aggregate(torch.ones(3, 3), RAGGED_MASK, mode).item() == pytest.approx(1.0)


def test_aggregations_agree_on_equal_lengths() -> None:
    loss = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = {mode: aggregate(loss, torch.ones(6, 4, dtype=torch.bool), mode).item() for mode in AGGREGATIONS}
    expected = value["step_mean"]
    assert expected == pytest.approx(loss.mean().item(), abs=1e-12)
    factors = {"step_sum": 24, "seq_sum_mean": 4, "length_scaled": 4, "own_mean_sum": 6}
    for mode in AGGREGATIONS:
        assert value[mode] == pytest.approx(expected * factors.get(mode, 1), abs=1e-12)


@pytest.mark.parametrize(
    ("mode", "denominator"),
    [("step_mean", 5), ("seq_sum_mean", 3), ("seq_sum_norm", 12.0), ("seq_mean_mean", 2), ("length_scaled", 3)],
)
def test_parts_add_up_under_a_global_denominator(mode: str, denominator: float) -> None:
    whole = aggregate(RAGGED, RAGGED_MASK, mode, denominator)
    parts = [aggregate(RAGGED[i : i + 1], RAGGED_MASK[i : i + 1], mode, torch.tensor(denominator)) for i in range(3)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)  # type: ignore[union-attr]
    if mode != "seq_sum_norm":
        assert whole.item() == pytest.approx(RAGGED_VALUES[mode], rel=1e-6)


def test_nothing_valid_is_zero_and_half_is_widened() -> None:
    for mode in AGGREGATIONS:
        assert aggregate(RAGGED, torch.zeros(3, 3, dtype=torch.bool), mode).item() == 0.0
        assert aggregate(torch.ones(2, 2).half(), torch.ones(2, 2, dtype=torch.bool), mode).dtype == torch.float32


def test_aggregate_refuses_bad_input() -> None:
    ones, mask = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    cases = [
        ((torch.ones(2), mask, "step_sum"), r"loss: expected floating \[B, T\]"),
        ((ones.long(), mask, "step_sum"), r"loss: expected floating \[B, T\]"),
        ((ones, mask[:1], "step_sum"), r"mask: expected bool \[2, 2\] like loss"),
        ((ones, ones, "step_sum"), r"mask: expected bool \[2, 2\] like loss"),
        ((ones, mask, "mean"), "mode: unknown aggregation 'mean'; expected one of step_mean"),
        ((ones, mask, "step_sum", 3.0), "denominator: step_sum takes none"),
        ((ones, mask, "step_mean", 0), "denominator: expected a number > 0, got 0"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            aggregate(*arguments)  # type: ignore[arg-type]
