"""The Flow-GRPO loss: a plain-loop reference, gradients in closed form, micro-batches, masked members."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from flowrl.objectives import LossTerms, flow_grpo_loss, merge_terms

SIZE = 24


def _case(seed: int = 0, masked: bool = True) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> torch.Tensor:
        return torch.randn(SIZE, generator=draw, dtype=torch.float64) * scale

    old = normal(3.0) - 100
    keep = torch.rand(SIZE, generator=draw) < (0.75 if masked else 2.0)
    difference, advantage = normal(0.4), normal(1.0)
    # Four stand beyond the bounds, one in each quadrant, and one between 1.2 and 1.35.
    difference[:5] = torch.tensor([1.0, 1.0, -1.0, -1.0, math.log(1.3)])
    advantage[:5] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    keep[:5] = True
    return {
        "log_prob": old + difference,
        "old_log_prob": old,
        "advantage": advantage,
        "clip_range": 0.2,
        "kl": normal(1.0).square(),
        "kl_weight": 0.04,
        "weight": torch.where(keep, 1 / keep.sum().double(), 0.0),
    }


def _rows(case: dict[str, Any], rows: torch.Tensor | slice) -> dict[str, Any]:
    return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def _gradients(case: dict[str, Any]) -> tuple[LossTerms, torch.Tensor, torch.Tensor]:
    log_prob, kl = case["log_prob"].clone().requires_grad_(), case["kl"].clone().requires_grad_()
    terms = flow_grpo_loss(**{**case, "log_prob": log_prob, "kl": kl})
    terms.loss.backward()
    return terms, log_prob.grad, kl.grad


def test_first_update_has_ratio_one_and_the_policy_gradient() -> None:
    case = _case()
    case["log_prob"] = case["old_log_prob"].clone()
    terms, slope, kl_slope = _gradients(case)
    assert torch.equal(slope, -case["weight"] * case["advantage"])
    assert torch.allclose(kl_slope, 0.04 * case["weight"], rtol=1e-12)
    assert terms.ratio_max_deviation == 0 and terms.clip_fraction == 0 and terms.approx_kl == 0
    assert terms.ratio_mean.item() == pytest.approx(1.0, abs=1e-6)
    assert terms.policy_loss.item() == pytest.approx(-(case["weight"] * case["advantage"]).sum().item(), abs=1e-12)


@pytest.mark.parametrize("high", [None, 0.35])
@pytest.mark.parametrize("seed", range(5))
def test_loss_and_statistics_against_a_plain_loop(seed: int, high: float | None) -> None:
    case = _case(seed)
    terms, slope, _ = _gradients({**case, "clip_high": high})
    upper = 1.2 if high is None else 1 + high
    policy = penalty = ratios = differences = 0.0
    low_hits = high_hits = count = 0
    worst = 0.0
    for i in range(SIZE):
        weight, advantage = case["weight"][i].item(), case["advantage"][i].item()
        if weight == 0:
            assert slope[i] == 0
            continue
        difference = case["log_prob"][i].item() - case["old_log_prob"][i].item()
        rho = math.exp(difference)
        stopped_low, stopped_high = advantage < 0 and rho < 0.8, advantage > 0 and rho > upper
        policy -= weight * min(advantage * rho, advantage * min(max(rho, 0.8), upper))
        penalty += weight * case["kl"][i].item()
        expected = 0.0 if stopped_low or stopped_high else -weight * advantage * rho
        assert slope[i].item() == pytest.approx(expected, abs=1e-9)
        count, ratios, differences = count + 1, ratios + rho, differences + difference
        low_hits, high_hits, worst = low_hits + stopped_low, high_hits + stopped_high, max(worst, abs(rho - 1))
    assert low_hits > 0 and high_hits > 0, "the case must reach both bounds"
    expected_terms = {
        "loss": policy + 0.04 * penalty,
        "policy_loss": policy,
        "kl": penalty,
        "count": count,
        "ratio_mean": ratios / count,
        "ratio_max_deviation": worst,
        "clip_fraction": (low_hits + high_hits) / count,
        "clip_fraction_low": low_hits / count,
        "clip_fraction_high": high_hits / count,
        "approx_kl": -differences / count,
    }
    assert {f.name for f in fields(terms)} == set(expected_terms)
    for name, value in expected_terms.items():
        assert vars(terms)[name].item() == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [5, 1, 18], [12, 12]])
def test_micro_batches_add_up_to_the_whole(sizes: list[int]) -> None:
    case = _case(3)
    whole, slope, kl_slope = _gradients(case)
    parts, slopes, kl_slopes, start = [], [], [], 0
    for size in sizes:
        part, part_slope, part_kl = _gradients(_rows(case, slice(start, start + size)))
        parts.append(part)
        slopes.append(part_slope)
        kl_slopes.append(part_kl)
        start += size
    assert torch.equal(torch.cat(slopes), slope) and torch.equal(torch.cat(kl_slopes), kl_slope)
    merged = merge_terms(parts)
    for field in fields(whole):
        expected = vars(whole)[field.name].item()
        assert vars(merged)[field.name].item() == pytest.approx(expected, abs=1e-6), field.name
        assert not vars(merged)[field.name].requires_grad


def test_shared_parameters_get_the_same_gradient_whatever_the_split() -> None:
    case = _case(4)
    direction = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradient(sizes: list[int]) -> torch.Tensor:
        parameter = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        for rows in torch.arange(SIZE).split(sizes):
            part = _rows(case, rows)
            part["log_prob"] = part["log_prob"] + direction[rows] @ parameter
            flow_grpo_loss(**part).loss.backward()
        assert parameter.grad is not None
        return parameter.grad

    assert torch.allclose(gradient([24]), gradient([7, 1, 9, 7]), rtol=1e-12)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_a_masked_member_reaches_neither_value_nor_gradient(junk: float) -> None:
    case = _case(5)
    clean, clean_slope, clean_kl = _gradients(case)
    masked = case["weight"] == 0
    assert masked.any()
    for name in ("log_prob", "old_log_prob", "advantage", "kl"):
        case[name] = torch.where(masked, junk, case[name])
    dirty, slope, kl_slope = _gradients(case)
    for field in fields(clean):
        assert torch.equal(vars(dirty)[field.name], vars(clean)[field.name]), field.name
    assert torch.equal(slope, clean_slope) and torch.equal(kl_slope, clean_kl)
    assert not slope[masked].any()


@pytest.mark.parametrize("name", ["log_prob", "old_log_prob", "advantage", "kl"])
def test_a_nan_with_weight_is_not_hidden(name: str) -> None:
    case = _case(6, masked=False)
    case[name][3] = math.nan
    assert flow_grpo_loss(**case).loss.isnan()


def test_without_any_weight_everything_is_zero() -> None:
    case = {**_case(7), "weight": torch.zeros(SIZE)}
    terms, slope, _ = _gradients(case)
    assert not slope.any() and all(vars(terms)[field.name] == 0 for field in fields(terms))
    full = flow_grpo_loss(**_case(8))
    merged = merge_terms([terms, full])
    assert merged.ratio_mean.item() == pytest.approx(full.ratio_mean.item(), rel=1e-6)


def test_the_penalty_can_be_absent_or_only_watched() -> None:
    case = _case(9)
    absent = flow_grpo_loss(**{**case, "kl": None})
    assert absent.kl == 0 and absent.loss == absent.policy_loss
    log_prob, kl = case["log_prob"].requires_grad_(), case["kl"].clone().requires_grad_()
    watched = flow_grpo_loss(**{**case, "log_prob": log_prob, "kl": kl, "kl_weight": 0.0})
    watched.loss.backward()
    assert watched.kl > 0 and watched.loss == absent.loss and kl.grad is None


def test_only_log_prob_and_kl_get_gradients() -> None:
    case: dict[str, Any] = {n: v.requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in _case(10).items()}
    terms = flow_grpo_loss(**case)
    terms.loss.backward()
    assert [case[name].grad is None for name in ("log_prob", "kl")] == [False, False]
    assert [case[name].grad is None for name in ("old_log_prob", "advantage", "weight")] == [True] * 3
    assert [f.name for f in fields(terms) if vars(terms)[f.name].requires_grad] == ["loss"]


def test_half_precision_is_computed_in_float32() -> None:
    case = _case(11, masked=False)
    half = {n: v.bfloat16() if isinstance(v, torch.Tensor) and n != "weight" else v for n, v in case.items()}
    half["weight"] = case["weight"].float()
    wide = {n: v.float() if isinstance(v, torch.Tensor) else v for n, v in half.items()}
    assert flow_grpo_loss(**half).loss.dtype == torch.float32
    assert flow_grpo_loss(**half).loss.item() == pytest.approx(flow_grpo_loss(**wide).loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["old_log_prob", "advantage", "kl", "weight"])
def test_a_shape_that_differs_is_named(name: str) -> None:
    case = _case(12)
    case[name] = case[name][:, None]
    with pytest.raises(ValueError, match=rf"{name}: expected \[24\] like log_prob, got \[24, 1\]"):
        flow_grpo_loss(**case)


def test_other_bad_input() -> None:
    case = _case(13)
    with pytest.raises(ValueError, match=r"log_prob: expected \[N\] with N >= 1"):
        flow_grpo_loss(**_rows(case, slice(0, 0)))
    with pytest.raises(ValueError, match=r"log_prob: expected \[N\]"):
        flow_grpo_loss(**{**case, "log_prob": case["log_prob"][:, None]})
    with pytest.raises(ValueError, match="low, high"):
        flow_grpo_loss(**{**case, "clip_range": -0.1})
    with pytest.raises(ValueError, match="parts: expected at least one"):
        merge_terms([])


def test_a_ratio_below_one_is_a_deviation_too() -> None:
    case = _case(15)
    case["log_prob"] = case["old_log_prob"] - 0.5
    assert flow_grpo_loss(**case).ratio_max_deviation.item() == pytest.approx(1 - math.exp(-0.5))


def test_merging_takes_the_greatest_deviation() -> None:
    terms = flow_grpo_loss(**_case(14))
    other = replace(terms, ratio_max_deviation=terms.ratio_max_deviation * 3)
    assert merge_terms([terms, other, terms]).ratio_max_deviation == other.ratio_max_deviation
