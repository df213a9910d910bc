"""GAE, Open-Reasoner-Zero, T-PPO, PDPPO, REINFORCE++: worked numbers, plain loops, identities, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowrl.advantage import Advantage, lite_ppo
from flowrl.advantage.returns import (
    METHODS,
    gae,
    open_reasoner_zero,
    pdppo,
    reinforce_pp,
    reinforce_pp_baseline,
    t_ppo,
)
from flowrl.advantage.scans import last_step, next_step

from .paths import NAN, case, close, flags, kept_of, loop_gae, row, same, whitened


@pytest.mark.parametrize(
    ("value", "gamma", "lam", "wanted"),
    [
        ((0.5, 0.6, 0.8), 1, 1, (0.5, 0.4, 0.2)),
        ((0.5, 0.6, 0.8), 1, 0.95, (0.4705, 0.39, 0.2)),
        ((0.5, 0.6, 0.8), 1, 0, (0.1, 0.2, 0.2)),
        ((0.0, 0.0, 0.0), 0.9, 1, (0.81, 0.9, 1)),
    ],
)
def test_gae_worked_numbers(value: tuple[float, ...], gamma: float, lam: float, wanted: tuple[float, ...]) -> None:
    out = gae(row(0, 0, 1), row(*value), flags(1, 1, 1), gamma=gamma, lam=lam)
    close(out.advantage, row(*wanted))
    close(out.returns, row(*wanted) + row(*value))


@pytest.mark.parametrize(("lam", "first"), [(1.0, 0.5), (0.95, 0.4705)])
def test_gae_passes_over_masked_steps(lam: float, first: float) -> None:
    out = gae(row(0, 0, 0, 1), row(0.5, 9, 0.6, 0.8), flags(1, 0, 1, 1), lam=lam)
    close(out.advantage, row(first, 0, 0.4 if lam == 1 else 0.39, 0.2))
    assert out.returns is not None and out.returns[0, 1] == 0


@pytest.mark.parametrize("steps", [7, 65, 129])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.5), (1.0, 0.0)])
def test_gae_against_a_plain_loop(steps: int, gamma: float, lam: float) -> None:
    reward, value, _, mask = case(steps, steps)
    kept = kept_of(reward, mask)
    out = gae(reward, value, mask, gamma=gamma, lam=lam)
    wanted = loop_gae(reward, value, mask, gamma, lam, [0.0] * 9)
    close(out.advantage, wanted)
    close(out.returns, wanted + torch.where(kept, value, 0.0))
    assert torch.equal(out.loss_mask, kept) and torch.equal(out.weight, kept.float())
    assert out.critic_mask is not None and torch.equal(out.critic_mask, kept)
    assert torch.equal(out.live, kept.any(1)) and not out.live[2] and not out.live[3] and out.live[0]


def test_gae_bootstraps() -> None:
    reward, value, _, mask = case(5, 12)
    after = torch.randn(9)
    close(gae(reward, value, mask, after).advantage, loop_gae(reward, value, mask, 1, 0.95, after.tolist()))
    cut = torch.arange(9) % 2 == 0
    both = [x if c else 0.0 for x, c in zip(after.tolist(), cut.tolist(), strict=True)]
    close(gae(reward, value, mask, after, cut).advantage, loop_gae(reward, value, mask, 1, 0.95, both))
    last = [float(value[b, last_step(mask)[b]]) if c and mask[b].any() else 0.0 for b, c in enumerate(cut.tolist())]
    close(gae(reward, value, mask, None, cut).advantage, loop_gae(reward, value, mask, 1, 0.95, last))
    assert not torch.equal(gae(reward, value, mask, after, cut).advantage, gae(reward, value, mask, after).advantage)


def test_gae_special_cases() -> None:
    reward, value, _, mask = case(1, 40)
    kept = kept_of(reward, mask)
    r = torch.where(kept, reward.nan_to_num(nan=0.0), 0.0).double()
    v = torch.where(kept, value, 0.0).double()
    togo = r.flip(1).cumsum(1).flip(1)
    close(gae(reward, value, mask, lam=1).advantage, torch.where(kept, togo - v, 0.0), 1e-5)
    index = next_step(kept)
    ahead = torch.cat([v, torch.zeros(9, 1)], 1).gather(1, index)
    close(gae(reward, value, mask, gamma=0.9, lam=0).advantage, torch.where(kept, r + 0.9 * ahead - v, 0.0))
    order = kept.cumsum(1).double()
    discounted = ((r * 0.9**order).flip(1).cumsum(1).flip(1)) / 0.9**order
    close(gae(reward, torch.zeros_like(value), mask, gamma=0.9, lam=1).advantage, torch.where(kept, discounted, 0.0))


def test_padding_changes_nothing_and_inputs_stay() -> None:
    reward, value, post, mask = case(2, 30)
    before = [x.clone() for x in (reward, value, mask)]
    wide = [torch.cat([x, torch.full((9, 70), junk)], 1) for x, junk in ((reward, NAN), (value, 7.0), (post, 7.0))]
    longer = torch.cat([mask, torch.zeros(9, 70, dtype=torch.bool)], 1)
    for narrow, padded in (
        (gae(reward, value, mask, whiten=True), gae(wide[0], wide[1], longer, whiten=True)),
        (pdppo(reward, value, post, mask), pdppo(*wide, longer)),
        (reinforce_pp(reward, mask, holes="reset"), reinforce_pp(wide[0], longer, holes="reset")),
    ):
        close(padded.advantage[:, :30], narrow.advantage, 1e-6)
        assert not padded.advantage[:, 30:].any() and padded.returns is not None and not padded.returns[:, 30:].any()
    for x, y in zip(before, (reward, value, mask), strict=True):
        assert torch.equal(x.nan_to_num(nan=9.0), y.nan_to_num(nan=9.0))


@pytest.mark.parametrize(("ddof", "eps"), [(1, 1e-8), (0, 0.5)])
def test_whitening_is_over_unmasked_steps_of_all_ranks(ddof: int, eps: float) -> None:
    reward, value, _, mask = case(3, 20)
    raw = gae(reward, value, mask)
    out = gae(reward, value, mask, whiten=True, ddof=ddof, eps=eps)
    close(out.advantage, whitened(raw.advantage, raw.loss_mask, ddof, eps))
    assert out.returns is not None and raw.returns is not None and torch.equal(out.returns, raw.returns)
    twice = [torch.cat([x, x]) for x in (reward, value, mask)]
    there = gae(twice[0], twice[1], twice[2], whiten=True, ddof=ddof, eps=eps)
    here = gae(reward, value, mask, whiten=True, ddof=ddof, eps=eps, reduce=lambda x: 2 * x)
    close(here.advantage, there.advantage[:9])


def test_open_reasoner_zero_worked_numbers() -> None:
    out = open_reasoner_zero(row(0, 0, 1), row(0.5, 0.6, 0.8), flags(1, 1, 1), whiten=False)
    close(out.advantage, row(0.5, 0.4, 0.2))
    close(out.returns, row(1, 1, 1))


def test_open_reasoner_zero_is_gae_whitened() -> None:
    reward, value, _, mask = case(4, 20)
    same(open_reasoner_zero(reward, value, mask), gae(reward, value, mask, lam=1, whiten=True))
    given = {"ddof": 0, "eps": 0.5, "reduce": lambda x: 3 * x}
    same(open_reasoner_zero(reward, value, mask, **given), gae(reward, value, mask, lam=1, whiten=True, **given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cut", "gamma", "lam", "wanted"),
    [
        (1, 1, 1, (0.4, 0.1, 0)),
        (1, 1, 0.95, (0.395, 0.1, 0)),
        (1, 0.99, 1, (0.3822, 0.0881, -0.0060)),
        (0, 1, 1, (-0.2, -0.5, -0.6)),
    ],
)
def test_t_ppo_worked_numbers(cut: int, gamma: float, lam: float, wanted: tuple[float, ...]) -> None:
    out = t_ppo(row(0, 0, 0), row(0.2, 0.5, 0.6), flags(1, 1, 1), flags(cut)[0], gamma=gamma, lam=lam)
    close(out.advantage, row(*wanted), 1e-4)


@pytest.mark.parametrize("target", ["mc", "gae"])
def test_t_ppo_against_a_plain_loop(target: Any) -> None:
    reward, value, _, mask = case(6, 25)
    kept = kept_of(reward, mask)
    cut = torch.arange(9) % 2 == 0
    last = [float(value[b, last_step(kept)[b]]) if cut[b] and kept[b].any() else 0.0 for b in range(9)]
    start = torch.arange(9) * 3
    out = t_ppo(reward, value, mask, cut, start, gamma=0.98, critic_target=target)
    wanted = loop_gae(reward, value, mask, 0.98, 0.95, last)
    close(out.advantage, wanted)
    goal = wanted if target == "gae" else loop_gae(reward, value, mask, 0.98, 1.0, last)
    close(out.returns, goal + torch.where(kept, value, 0.0))
    inside = torch.tensor([[bool(kept[b, t]) and t >= 3 * b for t in range(25)] for b in range(9)])
    assert torch.equal(out.loss_mask, inside) and torch.equal(out.weight, inside.float())
    assert out.critic_mask is not None and torch.equal(out.critic_mask, kept & ~cut[:, None])
    assert torch.equal(out.live, kept.any(1))


def test_t_ppo_on_finished_rows_is_gae() -> None:
    reward, value, _, mask = case(7, 25)
    finished = torch.zeros(9, dtype=torch.bool)
    same(t_ppo(reward, value, mask, finished, critic_target="gae"), gae(reward, value, mask))
    target = t_ppo(reward, value, mask, finished, gamma=0.9).returns
    close(target, gae(reward, torch.zeros_like(value), mask, gamma=0.9, lam=1).advantage)


def test_pdppo_worked_numbers() -> None:
    reward, mask = row(1, 1), flags(1, 1)
    # With lam 0 and gamma 0 an advantage is r - V, so the critics give [.4, -.1] and [.1, .2].
    pre, post = row(0.6, 1.1), row(0.9, 0.8)
    out = pdppo(reward, pre, post, mask, gamma=0, lam=0)
    close(out.advantage, row(0.4, 0.2))
    close(out.channels["pre"], row(0.4, -0.1))
    close(out.channels["post"], row(0.1, 0.2))
    close(pdppo(reward, pre, post, mask, gamma=0, lam=0, combine="mean").advantage, row(0.25, 0.05))


def test_pdppo_combines_two_critics() -> None:
    reward, value, post, mask = case(8, 25)
    kept = kept_of(reward, mask)
    post = torch.where(mask, post, NAN)
    pre, later = (loop_gae(reward, v, mask, 0.9, 0.8, [0.0] * 9) for v in (value, post))
    out = pdppo(reward, value, post, mask, gamma=0.9, lam=0.8)
    close(out.advantage, torch.maximum(pre, later))
    close(out.returns, pre + torch.where(kept, value, 0.0))
    close(out.channels["returns_post"], later + torch.where(kept, post, 0.0))
    assert bool((out.advantage >= out.channels["pre"]).all()) and bool((out.advantage >= out.channels["post"]).all())
    assert out.critic_mask is not None and torch.equal(out.critic_mask, kept) and torch.equal(out.loss_mask, kept)


@pytest.mark.parametrize("combine", ["max", "mean"])
def test_pdppo_with_equal_critics_is_gae(combine: Any) -> None:
    reward, value, _, mask = case(9, 25)
    same(pdppo(reward, value, value, mask, combine=combine), gae(reward, value, mask))


@pytest.mark.parametrize("holes", ["skip", "reset"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_pp_against_a_plain_loop(holes: Any, gamma: float) -> None:
    reward, old, reference, mask = case(10, 25)
    reference = torch.where(mask, reference, NAN)
    kept = kept_of(reward, mask)
    raw = torch.zeros(9, 25, dtype=torch.float64)
    for b in range(9):
        total = 0.0
        for t in reversed(range(25)):
            if kept[b, t]:
                r = 0.0 if math.isnan(reward[b, t]) else float(reward[b, t])
                total = r - 0.3 * (float(old[b, t]) - float(reference[b, t])) + gamma * total
                raw[b, t] = total
            elif holes == "reset":
                total = 0.0
    out = reinforce_pp(reward, mask, old, reference, gamma=gamma, kl_coef=0.3, holes=holes)
    close(out.returns, raw)
    close(out.advantage, whitened(raw, kept, 1, 1e-8))
    close(
        reinforce_pp(reward, mask, old, reference, gamma=gamma, kl_coef=0.3, holes=holes, whiten=False).advantage, raw
    )
    assert torch.equal(out.loss_mask, kept) and torch.equal(out.live, kept.any(1))


def test_reinforce_pp_is_gae_without_a_critic() -> None:
    reward, value, _, mask = case(11, 70)
    given = {"ddof": 0, "eps": 0.1, "reduce": lambda x: 2 * x}
    plain = gae(reward, torch.zeros_like(value), mask, gamma=0.9, lam=1, whiten=True, **given)  # type: ignore[arg-type]
    out = reinforce_pp(reward, mask, gamma=0.9, **given)  # type: ignore[arg-type]
    close(out.advantage, plain.advantage)
    moments = reinforce_pp(reward, mask).advantage[plain.loss_mask].double()
    assert abs(float(moments.mean())) < 1e-6 and abs(float(moments.var()) - 1) < 1e-5


def test_process_reward_learning_is_gae_on_the_kl_in_the_reward() -> None:
    """2601.10201 with every token a step: outcome minus the log-ratio to go over eta."""
    log_ratio, eta = [0.2, -0.1, 0.3, 0.0], 2.0
    loop = [1.0 - math.fsum(log_ratio[t:]) / eta for t in range(4)]
    assert loop == pytest.approx([0.8, 0.9, 0.85, 1.0])
    reward = torch.tensor([[0.0, 0.0, 0.0, 1.0]]) - torch.tensor([log_ratio]) / eta
    close(gae(reward, torch.zeros(1, 4), flags(1, 1, 1, 1), lam=1).advantage, row(*loop))
    terminal, zeros = row(0, 0, 0, 1), torch.zeros(1, 4)
    out = reinforce_pp(terminal, flags(1, 1, 1, 1), row(*log_ratio), zeros, kl_coef=1 / eta, whiten=False)
    close(out.advantage, row(*loop))


@pytest.mark.parametrize(
    ("unit", "wanted"),
    [("step", [[1.5, 0, 0], [-0.5, -0.5, -0.5]]), ("sample", [[0.7071, 0, 0], [-0.7071, -0.7071, -0.7071]])],
)
def test_reinforce_pp_baseline_worked_numbers(unit: Any, wanted: list[list[float]]) -> None:
    mask = torch.tensor([[True, False, False], [True, True, True]])
    out = reinforce_pp_baseline(torch.tensor([1.0, 0.0]), torch.tensor([4, 4]), mask, unit=unit)
    close(out.advantage, torch.tensor(wanted), 1e-4)


@pytest.mark.parametrize("unit", ["step", "sample"])
@pytest.mark.parametrize("singleton", ["zero", "raw"])
@pytest.mark.parametrize("dead", ["zero", "whiten"])
def test_reinforce_pp_baseline_against_a_plain_loop(unit: Any, singleton: Any, dead: Any) -> None:
    mask = case(12, 10, 11)[3]
    mask[4:6] = True
    mask[9] = False
    group = torch.tensor([5, 5, 5, -7, -7, 900, 3, 3, 3, 5, 900])
    rewards = torch.tensor([1.0, 0.0, 4.0, 2.0, 2.0, 3.0, NAN, 1.0, -1.0, 0.5, 9.0])
    valid = torch.arange(11) != 10
    known = [bool(valid[i]) and not math.isnan(rewards[i]) for i in range(11)]
    start, live = [0.0] * 11, [False] * 11
    for i in range(11):
        mates = [float(rewards[j]) for j in range(11) if known[j] and group[j] == group[i]]
        single = len(mates) == 1 and singleton == "raw"
        live[i] = single or max(mates) > min(mates)
        if known[i] and live[i]:
            start[i] = float(rewards[i]) - (0.0 if single else math.fsum(mates) / len(mates))
    kept = mask & torch.tensor(known)[:, None]
    broad = torch.tensor(start, dtype=torch.float64)[:, None].expand(11, 10)
    wanted = whitened(broad, kept, 0, 1e-3)
    if unit == "sample":
        one = torch.zeros_like(kept)
        one[:, 0] = kept.any(1)
        wanted = torch.where(kept, whitened(broad, one, 0, 1e-3)[:, :1], 0.0)
    if dead == "zero":
        wanted = torch.where(torch.tensor(live)[:, None], wanted, 0.0)
    policy = {"unit": unit, "singleton": singleton, "dead": dead, "ddof": 0, "eps": 1e-3}
    out = reinforce_pp_baseline(rewards, group, mask, valid, **policy)
    close(out.advantage, wanted)
    assert torch.equal(out.loss_mask, kept) and out.live.tolist() == live
    assert out.group_mean is not None and out.group_mean[3] == 2 and out.group_mean[7] == 0
    assert out.group_std is not None and out.group_std[7] == 1
    twice = [torch.cat([x, x]) for x in (rewards, mask, valid)]
    there = reinforce_pp_baseline(twice[0], torch.cat([group, group + 10_000]), twice[1], twice[2], **policy)
    close(
        reinforce_pp_baseline(rewards, group, mask, valid, reduce=lambda x: 2 * x, **policy).advantage,
        there.advantage[:11],
    )


def test_reinforce_pp_baseline_is_lite_ppo_at_equal_lengths() -> None:
    rewards, group = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 0, 3]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    mask = torch.ones(9, 6, dtype=torch.bool)
    plain = lite_ppo(rewards, group, ddof=0, eps=0.0, std_of="centred").advantage[:, None].expand(9, 6)
    close(reinforce_pp_baseline(rewards, group, mask, ddof=0, eps=1e-30).advantage, plain)
    close(reinforce_pp_baseline(rewards, group, mask, eps=1e-30).advantage, plain * math.sqrt(53 / 54))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16, torch.float64])
def test_results_are_float32_without_gradient(half: torch.dtype) -> None:
    mask = flags(1, 0, 1, 1)
    reward, value = row(0.5, 0, 0.25, 1).to(half), row(1, 2, 0.5, 0.25).to(half).requires_grad_()
    wide = gae(reward.float(), value.detach().float(), mask, flags(1)[0].float())
    out = gae(reward, value, mask, flags(1)[0].to(half))
    same(out, wide)
    assert out.advantage.dtype == out.weight.dtype == torch.float32 and not out.advantage.requires_grad
    assert out.returns is not None and out.returns.dtype == torch.float32 and not out.returns.requires_grad


OK = {"step_reward": torch.zeros(2, 3), "value": torch.zeros(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
CUT = {**OK, "truncated": torch.zeros(2, dtype=torch.bool)}
POST = {**OK, "value_post": torch.zeros(2, 3)}
PLUS = {"step_reward": OK["step_reward"], "mask": OK["mask"]}
BASE = {"rewards": torch.tensor([0.0, 1]), "group": torch.tensor([1, 1]), "mask": OK["mask"]}
HOLE = torch.tensor([[True, False, True], [True, True, True]])


@pytest.mark.parametrize(
    ("call", "inputs", "change", "message"),
    [
        (gae, OK, {"step_reward": torch.ones(2, 3), "mask": HOLE}, "step_reward: a reward on a masked step"),
        (gae, OK, {"step_reward": torch.zeros(2, 4)}, "step_reward: expected"),
        (gae, OK, {"step_reward": torch.full((2, 3), NAN)}, "step_reward: every"),
        (gae, OK, {"value": torch.zeros(2, 4)}, "value: expected"),
        (gae, OK, {"value": torch.full((2, 3), NAN)}, "value: 6"),
        (gae, OK, {"mask": torch.ones(2, 3)}, "mask: expected bool"),
        (gae, OK, {"mask": torch.ones(0, 3, dtype=torch.bool)}, "mask: expected bool"),
        (gae, OK, {"bootstrap": torch.zeros(3)}, "bootstrap: expected"),
        (gae, OK, {"bootstrap": torch.zeros(2, dtype=torch.complex64)}, "bootstrap: expected"),
        (gae, OK, {"bootstrap": torch.tensor([0.0, NAN])}, "bootstrap: expected"),
        (gae, OK, {"truncated": torch.zeros(2)}, "truncated: expected bool"),
        (gae, OK, {"gamma": 1.01}, "gamma: expected"),
        (gae, OK, {"lam": -0.01}, "lam: expected"),
        (gae, OK, {"lam": NAN}, "lam: expected"),
        (gae, OK, {"ddof": 2}, "ddof: expected"),
        (gae, OK, {"eps": 0.0}, "eps: expected"),
        (gae, OK, {"eps": -1.0}, "eps: expected"),
        (open_reasoner_zero, OK, {"eps": 0.0}, "eps: expected"),
        (t_ppo, CUT, {"truncated": torch.zeros(2)}, "truncated: expected bool"),
        (t_ppo, CUT, {"window_start": torch.zeros(2)}, "window_start: expected int64"),
        (t_ppo, CUT, {"critic_target": "td"}, "critic_target: expected"),
        (t_ppo, CUT, {"gamma": 2.0}, "gamma: expected"),
        (t_ppo, CUT, {"lam": 2.0}, "lam: expected"),
        (pdppo, POST, {"combine": "min"}, "combine: expected"),
        (pdppo, POST, {"gamma": 2.0}, "gamma: expected"),
        (pdppo, POST, {"lam": 2.0}, "lam: expected"),
        (pdppo, POST, {"value_post": torch.zeros(2, 1)}, "value_post: expected"),
        (reinforce_pp, PLUS, {"gamma": 2.0}, "gamma: expected"),
        (reinforce_pp, PLUS, {"holes": "keep"}, "holes: expected"),
        (reinforce_pp, PLUS, {"eps": 0.0}, "eps: expected"),
        (reinforce_pp, PLUS, {"kl_coef": -0.1}, "kl_coef: expected"),
        (reinforce_pp, PLUS, {"kl_coef": math.inf}, "kl_coef: expected"),
        (reinforce_pp, PLUS, {"kl_coef": 0.1, "old_log_prob": torch.zeros(2, 3)}, "kl_coef: above 0"),
        (reinforce_pp, PLUS, {"kl_coef": 0.1, "reference_log_prob": torch.zeros(2, 3)}, "kl_coef: above 0"),
        (reinforce_pp_baseline, BASE, {"unit": "token"}, "unit: expected"),
        (reinforce_pp_baseline, BASE, {"dead": "keep"}, "dead: expected"),
        (reinforce_pp_baseline, BASE, {"singleton": "one"}, "singleton: expected"),
        (reinforce_pp_baseline, BASE, {"eps": 0.0}, "eps: expected"),
        (reinforce_pp_baseline, BASE, {"mask": torch.ones(3, 3, dtype=torch.bool)}, "mask: expected bool"),
        (reinforce_pp_baseline, BASE, {"group": torch.zeros(2)}, "group: expected int64"),
    ],
)
def test_bad_input_names_the_argument(
    call: Callable[..., Advantage], inputs: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    call(**inputs)
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**{**inputs, **change})


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_ends_of_a_range_are_allowed(gamma: float) -> None:
    gae(**OK, gamma=gamma, lam=gamma)


def test_entries() -> None:
    keys = {m.key for m in METHODS}
    assert keys == {"gae", "open_reasoner_zero", "t_ppo", "pdppo", "reinforce_pp", "reinforce_pp_baseline"}
    assert all(m.call is not None and m.call.__name__ == m.key for m in METHODS)
