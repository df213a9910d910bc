"""LaRe, CALM, implicit step rewards and potential shaping: worked numbers, plain loops, identities, bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.redistribution import (
    METHODS,
    calm,
    draw_steps,
    implicit_step_reward,
    lare,
    lare_loss,
    potential_shaping,
)
from flowrl.advantage.returns import gae

from .paths import NAN, case, close, flags, row

OUTCOME, PROXY, ALL = torch.tensor([1.5]), row(0.2, 0.4, 0.6), flags(1, 1, 1)


@pytest.mark.parametrize(("correction", "wanted"), [("shift", (0.3, 0.5, 0.7)), ("scale", (0.25, 0.5, 0.75))])
def test_lare_worked_numbers(correction: Any, wanted: tuple[float, ...]) -> None:
    close(lare(PROXY, OUTCOME, ALL, correction=correction), row(*wanted))


def test_lare_on_short_rows_and_small_sums() -> None:
    close(lare(row(0.2, 9), torch.tensor([1.0]), flags(1, 0)), row(1, 0))
    close(lare(row(0.001, 0.003), torch.tensor([1.0]), flags(1, 1), correction="scale"), row(0.25, 0.75))


def outcomes(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Model rewards with junk on masked steps, outcomes with one missing, a mask with holes and an empty row."""
    _, proxy, _, mask = case(seed, 15)
    rewards = torch.randn(9, generator=torch.Generator().manual_seed(seed))
    rewards[5] = NAN
    return proxy, rewards, mask


@pytest.mark.parametrize("correction", ["shift", "scale"])
@pytest.mark.parametrize("eps", [1e-8, 2.0])
def test_lare_against_a_plain_loop(correction: Any, eps: float) -> None:
    proxy, rewards, mask = outcomes(41)
    wanted = torch.zeros(9, 15, dtype=torch.float64)
    scaled = 0
    for b in range(9):
        at = [t for t in range(15) if mask[b, t]]
        total = math.fsum(float(proxy[b, t]) for t in at)
        for t in at:
            if correction == "scale" and abs(total) > eps:
                wanted[b, t] = float(proxy[b, t]) * float(rewards[b]) / total
                scaled += 1
            else:
                wanted[b, t] = float(proxy[b, t]) + (float(rewards[b]) - total) / len(at)
    assert correction == "shift" or 0 < scaled < int(mask.sum()) or eps < 1
    out = lare(proxy, rewards, mask, correction=correction, eps=eps)
    assert out.dtype == torch.float32 and torch.equal(out.isnan(), mask & rewards.isnan()[:, None])
    close(out.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0), 1e-5)


@pytest.mark.parametrize("correction", ["shift", "scale"])
def test_lare_keeps_the_outcome(correction: Any) -> None:
    proxy, rewards, mask = outcomes(42)
    known = ~rewards.isnan() & mask.any(1)
    out = lare(proxy, rewards, mask, correction=correction)
    close(out.sum(1)[known], rewards[known], 1e-4)
    cancelling = lare(row(0.5, -0.5), torch.tensor([1.0]), flags(1, 1), correction=correction, eps=0.0)
    close(cancelling, row(1.0, 0.0))
    credit = gae(out, torch.zeros(9, 15), mask)
    assert not credit.live[5] and not credit.loss_mask[5].any()  # the missing outcome stays missing


def pairs() -> list[Tensor]:
    return [torch.tensor([[i in pair for i in range(3)]]) for pair in itertools.combinations(range(3), 2)]


def test_lare_loss_worked_numbers() -> None:
    assert float(lare_loss(PROXY, OUTCOME, ALL)) == pytest.approx(0.01)
    biased = [float(lare_loss(PROXY, OUTCOME, ALL, drawn, form="rrd")) for drawn in pairs()]
    exact = [float(lare_loss(PROXY, OUTCOME, ALL, drawn, form="rrd_unbiased")) for drawn in pairs()]
    assert biased == pytest.approx([0.04, 0.01, 0.0], abs=1e-6)
    assert sum(biased) / 3 == pytest.approx(0.016667, abs=1e-6)
    assert (sum(biased) - sum(exact)) / 3 == pytest.approx(0.006667, abs=1e-6)
    assert sum(exact) / 3 == pytest.approx(0.01, abs=1e-6)


def test_unbiased_loss_averages_to_the_full_loss() -> None:
    proxy = torch.tensor([[0.3, -1.0, 9.0, 2.0, 0.7, 0.1]], dtype=torch.float64)
    mask = flags(1, 1, 0, 1, 1, 1)
    full = float(lare_loss(proxy, OUTCOME, mask))
    for size in (2, 3, 4, 5):
        draws = [
            torch.tensor([[i in chosen for i in range(6)]]) for chosen in itertools.combinations([0, 1, 3, 4, 5], size)
        ]
        losses = [float(lare_loss(proxy, OUTCOME, mask, drawn, form="rrd_unbiased")) for drawn in draws]
        assert math.fsum(losses) / len(losses) == pytest.approx(full, abs=1e-12)


