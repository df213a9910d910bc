"""The virtual tempered target: plain loop, special cases, exact Gaussian ratio, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.estimators import dr_grpo, grpo, rloo
from flowrl.advantage.tempered import (
    METHODS,
    dcpo_distribution,
    dcpo_temperature,
    gaussian_tempered_log_ratio,
    tempered_target,
)

PAIR = torch.tensor([0, 0])


def _batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, steps = 8, 5
    mask = torch.arange(steps) < torch.randint(0, steps + 1, (rows, 1), generator=generator)
    mask[0] = mask[3] = True
    rewards = torch.randn(rows, generator=generator)
    rewards[3] = math.nan
    old = -torch.rand(rows, steps, generator=generator)
    inputs = {
        "rewards": rewards,
        "group": torch.tensor([2**40, -3])[torch.randint(0, 2, (rows,), generator=generator)],
        "correct": torch.rand(rows, generator=generator) < 0.5,
        "old_log_prob": old,
        "tempered_log_prob": old + torch.randn(rows, steps, generator=generator),
        "entropy": torch.rand(rows, steps, generator=generator),
    }
    held = {k: torch.where(mask, v, math.nan) if v.shape == mask.shape else v for k, v in inputs.items()}
    held["correct"][0] = held["correct"][3] = True
    return held | {"mask": mask}


def _loop(batch: dict[str, Tensor], start: list[float], target: float, max_gap: float) -> list[list[float]]:
    mask = batch["mask"].tolist()
    rows = [b for b in range(len(mask)) if not math.isnan(start[b])]
    steps = [(b, t) for b in rows for t in range(len(mask[b])) if mask[b][t]]
    entropy = sum(float(batch["entropy"][b, t]) for b, t in steps) / len(steps)
    present = [b for b in rows if any(mask[b])]
    rate = sum(bool(batch["correct"][b]) for b in present) / len(present)
    a = min(abs(target - entropy), max_gap) / rate if rate else 0.0
    pull = a / (1 + a)
    out = [[0.0] * len(mask[0]) for _ in mask]
    for b, t in steps:
        rho = math.exp(float(batch["tempered_log_prob"][b, t]) - float(batch["old_log_prob"][b, t]))
        out[b][t] = (1 - pull) * start[b] + pull * bool(batch["correct"][b]) * rho
    return out


def _close(result: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == pytest.approx(torch.tensor(expected).flatten().tolist(), abs=tolerance)


@pytest.mark.parametrize(("base", "outcome"), [("grpo", grpo), ("dr_grpo", dr_grpo), ("rloo", rloo)])
@pytest.mark.parametrize(("target", "max_gap"), [(0.5, 0.1), (2.0, 0.1), (0.0, 9.0)])
@pytest.mark.parametrize("seed", range(4))
def test_dcpo_against_a_plain_loop(
    seed: int, target: float, max_gap: float, base: Any, outcome: Callable[..., Any]
) -> None:
    batch = _batch(seed)
    plain = outcome(batch["rewards"], batch["group"])
    start = torch.where(plain.loss_mask, plain.advantage, math.nan).tolist()
    out = dcpo_distribution(**batch, base=base, target_entropy=target, max_gap=max_gap)
    _close(out.advantage, _loop(batch, start, target, max_gap))
    kept = batch["mask"] & plain.loss_mask[:, None]
    assert torch.equal(out.loss_mask, kept) and torch.equal(out.weight, kept.float())
    assert torch.equal(out.live, plain.live)
    assert out.group_mean is not None and torch.equal(out.group_mean, plain.group_mean)
    assert out.group_std is not None and torch.equal(out.group_std, plain.group_std)
    ratios = torch.exp(batch["tempered_log_prob"] - batch["old_log_prob"])
    assert torch.allclose(out.channels["tempered_ratio"], torch.where(kept, ratios, 0.0))
    direct = tempered_target(plain.advantage, *list(batch.values())[2:6], kept, target_entropy=target, max_gap=max_gap)
    assert torch.equal(direct.advantage, out.advantage)
    assert torch.equal(direct.live, kept.any(1))


def test_dcpo_default_target_and_gap() -> None:
    """Entropy 0.3 with target 0.5: the gap is cut to 0.1; half are correct, so a = 0.2 and c = 1/6."""
    mask = torch.ones(2, 1, dtype=torch.bool)
    old, entropy = torch.zeros(2, 1), torch.full((2, 1), 0.3)
    correct = torch.tensor([True, False])
    out = tempered_target(torch.tensor([1.0, -1.0]), correct, old, old + math.log(2), entropy, mask)
    _close(out.advantage, [5 / 6 + 2 / 6, -5 / 6], 1e-6)
    near = tempered_target(torch.tensor([1.0, -1.0]), correct, old, old + math.log(2), entropy + 0.15, mask)
    _close(near.advantage, [1 / 1.1 + 0.2 / 1.1, -1 / 1.1], 1e-6)
    group = torch.tensor([0, 0])
    both = dcpo_distribution(torch.tensor([1.0, 0.0]), group, correct, old, old + math.log(2), entropy, mask)
    _close(both.advantage, [5 / 6 * 0.9998 + 2 / 6, -5 / 6 * 0.9998], 1e-5)


def test_dcpo_special_cases() -> None:
    batch = _batch(1)
    plain = grpo(batch["rewards"], batch["group"]).over_steps(batch["mask"])
    level = batch | {"entropy": torch.full(batch["mask"].shape, 0.5)}
    assert torch.allclose(dcpo_distribution(**level).advantage, plain.advantage, atol=1e-6)
    assert torch.allclose(dcpo_distribution(**batch, max_gap=0.0).advantage, plain.advantage, atol=1e-6)
    nobody = batch | {"correct": torch.zeros(8, dtype=torch.bool)}
    assert torch.allclose(dcpo_distribution(**nobody).advantage, plain.advantage, atol=1e-6)
    both = nobody | {"entropy": torch.full(batch["mask"].shape, 0.5)}
    assert torch.allclose(dcpo_distribution(**both).advantage, plain.advantage, atol=1e-6)
    untempered = dcpo_distribution(**(batch | {"tempered_log_prob": batch["old_log_prob"]}))
    assert torch.equal(untempered.channels["tempered_ratio"], plain.loss_mask.float())


def test_dcpo_sums_over_ranks() -> None:
    batch = _batch(2)
    full = dcpo_distribution(**batch, target_entropy=0.45)
    assert torch.equal(
        full.advantage, dcpo_distribution(**batch, target_entropy=0.45, reduce=lambda x: 2 * x).advantage
    )
    others = dcpo_distribution(
        **batch, target_entropy=0.45, reduce=lambda x: x + torch.tensor([0.0, 8.0]).double() if x.ndim else x
    )
    assert not torch.allclose(full.advantage, others.advantage, atol=1e-3)
    out = dcpo_distribution(**batch, valid=torch.arange(8) != 0)
    assert not out.loss_mask[0].any()


def test_dcpo_temperature() -> None:
    mask = torch.tensor([[True, True, False]])
    entropy = torch.tensor([[0.25, 0.75, 9.0]])
    assert float(dcpo_temperature(entropy, mask)) == pytest.approx(1.2)
    assert float(dcpo_temperature(entropy, mask, target_entropy=0.49)) == pytest.approx(0.8)
    assert float(dcpo_temperature(entropy, mask, hot=1.5)) == pytest.approx(1.5)
    assert float(dcpo_temperature(entropy + 1, mask, cold=0.6)) == pytest.approx(0.6)
    more = dcpo_temperature(entropy, mask, reduce=lambda x: x + torch.tensor([2.0, 1.0]).double() if x.ndim else x)
    assert float(more) == pytest.approx(0.8)


@pytest.mark.parametrize("tau", [0.8, 1.0, 1.2])
def test_gaussian_tempered_log_ratio_is_that_of_the_densities(tau: float) -> None:
    noise = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    sigma = 0.3
    here = torch.distributions.Normal(0.0, sigma).log_prob(noise * sigma)
    hot = torch.distributions.Normal(0.0, sigma * math.sqrt(tau)).log_prob(noise * sigma)
    log_rho = gaussian_tempered_log_ratio(noise.square(), tau)
    assert log_rho.dtype == torch.float32
    assert torch.allclose(log_rho.double(), hot - here, atol=1e-4)
    density = torch.exp(-0.5 * noise.square()) / math.sqrt(2 * math.pi)
    assert float(torch.trapezoid(density * log_rho.double().exp(), noise)) == pytest.approx(1, abs=1e-4)
    joint = gaussian_tempered_log_ratio(noise.view(-1, 1).square(), torch.tensor(tau), dims=3)
    assert torch.allclose(joint[:, 0], 3 * log_rho, rtol=1e-4, atol=1e-4)


def test_results_are_float32_without_a_gradient() -> None:
    batch = _batch(0)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    half["tempered_log_prob"].requires_grad_()
    out = dcpo_distribution(**half)
    assert out.advantage.dtype == torch.float32 and not out.advantage.requires_grad


ROW, MASK, ONE = torch.tensor([1.0, 0.0]), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3)
YES = torch.tensor([True, False])
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: dcpo_distribution(ROW, PAIR, PAIR, ONE, ONE, ONE, MASK), "correct: expected bool"),
    (lambda: dcpo_distribution(ROW, PAIR, YES, ONE[:1], ONE, ONE, MASK), "old_log_prob"),
    (lambda: dcpo_distribution(ROW, PAIR, YES, ONE, ONE[:1], ONE, MASK), "tempered_log_prob"),
    (lambda: dcpo_distribution(ROW, PAIR, YES, ONE, ONE, ONE[:1], MASK), "entropy"),
    (lambda: dcpo_distribution(ROW, PAIR, YES, ONE, ONE, ONE, MASK[:1]), "mask"),
    (lambda: dcpo_distribution(ROW, PAIR, YES, ONE, ONE, ONE, MASK, base="x"), "base"),  # type: ignore[arg-type]
    (lambda: dcpo_distribution(ROW, PAIR, YES, ONE, ONE, ONE, MASK, max_gap=-0.1), "max_gap"),
    (lambda: dcpo_distribution(ROW, PAIR, YES, ONE, ONE, ONE, MASK, max_gap=math.inf), "max_gap"),
    (lambda: dcpo_distribution(ROW, PAIR, YES, ONE, ONE, ONE, MASK, target_entropy=math.nan), "target_entropy"),
    (lambda: dcpo_temperature(ONE, MASK.int()), "mask"),
    (lambda: dcpo_temperature(ONE[:1], MASK), "entropy"),
    (lambda: gaussian_tempered_log_ratio(ONE, 0.0), "temperature"),
    (lambda: gaussian_tempered_log_ratio(ONE, math.inf), "temperature"),
    (lambda: gaussian_tempered_log_ratio(ONE, 1.2, dims=0), "dims"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_entries() -> None:
    assert [(m.key, m.kind, m.tier) for m in METHODS] == [("dcpo_distribution", "estimator", 2)]
    for test in METHODS[0].evidence.values():
        assert test.split("::")[1] in globals()
