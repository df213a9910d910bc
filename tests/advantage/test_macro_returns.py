"""MA-RLHF, HAE, MT-PPO, EAPO: worked numbers, plain loops, identities, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage import Advantage
from flowrl.advantage.macro_returns import METHODS, eapo, hae, keep_even, ma_rlhf, mt_ppo
from flowrl.advantage.returns import gae

from .paths import NAN, case, close, flags, kept_of, loop_gae, row, same


def ids(*x: int) -> Tensor:
    return torch.tensor([x])


MACRO = {
    "step_reward": row(-0.1, -0.1, 0, -0.2, 0, 1),
    "value": row(0.2, 0.4, 0.5, 0.7, 0.8, 0.9),
    "segment": ids(0, 0, 1, 1, 2, 3),
    "mask": flags(1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize(
    ("form", "wanted"),
    [("pooled", (0.471, 0.2853, 0.195, 0.1)), ("sum", (0.276, 0.1853, 0.195, 0.1))],
)
def test_ma_rlhf_worked_numbers(form: Any, wanted: tuple[float, ...]) -> None:
    out = ma_rlhf(**MACRO, macro_reward=form)
    spread = torch.tensor([wanted])[:, [0, 0, 1, 1, 2, 3]]
    close(out.advantage, spread, 1e-4)
    close(out.returns, spread + row(0.3, 0.3, 0.6, 0.6, 0.8, 0.9), 1e-4)
    one = ma_rlhf(**{**MACRO, "segment": torch.zeros(1, 6, dtype=torch.int64)})
    close(one.advantage, torch.full((1, 6), 0.6 - 3.5 / 6), 1e-4)
    assert float(one.advantage[0, 0]) == pytest.approx(0.0167, abs=1e-4)


def blocks(seed: int, steps: int, rows: int = 9) -> Tensor:
    """Ids that never decrease, skip some, are -1 before the first start and after the last step of some rows."""
    draw = torch.Generator().manual_seed(seed)
    segment = (torch.rand(rows, steps, generator=draw) < 0.4).long().cumsum(1) - 1
    segment[4] += torch.arange(steps) >= steps // 2
    segment[5, -2:] = -1
    return segment.clamp(max=steps - 1)


@pytest.mark.parametrize("pool", ["equal", "last", "position"])
@pytest.mark.parametrize("form", ["sum", "pooled"])
def test_ma_rlhf_against_a_plain_loop(pool: Any, form: Any) -> None:
    reward, value, _, mask = case(21, 20)
    segment = blocks(21, 20)
    mask = mask & (segment >= 0)
    reward = torch.where(mask, reward, 0.0)
    kept = kept_of(reward, mask)
    macro_reward, macro_value = torch.zeros(9, 21, dtype=torch.float64), torch.zeros(9, 21, dtype=torch.float64)
    present = torch.zeros(9, 21, dtype=torch.bool)
    for b in range(9):
        for k in range(21):
            at = [t for t in range(20) if kept[b, t] and segment[b, t] == k]
            n = len(at)
            if n == 0:
                continue
            raw = {"equal": [1.0] * n, "last": [0.0] * (n - 1) + [1.0], "position": [1 / (i + 1) for i in range(n)]}
            share = [w / math.fsum(raw[pool]) for w in raw[pool]]
            r = [0.0 if math.isnan(reward[b, t]) else float(reward[b, t]) for t in at]
            factor = share if form == "pooled" else [0.9**i for i in range(n)]
            present[b, k] = True
            macro_reward[b, k] = math.fsum(f * x for f, x in zip(factor, r, strict=True))
            macro_value[b, k] = math.fsum(w * float(value[b, t]) for w, t in zip(share, at, strict=True))
    macro = loop_gae(macro_reward, macro_value, present, 0.9, 0.8, [0.0] * 9)
    out = ma_rlhf(reward, value, segment, mask, gamma=0.9, lam=0.8, pool=pool, macro_reward=form)
    close(out.advantage, torch.where(kept, macro.gather(1, segment.clamp(min=0)), 0.0))
    close(out.returns, torch.where(kept, (macro + macro_value).gather(1, segment.clamp(min=0)), 0.0))
    assert torch.equal(out.loss_mask, kept) and torch.equal(out.live, kept.any(1))
    assert out.critic_mask is not None and torch.equal(out.critic_mask, kept)


@pytest.mark.parametrize("pool", ["equal", "last", "position"])
@pytest.mark.parametrize("form", ["sum", "pooled"])
def test_ma_rlhf_with_macros_of_one_step_is_gae(pool: Any, form: Any) -> None:
    reward, value, _, mask = case(22, 20)
    segment = torch.arange(20).expand(9, 20).contiguous()
    out = ma_rlhf(reward, value, segment, mask, gamma=0.9, lam=0.8, pool=pool, macro_reward=form)
    close(out.advantage, gae(reward, value, mask, gamma=0.9, lam=0.8).advantage)
    close(ma_rlhf(reward, value, segment, mask).advantage, gae(reward, value, mask).advantage)


def test_ma_rlhf_leaves_out_steps_outside_macros() -> None:
    out = ma_rlhf(**{**MACRO, "step_reward": row(0, 0, 1, 0, 0, 0), "segment": ids(-1, -1, 0, 0, -1, -1)})
    close(out.advantage, row(0, 0, 0.4, 0.4, 0, 0))
    assert out.loss_mask.tolist() == [[False, False, True, True, False, False]]
    none = ma_rlhf(**{**MACRO, "step_reward": torch.zeros(1, 6), "segment": ids(-1, -1, -1, -1, -1, -1)})
    assert not none.advantage.any() and not none.loss_mask.any()


HAE = {
    "step_reward": row(0, 0, 0, 1),
    "value": row(0.4, 0.5, 0.6, 0.8),
    "value_high": row(0.3, 9, 0.7, 9),
    "value_term": row(0.1, 0.2, 0.3, 0.4),
    "switch": flags(0, 0, 1, 0),
    "mask": flags(1, 1, 1, 1),
}


@pytest.mark.parametrize(("lam_seg", "first"), [(0.95, 0.685), (1.0, 0.7)])
def test_hae_worked_numbers(lam_seg: float, first: float) -> None:
    out = hae(**HAE, lam_seg=lam_seg, normalise=False)
    close(out.advantage, row(0.3, 0.2, 0.4, 0.2))
    close(out.channels["low"], out.advantage)
    close(out.channels["high"], row(first, 0, 0.3, 0))
    close(out.channels["term"], row(0.6, 0.5, 0.7, 0.6))
    close(out.channels["start"], row(1, 0, 1, 0))
    close(out.channels["returns_high"], row(first + 0.3, 0, 1, 0))
    close(out.channels["returns_term"], row(0.7, 0.7, 1, 1))
    close(out.returns, row(0.7, 0.7, 1, 1))
    assert out.critic_mask is not None and out.critic_mask.all()
    # With lam_turn = gamma = 1 the first turn of a segment has R_k + V_high(b') - V_low.
    assert float(out.advantage[0, 0]) == pytest.approx(0 + 0.7 - 0.4)


def loop_hae(
    r: list[float], low: list[float], high: list[float], start: list[int], cut: float, decay: tuple[float, float, float]
) -> tuple[list[float], list[float], list[float]]:
    """One row of turns without holes: low and high advantages and the return of what is left of a segment."""
    gamma, lam_turn, lam_seg = decay
    n, a_low, a_high, rest = len(r), [0.0] * len(r), [0.0] * len(r), [0.0] * len(r)
    bounds = [*start, n]
    later = 0.0
    for k in reversed(range(len(start))):
        b, e = bounds[k], bounds[k + 1]
        landing = high[e] if e < n else cut
        for t in range(b, e):
            rest[t] = math.fsum(gamma ** (i - t) * r[i] for i in range(t, e)) + gamma ** (e - t) * landing
            delta = [r[i] + gamma * (low[i + 1] if i + 1 < e else landing) - low[i] for i in range(t, e)]
            a_low[t] = math.fsum((gamma * lam_turn) ** i * d for i, d in enumerate(delta))
        a_high[b] = rest[b] - high[b] + gamma ** (e - b) * lam_seg * later
        later = a_high[b]
    return a_low, a_high, rest


@pytest.mark.parametrize("decay", [(1.0, 1.0, 0.95), (0.9, 0.8, 0.7)])
def test_hae_against_a_plain_loop(decay: tuple[float, float, float]) -> None:
    reward, value, high, mask = case(23, 20)
    term = torch.randn(9, 20)
    kept = kept_of(reward, mask)
    switch = blocks(24, 20).diff(dim=1, prepend=torch.zeros(9, 1, dtype=torch.int64)) != 0
    done = torch.arange(9) % 3 != 0
    wanted = {name: torch.zeros(9, 20, dtype=torch.float64) for name in ("low", "high", "rest", "start")}
    for b in range(9):
        at = [t for t in range(20) if kept[b, t]]
        if not at:
            continue
        start = [i for i, t in enumerate(at) if i == 0 or switch[b, t]]
        r = [0.0 if math.isnan(reward[b, t]) else float(reward[b, t]) for t in at]
        top = [float(high[b, t]) for t in at]
        parts = loop_hae(r, [float(value[b, t]) for t in at], top, start, 0.0 if done[b] else top[-1], decay)
        for name, part in zip(("low", "high", "rest"), parts, strict=True):
            wanted[name][b, at] = torch.tensor(part, dtype=torch.float64)
        wanted["start"][b, [at[i] for i in start]] = 1.0
    given = dict(zip(("gamma", "lam_turn", "lam_seg"), decay, strict=True))
    inputs = (reward, value, high, term, switch, mask, done)
    out = hae(*inputs, **given, normalise=False)
    first = wanted["start"] > 0
    close(out.advantage, wanted["low"])
    close(out.channels["high"], wanted["high"])
    close(out.channels["start"], wanted["start"])
    close(out.channels["term"], torch.where(kept, wanted["rest"] - term, 0.0))
    close(out.returns, wanted["low"] + torch.where(kept, value, 0.0))
    close(out.channels["returns_high"], wanted["high"] + torch.where(first, high, 0.0))
    close(out.channels["returns_term"], wanted["rest"])
    assert torch.equal(out.loss_mask, kept) and torch.equal(out.live, kept.any(1))
    assert out.critic_mask is not None and torch.equal(out.critic_mask, kept)
    scaled = hae(*inputs, **given)
    for name, where in (("low", kept), ("high", first), ("term", kept)):
        raw = out.channels[name].double()
        level = raw[where]
        want = torch.where(where, (raw - level.mean()) / (level.std(correction=0) + 1e-8), 0.0)
        close(scaled.channels[name], want, 1e-5)
    close(scaled.advantage, scaled.channels["low"], 0.0)
    close(scaled.returns, wanted["low"] + torch.where(kept, value, 0.0))
    twice = [torch.cat([x, x]) for x in inputs]
    close(hae(*inputs, **given, reduce=lambda x: 2 * x).channels["high"], hae(*twice, **given).channels["high"][:9])


def test_hae_of_one_segment_is_turn_level_gae() -> None:
    reward, value, high, mask = case(25, 20)
    switch = torch.zeros_like(mask)
    out = hae(reward, value, high, value, switch, mask, gamma=0.9, lam_turn=0.8, normalise=False)
    close(out.advantage, gae(reward, value, mask, gamma=0.9, lam=0.8).advantage)
    out = hae(reward, value, high, value, switch, mask, normalise=False)
    kept = kept_of(reward, mask)
    total = torch.where(kept, reward.nan_to_num(nan=0.0), 0.0).sum(1)
    for b in range(9):
        for t in range(20):
            first = bool(kept[b, t]) and not kept[b, :t].any()
            want = float(total[b] - high[b, t]) if first else 0.0
            assert float(out.channels["high"][b, t]) == pytest.approx(want, abs=1e-5)


def test_hae_with_a_switch_at_every_turn_is_gae_on_the_upper_critic() -> None:
    reward, value, high, mask = case(26, 20)
    high = torch.where(mask, high, 0.0)
    out = hae(reward, value, high, value, torch.ones_like(mask), mask, gamma=0.9, lam_seg=1.0, normalise=False)
    close(out.channels["high"], gae(reward, high, mask, gamma=0.9, lam=1.0).advantage)


def test_hae_without_spread_is_zero() -> None:
    zero = torch.zeros(2, 3)
    out = hae(zero, zero, zero, zero, zero.bool(), zero == 0)
    assert all(not out.channels[name].any() for name in ("low", "high", "term"))


def test_mt_ppo_worked_numbers() -> None:
    mask, zero = flags(1, 1, 0, 0, 1, 1), torch.zeros(1, 6)
    out = mt_ppo(torch.tensor([1.0]), row(0.3, 0), ids(0, 0, -1, -1, 1, 1), zero, mask)
    close(out.advantage, row(1.3, 1.3, 0, 0, 1, 1))
    inside = mt_ppo(torch.tensor([1.0]), row(0.3, NAN), ids(0, 0, 0, 0, 1, 1), zero, mask)
    close(inside.advantage, row(1.3, 1.3, 0, 0, 1, 1))


def test_mt_ppo_against_a_plain_loop() -> None:
    _, value, _, mask = case(27, 20)
    segment = blocks(27, 20)
    rewards = torch.randn(9)
    rewards[6] = NAN
    kept = mask & ~rewards.isnan()[:, None]
    stage = torch.randn(9, 21)
    stage[0, 0] = NAN
    reward = torch.zeros(9, 20, dtype=torch.float64)
    for b in range(9):
        for k in range(21):
            at = [t for t in range(20) if kept[b, t] and segment[b, t] == k]
            if not at:
                stage[b, k] = 0.0 if kept[b].any() else 5.0
            elif not math.isnan(stage[b, k]):
                reward[b, at[-1]] += float(stage[b, k])
        if kept[b].any():
            reward[b, max(t for t in range(20) if kept[b, t])] += float(rewards[b])
    out = mt_ppo(rewards, stage, segment, value, mask, gamma=0.9, lam=0.8)
    wanted = loop_gae(reward, value, kept, 0.9, 0.8, [0.0] * 9)
    close(out.advantage, wanted)
    close(out.returns, wanted + torch.where(kept, value, 0.0))
    assert torch.equal(out.loss_mask, kept) and torch.equal(out.live, kept.any(1))
    assert out.critic_mask is not None and torch.equal(out.critic_mask, kept)


def test_mt_ppo_without_turn_rewards_is_gae() -> None:
    _, value, _, mask = case(28, 20)
    rewards, terminal = torch.randn(9), torch.zeros(9, 20)
    for b in range(9):
        if mask[b].any():
            terminal[b, int(mask[b].nonzero().max())] = rewards[b]
    out = mt_ppo(rewards, torch.zeros(9, 20), blocks(28, 20), value, mask, lam=0.95)
    same(out, gae(terminal, value, mask))


def test_eapo_worked_numbers() -> None:
    out = eapo(torch.tensor([1.0]), torch.tensor([0]), flags(1, 1, 1), pool="none")
    close(out.advantage, row(0.9900, 0.9950, 1), 1e-4)
    every = eapo(torch.tensor([2.0]), torch.tensor([0]), flags(1, 0, 1), gamma=1.0, pool="none")
    close(every.advantage, row(2, 0, 2))


def test_eapo_unpooled_is_a_discounted_return_to_go() -> None:
    mask = case(29, 20)[3]
    rewards, terminal = torch.randn(9), torch.zeros(9, 20)
    for b in range(9):
        if mask[b].any():
            terminal[b, int(mask[b].nonzero().max())] = rewards[b]
    out = eapo(rewards, torch.zeros(9, dtype=torch.int64), mask, gamma=0.9, pool="none")
    close(out.advantage, gae(terminal, torch.zeros(9, 20), mask, gamma=0.9, lam=1).advantage)


@pytest.mark.parametrize("pool", ["group", "round"])
@pytest.mark.parametrize(("gamma", "ddof", "eps"), [(0.9, 1, 1e-6), (1.0, 0, 0.1)])
def test_eapo_against_a_plain_loop(pool: Any, gamma: float, ddof: int, eps: float) -> None:
    mask = case(30, 12, 12)[3]
    mask[8] = mask[9]
    group = torch.tensor([7, 7, 7, 7, -2, -2, -2, 10**12, 5, 5, 5, 5])
    rewards = torch.tensor([1.0, 2, 3, NAN, 0, 0, 0, 4, 1, 1, 5, NAN])
    kept = mask & ~rewards.isnan()[:, None]
    x: dict[tuple[int, int], float] = {}
    place: dict[tuple[int, int], int] = {}
    for b in range(12):
        at = [t for t in range(12) if kept[b, t]]
        for i, t in enumerate(at):
            x[b, t], place[b, t] = gamma ** (len(at) - 1 - i) * float(rewards[b]), i
    wanted, live = torch.zeros(12, 12, dtype=torch.float64), [False] * 12
    for b, t in x:
        near = [c for c in x if group[c[0]] == group[b] and (pool == "group" or place[c] == place[b, t])]
        values = [x[c] for c in near]
        if max(values) > min(values):
            live[b] = True
            mean = math.fsum(values) / len(values)
            std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof))
            wanted[b, t] = (x[b, t] - mean) / (std + eps)
    for b in range(12):  # with one pool a group, its rows are live together
        live[b] = live[b] or (pool == "group" and any(live[c] for c in range(12) if group[c] == group[b]))
    out = eapo(rewards, group, mask, gamma=gamma, pool=pool, ddof=ddof, eps=eps)
    close(out.advantage, wanted)
    assert torch.equal(out.loss_mask, kept) and out.live.tolist() == live
    if pool == "group":
        first = [x[c] for c in x if group[c[0]] == 7]
        assert out.group_mean is not None and float(out.group_mean[3]) == pytest.approx(math.fsum(first) / len(first))
        assert out.group_std is not None and float(out.group_std[4]) == 0


def test_keep_even_drops_the_least_draws() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    uniform = torch.tensor([[0.5, 0.1, 0.0], [0.9, 0.2, 0.7]])
    assert torch.equal(keep_even(mask, uniform, ranks=1), mask)
    assert torch.equal(keep_even(mask, uniform, ranks=5), mask)
    two = torch.tensor([[True, False, False], [True, True, True]])
    assert torch.equal(keep_even(mask, uniform, ranks=2), two)
    assert keep_even(mask, uniform, ranks=3).tolist() == [[True, False, False], [True, False, True]]
    assert not keep_even(mask, uniform, ranks=6).any() and mask.sum() == 5


TURN = {
    "rewards": torch.tensor([1.0]),
    "stage_reward": row(0.3, 0),
    "segment": ids(0, 0, -1, 1),
    "value": torch.zeros(1, 4),
    "mask": flags(1, 1, 0, 1),
}
ROUND = {"rewards": torch.tensor([1.0]), "group": torch.tensor([1]), "mask": flags(1, 1)}
EVEN = {"mask": flags(1, 1), "uniform": row(0, 0), "ranks": 2}


@pytest.mark.parametrize(
    ("call", "inputs", "change", "message"),
    [
        (ma_rlhf, MACRO, {"segment": ids(0, 0, 1, 1, 2, 6)}, "segment: expected ids"),
        (ma_rlhf, MACRO, {"segment": ids(0, 1, 0, 1, 2, 3)}, "segment: expected ids"),
        (ma_rlhf, MACRO, {"segment": ids(0, 1, -1, 0, 2, 3)}, "segment: expected ids"),
        (ma_rlhf, MACRO, {"segment": ids(0, 1)}, "segment: expected int64"),
        (ma_rlhf, MACRO, {"segment": torch.zeros(1, 6)}, "segment: expected int64"),
        (ma_rlhf, MACRO, {"segment": ids(0, 0, 1, 1, 2, -1)}, "step_reward: a reward on a masked step"),
        (ma_rlhf, MACRO, {"mask": torch.ones(1, 6)}, "mask: expected bool"),
        (ma_rlhf, MACRO, {"gamma": 2.0}, "gamma: expected"),
        (ma_rlhf, MACRO, {"lam": 2.0}, "lam: expected"),
        (ma_rlhf, MACRO, {"pool": "unit"}, "pool: expected"),
        (ma_rlhf, MACRO, {"macro_reward": "mean"}, "macro_reward: expected"),
        (hae, HAE, {"switch": torch.zeros(1, 4)}, "switch: expected bool"),
        (hae, HAE, {"done": torch.zeros(1)}, "done: expected bool"),
        (hae, HAE, {"value": torch.zeros(1, 3)}, "value: expected"),
        (hae, HAE, {"value_high": torch.full((1, 4), NAN)}, "value_high: 4"),
        (hae, HAE, {"value_term": torch.zeros(1, 3)}, "value_term: expected"),
        (hae, HAE, {"gamma": 2.0}, "gamma: expected"),
        (hae, HAE, {"lam_turn": 2.0}, "lam_turn: expected"),
        (hae, HAE, {"lam_seg": 2.0}, "lam_seg: expected"),
        (mt_ppo, TURN, {"stage_reward": row(0.3)}, "stage_reward: expected"),
        (mt_ppo, TURN, {"stage_reward": torch.zeros(2, 2)}, "stage_reward: expected"),
        (mt_ppo, TURN, {"stage_reward": torch.zeros(2)}, "stage_reward: expected"),
        (mt_ppo, TURN, {"stage_reward": row(0.3, 0, 0.1)}, "stage_reward: the reward of a turn without"),
        (mt_ppo, TURN, {"stage_reward": row(0.3, math.inf)}, "stage_reward: expected real"),
        (mt_ppo, TURN, {"stage_reward": torch.zeros(1, 2, dtype=torch.complex64)}, "stage_reward: expected real"),
        (mt_ppo, TURN, {"rewards": torch.tensor([NAN])}, "rewards: every"),
        (mt_ppo, TURN, {"rewards": torch.tensor(1.0)}, "rewards: expected"),
        (mt_ppo, TURN, {"segment": ids(1, 0, -1, 1)}, "segment: expected ids"),
        (mt_ppo, TURN, {"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask: expected bool"),
        (mt_ppo, TURN, {"gamma": 2.0}, "gamma: expected"),
        (mt_ppo, TURN, {"lam": 2.0}, "lam: expected"),
        (eapo, ROUND, {"gamma": 2.0}, "gamma: expected"),
        (eapo, ROUND, {"pool": "batch"}, "pool: expected"),
        (eapo, ROUND, {"ddof": 2}, "ddof: expected"),
        (eapo, ROUND, {"eps": -1.0}, "eps: expected"),
        (eapo, ROUND, {"mask": torch.ones(2, 2, dtype=torch.bool)}, "mask: expected bool"),
        (keep_even, EVEN, {"ranks": 0}, "ranks: expected"),
        (keep_even, EVEN, {"uniform": torch.zeros(1, 3)}, "uniform: expected"),
        (keep_even, EVEN, {"mask": torch.ones(1, 2)}, "mask: expected bool"),
    ],
)
def test_bad_input_names_the_argument(
    call: Callable[..., Advantage], inputs: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    call(**inputs)
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**{**inputs, **change})


def test_entries() -> None:
    assert [(m.kind, m.key) for m in METHODS] == [
        *(("estimator", key) for key in ("ma_rlhf", "hae", "mt_ppo", "eapo")),
        ("selection", "eapo"),
    ]
    assert [m.call for m in METHODS] == [ma_rlhf, hae, mt_ppo, eapo, keep_even]
