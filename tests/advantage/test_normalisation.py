"""Batch-fitted normalisations: worked numbers, plain loops, identities, two ranks, bad input."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from flowrl.advantage.estimators import dr_grpo, grpo
from flowrl.advantage.moments import Reduce
from flowrl.advantage.normalisation import (
    bnpo,
    copo,
    dgpo_difficulty,
    fit_beta,
    question_weight,
)

NAN = math.nan
Result = TypeVar("Result")


def over_ranks(calls: list[Callable[[Reduce], Result]]) -> list[Result]:
    """Run one call a rank in threads, each with the same sum over ranks."""
    barrier, parts = threading.Barrier(len(calls), timeout=5), [torch.zeros(0)] * len(calls)

    def run(rank: int) -> Result:
        def reduce(x: Tensor) -> Tensor:
            parts[rank] = x.clone()
            barrier.wait()
            summed = torch.stack(parts).sum(0)
            barrier.wait()
            return summed

        return calls[rank](reduce)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, range(len(calls))))


def close(tensor: Tensor, values: Any, tolerance: float = 1e-4) -> None:
    assert tensor.dtype == torch.float32 and not tensor.requires_grad
    assert tensor.tolist() == pytest.approx(values, abs=tolerance)


def case(seed: int, levels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged groups with spread-out ids, rewards in [0, 1], some NaN, some invalid, a singleton and a constant group."""
    draw = random.Random(seed)
    ids = [-3, 11, 7_000_000_000, 2, 5]
    group = [draw.choice(ids) for _ in range(draw.randint(12, 30))] + [99, 50, 50, 50]
    rewards = [draw.choice([draw.random(), draw.randrange(levels) / (levels - 1)]) for _ in group]
    rewards[-3:] = [0.1] * 3
    rewards = [NAN if draw.random() < 0.1 else r for r in rewards]
    valid = [draw.random() < 0.85 for _ in rewards]
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(group), torch.tensor(valid)


def members(rewards: Tensor, group: Tensor, valid: Tensor) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for i, (r, g, v) in enumerate(zip(rewards.tolist(), group.tolist(), valid.tolist(), strict=True)):
        if v and not math.isnan(r):
            found.setdefault(g, []).append(i)
    return found


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: list[float], ddof: int) -> float:
    return math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / max(len(values) - ddof, 1))


def binary(rates: list[float], size: int) -> tuple[Tensor, Tensor]:
    """Groups of 0/1 rewards with these success rates; the first row of each is a success."""
    rows = [[1.0] * round(p * size) + [0.0] * (size - round(p * size)) for p in rates]
    return torch.tensor(rows).flatten(), torch.arange(len(rates)).repeat_interleave(size)


# BNPO


def beta_parameters(rates: list[float]) -> tuple[float, float]:
    variance = deviation(rates, 1) ** 2 if len(rates) > 1 else 0.0
    if variance <= 1e-12:
        return 1.0, 1.0
    k = mean(rates) * (1 - mean(rates)) / variance - 1
    return max(1 + k * mean(rates) / 3, 1.0), max(1 + k * (1 - mean(rates)) / 3, 1.0)


def bnpo_loop(rewards: Tensor, group: Tensor, valid: Tensor, cap: float) -> list[float]:
    out = [0.0] * len(rewards)
    groups = members(rewards, group, valid)
    rates = {g: mean([float(rewards[i]) for i in rows]) for g, rows in groups.items()}
    a, b = beta_parameters(list(rates.values()))
    for g, rows in groups.items():
        if len({float(rewards[i]) for i in rows}) == 1:
            continue
        p = min(max(rates[g], 1e-6), 1 - 1e-6)
        norm = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
        density = p ** (a - 1) * (1 - p) ** (b - 1) / norm
        for i in rows:
            out[i] = (float(rewards[i]) - rates[g]) * min(1 / density, cap)
    return out


def test_bnpo_worked_numbers() -> None:
    alpha, beta = fit_beta(torch.tensor([0.25, 0.5, 0.75]))
    assert (alpha.item(), beta.item()) == pytest.approx((1.5, 1.5), abs=1e-12)
    alpha, beta = fit_beta(torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64))
    assert (alpha.item(), beta.item()) == pytest.approx((1.2, 1.46667), abs=1e-4)
    out = bnpo(*binary([0.25, 0.5, 0.75], 4))
    close(out.advantage[::4], [0.6802, 0.3927, 0.2267])
    assert out.live.all() and out.weight.tolist() == [1.0] * 12