def test_uniform_rewards_have_no_loss() -> None:
    for form in ("full", "rrd", "rrd_unbiased"):
        flat = lare_loss(row(0.5, 0.5, 0.5), OUTCOME, ALL, flags(1, 0, 1), form=form)
        assert float(flat) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("form", ["full", "rrd", "rrd_unbiased"])
def test_lare_loss_against_a_plain_loop(form: Any) -> None:
    proxy, rewards, mask = outcomes(43)
    mask[7] = False
    mask[7, 4] = True
    sampled = draw_steps(mask, torch.rand(9, 15, generator=torch.Generator().manual_seed(1)), number=3)
    leaf = proxy.clone().requires_grad_()
    out = lare_loss(leaf, rewards, mask, None if form == "full" else sampled, form=form)
    slope = torch.zeros(9, 15, dtype=torch.float64)
    for b in range(9):
        at = [t for t in range(15) if (mask if form == "full" else sampled)[b, t]]
        steps = int(mask[b].sum())
        want = 0.0
        if at and not math.isnan(rewards[b]):
            mean = math.fsum(float(proxy[b, t]) for t in at) / len(at)
            want = (mean - float(rewards[b]) / steps) ** 2
            slope[b, at] = 2 * (mean - float(rewards[b]) / steps) / len(at)
            if form == "rrd_unbiased" and len(at) > 1:
                share = (1 - len(at) / steps) / len(at) / (len(at) - 1)
                want -= share * math.fsum((float(proxy[b, t]) - mean) ** 2 for t in at)
                for t in at:
                    slope[b, t] -= 2 * share * (float(proxy[b, t]) - mean)
        assert float(out[b].detach()) == pytest.approx(want, abs=1e-6)
    out.sum().backward()
    assert out.dtype == torch.float32 and leaf.grad is not None
    close(leaf.grad, slope)


def test_lare_loss_widens_half_precision() -> None:
    out = lare_loss(PROXY.bfloat16(), OUTCOME, ALL)
    assert out.dtype == torch.float32 and lare_loss(PROXY.double(), OUTCOME, ALL).dtype == torch.float64


@pytest.mark.parametrize("number", [1, 3, 99])
def test_draw_steps_takes_the_least_draws(number: int) -> None:
    mask = case(44, 15)[3]
    uniform = torch.rand(9, 15)
    out = draw_steps(mask, uniform, number=number)
    for b in range(9):
        order = sorted((float(uniform[b, t]), t) for t in range(15) if mask[b, t])
        assert [t for t in range(15) if out[b, t]] == sorted(t for _, t in order[:number])


def test_calm_adds_a_bonus_where_subgoals_end() -> None:
    reward, ends, mask = row(0.1, NAN, 0, 1), flags(1, 1, 0, 0), flags(1, 1, 0, 1)
    close(calm(reward, ends, mask), row(1.1, 1, 0, 1))
    close(calm(reward, ends, mask, bonus=-0.25), row(-0.15, -0.25, 0, 1))


def test_implicit_step_reward_against_a_plain_loop() -> None:
    _, log_prob, reference, mask = case(45, 15)
    wanted = torch.zeros(9, 15, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        wanted[b, t] = 0.3 * (float(log_prob[b, t]) - float(reference[b, t]))
    out = implicit_step_reward(log_prob.requires_grad_(), reference, mask, beta=0.3)
    close(out, wanted)
    close(implicit_step_reward(log_prob, reference, mask), wanted / 3)
    assert not out.requires_grad


def test_implicit_rewards_telescope() -> None:
    """A policy that is optimal for r under V: the sum over a row is r - V(s_0), and beta times its log-ratio."""
    reward, value, _, mask = case(46, 15)
    reward = torch.where(mask, reward.nan_to_num(nan=0.0), 0.0)
    shaped = potential_shaping(reward, value, mask)
    reference = torch.randn(9, 15)
    out = implicit_step_reward(reference + shaped / 0.5, reference, mask, beta=0.5)
    first = torch.tensor([float(value[b, mask[b].nonzero()[0, 0]]) if mask[b].any() else 0.0 for b in range(9)])
    close(out.sum(1), reward.sum(1) - first, 1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_potential_shaping_against_a_plain_loop(gamma: float) -> None:
    reward, value, _, mask = case(47, 15)
    wanted = torch.zeros(9, 15, dtype=torch.float64)
    for b in range(9):
        ahead = 0.0
        for t in reversed(range(15)):
            if mask[b, t]:
                now = 0.0 if math.isnan(reward[b, t]) else float(reward[b, t])
                wanted[b, t] = now + gamma * ahead - float(value[b, t])
                ahead = float(value[b, t])
    close(potential_shaping(reward, value, mask, gamma=gamma), wanted)
    alive = torch.arange(9) != 3  # a row of NaN has no value for gae, and counts as 0 here
    close(
        potential_shaping(reward, value, mask, gamma=gamma)[alive],
        gae(reward, value, mask, gamma=gamma, lam=0).advantage[alive],
    )


def test_shaping_changes_a_sum_by_the_first_value() -> None:
    reward, value, _, mask = case(48, 15)
    out = potential_shaping(reward, value, mask).sum(1)
    for b in range(9):
        at = [t for t in range(15) if mask[b, t]]
        total = math.fsum(0.0 if math.isnan(reward[b, t]) else float(reward[b, t]) for t in at)
        assert float(out[b]) == pytest.approx(total - (float(value[b, at[0]]) if at else 0.0), abs=1e-5)


LARE = {"proxy_reward": PROXY, "rewards": OUTCOME, "mask": ALL}
RRD = {**LARE, "sampled": flags(1, 1, 0), "form": "rrd_unbiased"}
GOAL = {"step_reward": torch.zeros(1, 3), "subgoal_end": flags(0, 1, 0), "mask": flags(1, 1, 0)}
IMPLIED = {"log_prob": PROXY, "reference_log_prob": PROXY, "mask": ALL}
SHAPE = {"step_reward": PROXY, "value": PROXY, "mask": ALL}
DRAW = {"mask": ALL, "uniform": PROXY, "number": 1}


@pytest.mark.parametrize(
    ("call", "inputs", "change", "message"),
    [
        (lare, LARE, {"correction": "none"}, "correction: expected"),
        (lare, LARE, {"eps": -1.0}, "eps: expected"),
        (lare, LARE, {"eps": math.inf}, "eps: expected"),
        (lare, LARE, {"proxy_reward": row(1)}, "proxy_reward: expected"),
        (lare, LARE, {"proxy_reward": row(1, NAN, 2)}, "proxy_reward: 1"),
        (lare, LARE, {"rewards": torch.tensor([NAN])}, "rewards: every"),
        (lare, LARE, {"rewards": torch.tensor(1.0)}, "rewards: expected"),
        (lare, LARE, {"mask": torch.ones(2, 3, dtype=torch.bool)}, "mask: expected bool"),
        (lare_loss, LARE, {"form": "half"}, "form: expected"),
        (lare_loss, LARE, {"proxy_reward": row(1, NAN, 2)}, "proxy_reward: 1"),
        (lare_loss, LARE, {"form": "rrd"}, "sampled: form 'rrd' needs"),
        (lare_loss, RRD, {"sampled": torch.ones(1, 3)}, "sampled: expected bool"),
        (lare_loss, RRD, {"mask": flags(1, 0, 1)}, "sampled: expected unmasked"),
        (lare_loss, RRD, {"sampled": flags(0, 1, 0)}, "sampled: expected at least 2 steps, or all of them, in row 0"),
        (lare_loss, RRD, {"sampled": flags(0, 0, 0), "form": "rrd"}, "sampled: expected at least 1"),
        (draw_steps, DRAW, {"number": 0}, "number: expected"),
        (draw_steps, DRAW, {"uniform": row(1)}, "uniform: expected"),
        (draw_steps, DRAW, {"mask": torch.ones(1, 3)}, "mask: expected bool"),
        (calm, GOAL, {"bonus": math.inf}, "bonus: expected"),
        (
            calm,
            GOAL,
            {"subgoal_end": flags(0, 1, 1)},
            r"subgoal_end: a subgoal ends on a masked step \(row 0, step 2\)",
        ),
        (calm, GOAL, {"subgoal_end": torch.zeros(1, 3)}, "subgoal_end: expected bool"),
        (calm, GOAL, {"mask": torch.ones(1, 3)}, "mask: expected bool"),
        (implicit_step_reward, IMPLIED, {"beta": 0.0}, "beta: expected"),
        (implicit_step_reward, IMPLIED, {"beta": math.inf}, "beta: expected"),
        (implicit_step_reward, IMPLIED, {"log_prob": row(1)}, "log_prob: expected"),
        (implicit_step_reward, IMPLIED, {"reference_log_prob": row(1)}, "reference_log_prob: expected"),
        (implicit_step_reward, IMPLIED, {"mask": torch.ones(1, 3)}, "mask: expected bool"),
        (potential_shaping, SHAPE, {"gamma": 2.0}, "gamma: expected"),
        (potential_shaping, SHAPE, {"value": row(1)}, "value: expected"),
        (potential_shaping, SHAPE, {"mask": torch.ones(1, 3)}, "mask: expected bool"),
    ],
)
def test_bad_input_names_the_argument(
    call: Callable[..., Tensor], inputs: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    call(**inputs)
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**{**inputs, **change})


def test_one_sampled_step_is_enough_for_the_biased_form() -> None:
    assert float(lare_loss(PROXY, OUTCOME, ALL, flags(0, 1, 0), form="rrd")) == pytest.approx(0.01, abs=1e-6)


def test_entries() -> None:
    assert [(m.kind, m.key) for m in METHODS] == [
        ("reward", "lare"),
        ("objective", "lare"),
        ("reward", "calm"),
        ("reward", "implicit_q"),
        ("reward", "potential_shaping"),
    ]
    assert [m.call for m in METHODS] == [lare, lare_loss, calm, implicit_step_reward, potential_shaping]