@pytest.mark.parametrize("rates", [[0.3], [0.3] * 3, [0.1 + 0.2, 0.3], [0, 1], [0, 0], [NAN, 0.4], [NAN, NAN]])
def test_a_beta_fit_without_information_is_flat(rates: list[float]) -> None:
    alpha, beta = fit_beta(torch.tensor(rates, dtype=torch.float64))
    assert (alpha.item(), beta.item()) == (1.0, 1.0) and alpha.dtype == torch.float64


def test_a_narrow_spread_is_fitted() -> None:
    # Deviation 2e-6 is above the threshold: k = .25 / 4e-12 - 1.
    alpha, beta = fit_beta(torch.tensor([0.5 - 2e-6, 0.5, 0.5 + 2e-6], dtype=torch.float64))
    assert alpha.item() == pytest.approx(0.25 / 4e-12 / 6, rel=1e-3) == pytest.approx(beta.item(), rel=1e-3)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("cap", [1e6, 0.8])
def test_bnpo_against_a_plain_loop(seed: int, cap: float) -> None:
    rewards, group, valid = case(seed)
    out = bnpo(rewards, group, valid, cap=cap)
    close(out.advantage, bnpo_loop(rewards, group, valid, cap), 1e-5)
    assert torch.equal(out.loss_mask, valid & ~rewards.isnan())
    plain = dr_grpo(rewards, group, valid)
    assert torch.equal(out.live, plain.live)
    assert torch.allclose(out.group_mean, plain.group_mean, equal_nan=True)
    assert torch.allclose(out.group_std, plain.group_std, equal_nan=True)
    assert (out.advantage * plain.advantage >= 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_bnpo_averages_its_channels(seed: int) -> None:
    rewards, group, valid = case(seed)
    other = 1 - rewards.roll(1)
    both = torch.stack([rewards, other], dim=1)
    out = bnpo(both, group, valid)
    parts = [bnpo_loop(r, group, valid, 1e6) for r in (rewards, other)]
    close(out.advantage, [(a + b) / 2 for a, b in zip(*parts, strict=True)], 1e-5)
    known = valid[:, None] & ~both.isnan()
    assert torch.equal(out.loss_mask, known.any(1))
    assert torch.equal(out.live, bnpo(rewards, group, valid).live | bnpo(other, group, valid).live)
    average = torch.where(known, both, 0.0).mean(1)
    plain = dr_grpo(average, group, known.any(1))
    assert torch.allclose(out.group_mean, plain.group_mean, equal_nan=True)
    assert torch.allclose(out.group_std, plain.group_std, equal_nan=True)


def test_bnpo_of_one_group_is_dr_grpo() -> None:
    rewards = torch.tensor([0.1, 0.9, 0.4])
    assert torch.equal(
        bnpo(rewards, torch.zeros(3).long()).advantage, dr_grpo(rewards, torch.zeros(3).long()).advantage
    )


def test_bnpo_of_three_halves_is_grpo_times_pi_over_eight() -> None:
    rewards, group = binary([0.25, 0.5, 0.75], 4)
    expected = grpo(rewards, group, eps=0.0).advantage * (math.pi / 8)
    assert torch.allclose(bnpo(rewards, group).advantage, expected, atol=1e-6)


def test_bnpo_maps_rewards_to_their_range() -> None:
    rewards, group = binary([0.25, 0.5, 0.75], 4)
    moved = bnpo(rewards * 4 - 1, group, low=-1.0, high=3.0)
    assert torch.allclose(moved.advantage, bnpo(rewards, group).advantage)
    close(moved.group_mean[::4], [0.0, 1.0, 2.0])


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_a_channel_at_the_end_of_its_range_adds_nothing(constant: float) -> None:
    rewards, group = binary([0.25, 0.5, 0.75], 4)
    both = bnpo(torch.stack([rewards, torch.full_like(rewards, constant)], dim=1), group)
    assert torch.equal(both.advantage * 2, bnpo(rewards, group).advantage)


def test_bnpo_cap_holds_where_the_density_underflows() -> None:
    # Rates .5 -+ .01 and one of .99 sixty times over: the density at .99 is far below 1e-6.
    rewards = torch.tensor([0.49, 0.49] * 50 + [0.51, 0.51] * 50 + [0.985, 0.995]).double()
    group = torch.arange(len(rewards)) // 2
    close(bnpo(rewards, group).advantage[-2:] / 1e6, [-0.005, 0.005], 1e-6)
    close(bnpo(rewards, group, cap=10.0).advantage[-2:], [-0.05, 0.05], 1e-6)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_statistics_over_groups_are_those_of_all_ranks(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(3)
    rewards, outcome = torch.rand(18, *shape, generator=draw), torch.randint(0, 3, (18,), generator=draw)
    group = torch.arange(18) // 3
    rewards[6:9] = 0.5
    runs: list[Callable[[slice, Reduce | None], Any]] = [lambda s, r: bnpo(rewards[s], group[s], reduce=r)]
    if not shape:
        length = torch.rand(18, generator=draw)
        runs.append(lambda s, r: copo(rewards[s], group[s], outcome[s], reduce=r))
        runs.append(lambda s, r: dgpo_difficulty(rewards[s], group[s], None, None, length[s], reduce=r))
    for run in runs:
        whole = run(slice(0, 18), None)
        parts = over_ranks([lambda r, s=s, run=run: run(s, r) for s in (slice(0, 12), slice(12, 18))])  # type: ignore[misc]
        for name in ("advantage", "weight"):
            joined = torch.cat([vars(part)[name] for part in parts])
            assert torch.allclose(joined, vars(whole)[name], atol=1e-6)


# COPO


def entropy_groups(*counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    outcome = [o for group in counts for o, n in enumerate(group) for _ in range(n)]
    group = [g for g, n in enumerate(counts) for _ in range(sum(n))]
    return torch.linspace(0, 1, len(group)), torch.tensor(group), torch.tensor(outcome)


def test_copo_worked_weights() -> None:
    inputs = entropy_groups([1] * 6, [2, 1, 1, 1, 1], [3, 2, 1], [6])
    blend = copo(*inputs, rho=1.5, rho_unit="nats").channels["blend"][::6]
    close(blend[:2], [0.9971, 0.7710])
    assert blend[2].item() == pytest.approx(5.7e-5, rel=0.01) and blend[3].item() == pytest.approx(9.36e-14, rel=0.01)
    assert torch.allclose(copo(*inputs, rho=1.5 / math.log(6)).channels["blend"][::6], blend, rtol=1e-5)
    # 1.5 nats at 6 samples is the default to three digits.
    assert torch.allclose(copo(*inputs).channels["blend"][::6], blend, atol=2e-3)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("ddof", "unit"), [(0, "ln_size"), (1, "nats")])
def test_copo_against_a_plain_loop(seed: int, ddof: int, unit: Any) -> None:
    rewards, group, valid = case(seed)
    draw = random.Random(seed)
    outcome = [draw.choice([-5, 4_000_000_000, 7]) for _ in rewards]
    out = copo(rewards, group, torch.tensor(outcome), valid, gamma=3.0, rho=0.6, rho_unit=unit, ddof=ddof, eps=0.01)
    groups = members(rewards, group, valid)
    means = {g: mean([float(rewards[i]) for i in rows]) for g, rows in groups.items()}
    centre, spread = mean(list(means.values())), deviation(list(means.values()), ddof)
    expected, local = [0.0] * len(rewards), [0.0] * len(rewards)
    for g, rows in groups.items():
        found = [outcome[i] for i in rows]
        entropy = -math.fsum(found.count(o) / len(found) * math.log(found.count(o) / len(found)) for o in set(found))
        limit = 0.6 * math.log(len(rows)) if unit == "ln_size" else 0.6
        blend = 1 / (1 + math.exp(-3 * (entropy - limit))) if len(rows) > 1 else 0.0
        for i in rows:
            if len({float(rewards[j]) for j in rows}) > 1:
                local[i] = (float(rewards[i]) - means[g]) / (deviation([float(rewards[j]) for j in rows], ddof) + 0.01)
            expected[i] = blend * local[i] + (1 - blend) * (means[g] - centre) / (spread + 0.01)
    close(out.advantage, expected, 1e-5)
    close(out.channels["local"], local, 1e-5)
    parts = out.channels["blend"] * out.channels["local"] + (1 - out.channels["blend"]) * out.channels["global"]
    assert torch.allclose(parts, out.advantage, atol=1e-6)
    assert out.live[out.loss_mask].all() and not out.channels["blend"][~out.loss_mask].any()
    assert torch.equal(out.loss_mask, valid & ~rewards.isnan()) and not out.channels["global"][~out.loss_mask].any()


def test_copo_of_weight_one_is_grpo() -> None:
    rewards, group, valid = case(1)
    out = copo(rewards, group, torch.zeros_like(group), valid, rho=-100.0, rho_unit="nats")
    several = torch.tensor([len(members(rewards, group, valid).get(g, [])) > 1 for g in group.tolist()])
    assert several.sum() > 10
    assert torch.equal(out.advantage[several], grpo(rewards, group, valid).advantage[several])


def test_copo_of_one_group_has_no_global_part_and_outcome_names_do_not_matter() -> None:
    rewards, group, outcome = entropy_groups([2, 1, 3])
    out = copo(rewards, group, outcome)
    assert not out.channels["global"].any() and out.live.all()
    renamed = copo(rewards, group, torch.tensor([9, -2, 10**18])[outcome])
    assert torch.equal(renamed.advantage, out.advantage)


def test_copo_of_equal_constant_groups_is_dead() -> None:
    # The means of 3 and 7 times .1 differ by rounding, which must not become a signal.
    group = torch.tensor([0] * 3 + [1] * 7 + [2])
    for reward in (0.1, 1e6 + 0.1):
        out = copo(torch.full((11,), reward, dtype=torch.float64), group, group, eps=0.0)
        assert not out.advantage.any() and not out.live.any()
    out = copo(torch.tensor([0.0] * 3 + [1.0] * 8), group, group, eps=0.0)
    assert out.live.all() and out.advantage[0] < 0 < out.advantage[-1] == out.channels["global"][-1]


# DGPO


def test_dgpo_worked_numbers() -> None:
    group = torch.zeros(4).long()
    close(dgpo_difficulty(torch.tensor([1.0, 0, 0, 0]), group, eps=0.0).advantage, [2, -2 / 3, -2 / 3, -2 / 3])
    close(dgpo_difficulty(torch.tensor([1.0, 1, 0, 0]), group).advantage, [1, 1, -1, -1])
    close(dgpo_difficulty(torch.tensor([1.0, 0, 0, 0]), group).advantage[:1], [4 * 0.75 / 1.5001], 1e-6)
    rewards, group = binary([0.25, 0.75], 4)
    close(dgpo_difficulty(rewards, group).weight[::4], [1.1244, 0.8756])
    weight = question_weight(torch.tensor([0.25, 0.75, NAN]), torch.tensor([True, True, False]))
    assert weight.tolist() == pytest.approx([1.1244, 0.8756, 1.0], abs=1e-4)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("compensate", [True, False])
def test_dgpo_against_a_plain_loop(seed: int, compensate: bool) -> None:
    rewards, group, valid = case(seed)
    draw = random.Random(seed)
    main = [float(draw.random() < 0.3) for _ in rewards]
    length = [draw.randint(0, 9) for _ in rewards]
    inputs = (torch.tensor(main), torch.tensor(length))
    out = dgpo_difficulty(rewards, group, valid, *inputs, temperature=0.5, eps=0.02, compensate=compensate)
    groups = members(rewards, group, valid)
    live = {g: rows for g, rows in groups.items() if len({float(rewards[i]) for i in rows}) > 1}
    rate = {g: mean([main[i] for i in rows]) or 1.0 for g, rows in live.items()}
    norm = math.fsum(math.exp(-p / 0.5) for p in rate.values())
    used, kept = (sum(length[i] for rows in part.values() for i in rows) for part in (groups, live))
    factor = used / kept if compensate else 1.0
    advantage, weight = [0.0] * len(rewards), [0.0] * len(rewards)
    for g, rows in groups.items():
        centre = mean([float(rewards[i]) for i in rows])
        total = math.fsum(abs(float(rewards[i]) - centre) for i in rows)
        for i in rows:
            advantage[i] = len(rows) * (float(rewards[i]) - centre) / (total + 0.02) if g in live else 0.0
            weight[i] = factor * (len(live) * math.exp(-rate[g] / 0.5) / norm if g in live else 1.0)
    close(out.advantage, advantage, 1e-5)
    close(out.weight, weight, 1e-4)
    assert torch.equal(out.loss_mask, valid & ~rewards.isnan())


def test_dgpo_at_half_success_is_grpo() -> None:
    rewards, group = binary([0.5, 0.5], 6)
    assert torch.allclose(dgpo_difficulty(rewards, group, eps=0.0).advantage, grpo(rewards, group, eps=0.0).advantage)


@pytest.mark.parametrize("seed", range(4))
def test_dgpo_masses(seed: int) -> None:
    rewards, group, valid = case(seed)
    out, centred = dgpo_difficulty(rewards, group, valid, eps=0.0), dr_grpo(rewards, group, valid)
    live = [rows for rows in members(rewards, group, valid).values() if out.live[rows].all()]
    for rows in live:
        assert out.advantage[rows].abs().mean().item() == pytest.approx(1, abs=1e-6)
        ratio = out.advantage[rows] * centred.advantage[rows].abs().mean()
        assert torch.allclose(ratio, centred.advantage[rows], atol=1e-6)
    lone = dgpo_difficulty(rewards, group, valid, compensate=False).weight
    assert mean([lone[rows[0]].item() for rows in live]) == pytest.approx(1, abs=1e-6)
    used = out.loss_mask.sum() / (out.loss_mask & out.live).sum()
    assert torch.allclose(out.weight, lone * used) and used > 1
    flat = dgpo_difficulty(rewards, group, valid, temperature=1e12, compensate=False).weight
    assert torch.allclose(flat, out.loss_mask.float())


def test_dgpo_extremes_stay_finite() -> None:
    rewards, group = binary([0.25, 0.75], 4)
    assert dgpo_difficulty(rewards, group, temperature=1e-4).weight[::4].tolist() == [2.0, 0.0]
    dead = dgpo_difficulty(torch.full((3,), 0.1), torch.tensor([0, 0, 4]), None, None, torch.zeros(3))
    assert dead.weight.tolist() == [1.0] * 3 and not dead.advantage.any() and not dead.live.any()


R, G, B = torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), torch.tensor([True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bnpo(R * 2, G), "rewards: expected values in [0, 1], got 1 outside, for instance 2"),
        (lambda: bnpo(R - 0.5, G), "got 1 outside, for instance -0.5"),
        (lambda: bnpo(R, G, high=0.0), "high: expected a finite number > 0, got 0.0"),
        (lambda: bnpo(R, G, low=-math.inf), "low: expected a finite number, got -inf"),
        (lambda: bnpo(R, G, cap=0.0), "cap: expected a finite number > 0, got 0.0"),
        (lambda: bnpo(R[:, None, None], G), "rewards: expected [B]"),
        (lambda: fit_beta(torch.tensor([0.5, 1.5])), "rate: expected success rates in [0, 1], got [0.5, 1.5]"),
        (lambda: fit_beta(-R), "rate: expected success rates in [0, 1]"),
        (lambda: fit_beta(R.long()), "rate: expected floating [P] or [P, R], got torch.int64 [2]"),
        (lambda: fit_beta(R.sum()), "rate: expected floating [P] or [P, R], got torch.float32 []"),
        (lambda: copo(R, G, R), "outcome: expected int64 [2], got torch.float32 [2]"),
        (lambda: copo(R, G, G, gamma=-1.0), "gamma: expected a finite number >= 0, got -1.0"),
        (lambda: copo(R, G, G, rho=NAN), "rho: expected a finite number, got nan"),
        (lambda: copo(R, G, G, rho_unit="bits"), "rho_unit: expected 'ln_size' or 'nats', got 'bits'"),  # type: ignore[arg-type]
        (lambda: copo(R, G, G, ddof=2), "ddof: expected 0 or 1"),
        (lambda: copo(R, G, G, eps=-1.0), "eps: expected"),
        (lambda: dgpo_difficulty(R, G, eps=-1.0), "eps: expected"),
        (lambda: dgpo_difficulty(R, G, temperature=0.0), "temperature: expected a finite number > 0"),
        (lambda: dgpo_difficulty(R, G, None, R[:1]), "main_reward: expected real [2], got torch.float32 [1]"),
        (lambda: dgpo_difficulty(R, G, None, R + 1j), "main_reward: expected real [2], got torch.complex64"),
        (lambda: dgpo_difficulty(R, G, None, None, -R), "length: expected finite values and >= 0 where they count"),
        (lambda: dgpo_difficulty(R, G, None, R / 0), "main_reward: expected finite values where they count"),
        (lambda: question_weight(G, B), "rate: expected floating [P], got torch.int64 [2]"),
        (lambda: question_weight(R[None], B[None]), "rate: expected floating [P], got torch.float32 [1, 2]"),
        (lambda: question_weight(R, G), "live: expected bool [2]"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
