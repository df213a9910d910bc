"""The combinator and MT-GRPO, A2TGPO, CAPO: worked numbers, plain-loop references, identities, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.estimators import grpo
from flowrl.advantage.inputs import read_segments
from flowrl.advantage.local_terms import Norm, a2tgpo, capo_credit, combine, mt_grpo, normalise
from flowrl.advantage.segments import Groups

from .local_cases import NAN, close, defaults, on_steps, outcome_loop, ragged, standardise

ALL = torch.ones(2, 3, dtype=torch.bool)
PAIR = torch.tensor([0, 0])
TURNS = torch.tensor([[0, 1, 2], [0, 1, 2]])


def test_mt_grpo_worked_numbers() -> None:
    two = torch.tensor([[0, 1], [0, 1]])
    out = mt_grpo(torch.tensor([[1.0, 0], [0, 1]]), PAIR, ALL[:, :2], two).advantage
    close(out, [[0, -0.707], [0, 0.707]])
    rewards, group = torch.tensor([[1.0, 1], [0, 1], [0, 0]]), torch.zeros(3, dtype=torch.int64)
    out = mt_grpo(rewards, group, torch.ones(3, 2, dtype=torch.bool), two[:1].expand(3, 2)).advantage
    close(out, [[1.7318, 0.5773], [0, 0.5773], [-1.7318, -1.1545]])


@pytest.mark.parametrize("form", ["additive", "cumulative"])
@pytest.mark.parametrize("seed", range(6))
def test_mt_grpo_against_a_plain_loop(seed: int, form: str) -> None:
    case = ragged(seed)
    turn = [r[0] for r in case.table(1, 0.2)]
    _, group, mask, segment = case.tensors()
    rewards = torch.tensor(list(zip(turn, case.rewards, strict=True)))
    got = mt_grpo(
        rewards, group, mask, segment, torch.tensor(case.valid), coef=0.7, form=form, discount=0.9, eps=1e-3, ddof=1
    )
    known = [0.0 if math.isnan(x) else x for x in turn]
    scale = 1.0 if form == "additive" else 0.9
    last = outcome_loop(case, 1, 1e-3)
    both = outcome_loop(case, 1, 1e-3, [k + scale * r for k, r in zip(known, case.rewards, strict=True)])
    keyed = [
        (g, k, float(u and not math.isnan(x))) for g, k, u, x in zip(case.group, known, case.used, turn, strict=True)
    ]
    own = [a if w else 0.0 for a, (_, _, w) in zip(standardise(keyed, 1, 1e-3), keyed, strict=True)]

    def value(b: int, t: int) -> float:
        later = [s for s, m in zip(case.segment[b], case.mask[b], strict=True) if m and s > 0]
        if not later:
            return both[b]
        if case.segment[b][t] > 0:
            return last[b]
        return last[b] + 0.7 * own[b] if form == "additive" else both[b]

    close(got.advantage, on_steps(case, value), 1e-5)
    assert torch.equal(got.loss_mask, mask & torch.tensor(case.used)[:, None])
    assert torch.equal(got.weight, got.loss_mask.float())


def test_mt_grpo_without_the_turn_term_is_grpo() -> None:
    rewards = torch.tensor([[3.0, 1], [0, 0.5], [1, 0]])
    group, mask, segment = torch.zeros(3, dtype=torch.int64), torch.ones(3, 3, dtype=torch.bool), TURNS[:1].expand(3, 3)
    plain = grpo(rewards[:, 1], group, ddof=1, eps=1e-4).over_steps(mask)
    out = mt_grpo(rewards, group, mask, segment, coef=0.0)
    assert torch.equal(out.advantage, plain.advantage) and torch.equal(out.live, plain.live)
    constant = rewards.clone()
    constant[:, 0] = 2.0
    assert torch.equal(mt_grpo(constant, group, mask, segment).advantage, plain.advantage)
    nothing = constant.clone()
    nothing[:, 0] = NAN
    assert torch.equal(mt_grpo(nothing, group, mask, segment).advantage, plain.advantage)


def test_mt_grpo_live_and_singletons() -> None:
    rewards = torch.tensor([[1.0, 1], [0, 1], [1, 1], [1, 1], [0.5, 0.5]])
    group = torch.tensor([0, 0, 1, 1, 2])
    mask, segment = torch.ones(5, 2, dtype=torch.bool), torch.tensor([[0, 1]]).expand(5, 2)
    out = mt_grpo(rewards, group, mask, segment)
    assert out.live.tolist() == [True, True, False, False, False]
    assert out.advantage[2:].abs().sum() == 0
    assert mt_grpo(rewards, group, mask, segment, coef=0.0).live.tolist() == [False] * 5
    raw = mt_grpo(rewards, group, mask, segment, singleton="raw", eps=0.0).advantage[4]
    close(raw, [1.0, 0.5])
    alone = mt_grpo(rewards, group, mask, torch.zeros_like(segment))
    assert alone.live.tolist() == [True, True, False, False, False]
    close(alone.advantage[:2], [[0.707, 0.707], [-0.707, -0.707]])


GAIN = torch.tensor([[0.0, 0.2, 0.6], [0.5, 0.5, 0.6]])


def test_a2tgpo_worked_numbers() -> None:
    out = a2tgpo(torch.tensor([1.0, 1.0]), PAIR, ALL, TURNS, GAIN)
    close(out.advantage, [[0.4243, 0.3, 0], [-0.4243, -0.3, 0]])
    assert out.clip_scale is not None and out.live.all()
    close(out.clip_scale, [[1.1386, 1.1386, 1], [0.8614, 0.8614, 1]])
    both = a2tgpo(torch.tensor([1.0, 0.0]), PAIR, ALL, TURNS, GAIN).advantage
    close(both, [[1.4243, 1.3, 1], [-1.4243, -1.3, -1]])


@pytest.mark.parametrize("seed", range(6))
def test_a2tgpo_against_a_plain_loop(seed: int) -> None:
    case = ragged(seed)
    trust = case.table(4, 0.1)
    rewards, group, mask, segment = case.tensors()
    got = a2tgpo(
        rewards, group, mask, segment, torch.tensor(trust), torch.tensor(case.valid), alpha=0.4, gamma=0.9,
        clip_width=0.2, ddof=1, eps=1e-3,
    )  # fmt: skip
    outcome = outcome_loop(case, 1, 1e-3)
    cells = [(b, k) for b in range(case.rows) for k in range(3)]
    gain = {(b, k): trust[b][k + 1] - trust[b][k] for b, k in cells}
    tool = {c: case.size(*c) > 0 and not math.isnan(gain[c]) for c in cells}
    keyed = [((case.group[b], k), gain[b, k] if tool[b, k] else 0.0, float(tool[b, k])) for b, k in cells]
    z = dict(zip(cells, standardise(keyed, 1, 1e-3), strict=True))

    def value(b: int, t: int) -> float:
        k = case.segment[b][t]
        if not tool.get((b, k), False):
            return outcome[b]
        ahead = [j for j in range(k, 3) if tool[b, j]]
        return outcome[b] + 0.4 * sum(0.9**i * z[b, j] for i, j in enumerate(ahead)) / math.sqrt(len(ahead))

    def scale(b: int, t: int) -> float:
        c = (b, case.segment[b][t])
        return 1 + 0.2 * (2 / (1 + math.exp(-z[c])) - 1) if tool.get(c, False) else 1.0

    close(got.advantage, on_steps(case, value), 1e-5)
    assert got.clip_scale is not None
    close(got.clip_scale, on_steps(case, scale), 1e-5)


def test_a2tgpo_without_the_gain_is_grpo() -> None:
    rewards = torch.tensor([1.0, 0.0])
    out = a2tgpo(rewards, PAIR, ALL, TURNS, GAIN, alpha=0.0, clip_width=0.0)
    assert torch.equal(out.advantage, grpo(rewards, PAIR, eps=1e-6).over_steps(ALL).advantage)
    assert out.clip_scale is not None and bool((out.clip_scale == 1).all())
    flat = a2tgpo(rewards, PAIR, ALL, TURNS, GAIN[:1].expand(2, 3))
    assert flat.clip_scale is not None and bool((flat.clip_scale == 1).all())
    assert not a2tgpo(torch.ones(2), PAIR, ALL, TURNS, GAIN[:1].expand(2, 3)).live.any()


def test_a2tgpo_rescale_keeps_the_variance() -> None:
    """With many rows the normalised gains are independent with variance 1; every D_k must then have variance 1."""
    rows, turns = 8_000, 4
    draw = torch.Generator().manual_seed(0)
    confidence = torch.randn(rows, turns, generator=draw).cumsum(1)
    confidence = torch.cat([torch.zeros(rows, 1), confidence], dim=1)
    segment = torch.arange(turns).expand(rows, turns)
    out = a2tgpo(
        torch.ones(rows), torch.zeros(rows, dtype=torch.int64), torch.ones_like(segment, dtype=torch.bool), segment,
        confidence, alpha=1.0,
    )  # fmt: skip
    close(out.advantage.var(dim=0), [1.0] * turns, 0.05)


def test_capo_worked_numbers() -> None:
    votes = torch.zeros(1, 2, 4, dtype=torch.bool)
    votes[0, 0, 2] = votes[0, 1, 1] = True
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    out = capo_credit(torch.tensor([1.0, 0.0]), PAIR, mask, votes)
    close(out.advantage, [[0.866, 0.866, 0, 0.866], [-0.866, -1.7321, 0, 0]])
    assert out.live.all() and out.group_mean is not None
    close(out.group_mean, [0.5, 0.5])
    assert not capo_credit(torch.ones(2), PAIR, mask, torch.zeros_like(votes)).live.any()


@pytest.mark.parametrize("vote", ["all", "majority"])
@pytest.mark.parametrize("by_segment", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_capo_against_a_plain_loop(seed: int, by_segment: bool, vote: str) -> None:
    case = ragged(seed)
    rewards, group, mask, segment = case.tensors()
    columns = case.steps
    votes = torch.rand(4, case.rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.6
    got = capo_credit(
        rewards, group, mask, votes, segment if by_segment else None, torch.tensor(case.valid), vote=vote,
        outcome_weight=1.5, penalty=0.5, ddof=1, eps=1e-3,
    )  # fmt: skip

    def wrong(b: int, t: int) -> bool:
        if by_segment and case.segment[b][t] < 0:
            return False
        said = [bool(v[b, case.segment[b][t] if by_segment else t]) for v in votes]
        return all(said) if vote == "all" else sum(said) > 2

    at = [(b, t) for b in range(case.rows) for t in range(case.steps) if case.used[b] and case.mask[b][t]]
    keyed = [(case.group[b], 1.5 * case.rewards[b] - 0.5 * wrong(b, t), 1.0) for b, t in at]
    values = dict(zip(at, standardise(keyed, 1, 1e-3), strict=True))
    close(got.advantage, on_steps(case, lambda b, t: values[b, t]), 1e-5)
    assert torch.equal(got.loss_mask, mask & torch.tensor(case.used)[:, None])


def test_capo_without_wrong_votes_is_grpo() -> None:
    rewards, none = torch.tensor([1.0, 0.0]), torch.zeros(3, 2, 3, dtype=torch.bool)
    close(capo_credit(rewards, PAIR, ALL, none, eps=0.0).advantage, [[1.0] * 3, [-1.0] * 3], 1e-6)
    uneven = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    out = capo_credit(rewards, PAIR, uneven, ~none, penalty=0.0, eps=0.0).advantage  # mean 3/4 of 2, not 1/2 of 2
    close(out, [[0.5 / math.sqrt(0.75)] * 3, [-1.5 / math.sqrt(0.75), 0, 0]])


@pytest.mark.parametrize("scope", ["group", "group_turn", "group_steps", "batch", "batch_steps"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("seed", range(4))
def test_every_scope_against_a_plain_loop(seed: int, baseline: str, scope: str) -> None:
    case = ragged(seed)
    rewards, group, mask, segment = case.tensors()
    local = case.table(3, 0.15)
    outcome = grpo(rewards, group, torch.tensor(case.valid))
    norm = Norm(scope, baseline, divide=baseline == "mean", ddof=1, eps=1e-3)  # type: ignore[arg-type]
    got = combine(outcome, torch.tensor(local), 0.3, mask, group, read_segments(segment, mask), norm=norm)
    cells = [(b, k) for b in range(case.rows) for k in range(3)]
    weight = {c: 0 if math.isnan(local[c[0]][c[1]]) else case.size(*c) for c in cells}
    name = {"group": lambda b, k: b, "group_turn": lambda b, k: (b, k), "group_steps": lambda b, k: b}
    keyed = [
        (
            name.get(scope, lambda b, k: 0)(case.group[b], k),
            local[b][k] if weight[b, k] else 0.0,
            float(weight[b, k] if scope.endswith("_steps") else weight[b, k] > 0),
        )
        for b, k in cells
    ]
    out = standardise(keyed, 1, 1e-3)
    if baseline == "loo":
        size = [sum(w for k, _, w in keyed if k == key) for key, _, _ in keyed]
        plain = standardise(keyed, 1, 0.0, factor=0.0)
        out = [x * n / (n - 1) if n > 1 else 0.0 for x, n in zip(plain, size, strict=True)]
    term = {c: x if weight[c] else 0.0 for c, x in zip(cells, out, strict=True)}
    base = outcome_loop(case, 0, 1e-4)
    close(got.advantage, on_steps(case, lambda b, t: base[b] + 0.3 * term.get((b, case.segment[b][t]), 0.0)), 1e-5)
    for b in range(case.rows):
        mates = [c for c in cells if case.group[c[0]] == case.group[b]]
        assert bool(got.live[b]) == (bool(outcome.live[b]) or any(term[c] != 0 for c in mates))


@pytest.mark.parametrize("scope", ["batch", "batch_steps"])
def test_batch_scopes_agree_over_ranks(scope: str) -> None:
    case = ragged(5)
    _, group, mask, segment = case.tensors()
    local, kept = torch.tensor(case.table(3)), read_segments(segment, mask)
    count = torch.stack([(kept == k).sum(1) for k in range(3)], dim=1).double()
    norm = Norm(scope)  # type: ignore[arg-type]
    whole = normalise(local, count, Groups.of(group), norm)
    half = case.rows // 2
    parts = [(local[:half], count[:half], group[:half]), (local[half:], count[half:], group[half:])]
    known: list[Tensor] = []  # the sums over both ranks, found one after the other

    def asks(x: Tensor, c: Tensor, g: Tensor) -> list[Tensor]:
        own: list[Tensor] = []

        def reduce(v: Tensor) -> Tensor:
            own.append(v)
            return known[len(own) - 1] if len(own) <= len(known) else v

        normalise(x, c, Groups.of(g), norm, reduce=reduce)
        return own

    for number in range(3):
        known.append(asks(*parts[0])[number] + asks(*parts[1])[number])
    replay = iter(known)
    first = normalise(*parts[0][:2], Groups.of(parts[0][2]), norm, reduce=lambda v: next(replay))
    assert torch.allclose(first, whole[:half], atol=1e-12)
    grouped = Norm("group")
    assert torch.equal(
        normalise(local, count, Groups.of(group), grouped, reduce=lambda v: v * 0 + 7),
        normalise(local, count, Groups.of(group), grouped),
    )


def test_combine_takes_a_term_on_every_step() -> None:
    outcome = grpo(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0, 0, 1]), eps=0.0)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    local = torch.tensor([[1.0, NAN, 3.0], [0.5, 2.0, 9.0], [0.0, 0.0, 0.0]], requires_grad=True)
    group = torch.tensor([0, 0, 1])
    out = combine(outcome, local, 2.0, mask, group)
    assert out.advantage.tolist() == [[3.0, 1.0, 7.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]
    assert out.advantage.dtype == torch.float32 and out.live.tolist() == [True, True, False]
    zero = combine(outcome, local.detach(), 0.0, mask, group)
    plain = outcome.over_steps(mask)
    assert all(torch.equal(vars(zero)[k], vars(plain)[k]) for k in ("advantage", "weight", "loss_mask", "live"))
    weighted = combine(replace(outcome, weight=torch.tensor([0.5, 2.0, 1.0])), local.detach(), 1.0, mask, group)
    assert weighted.weight.tolist() == [[0.5] * 3, [2.0, 2.0, 0.0], [1.0] * 3]


def test_constant_pools_are_exactly_zero() -> None:
    local, count = torch.full((7, 3), 0.1, dtype=torch.float64), torch.ones(7, 3, dtype=torch.float64) * 3
    group = torch.zeros(7, dtype=torch.int64)
    for scope in ("group", "group_turn", "group_steps", "batch", "batch_steps"):
        assert bool((normalise(local, count, Groups.of(group), Norm(scope, eps=0.0)) == 0).all())  # type: ignore[arg-type]
    local[0, 0] += 1e-9  # a spread that is there counts
    assert normalise(local, count, Groups.of(group), Norm("group", eps=0.0)).abs().max() > 1


ARGUMENTS: dict[str, Any] = {
    "mt_grpo": {"rewards": torch.tensor([[1.0, 0], [0, 1]]), "segment": TURNS},
    "a2tgpo": {"rewards": torch.tensor([1.0, 0]), "segment": TURNS, "confidence": GAIN},
    "capo_credit": {"rewards": torch.tensor([1.0, 0]), "votes": torch.zeros(2, 2, 3, dtype=torch.bool)},
}
CALLS: dict[str, Any] = {"mt_grpo": mt_grpo, "a2tgpo": a2tgpo, "capo_credit": capo_credit}


def test_defaults_are_the_documented_ones() -> None:
    policies = {"ddof": 1, "eps": 1e-4, "singleton": "zero"}
    assert defaults(mt_grpo) == {"coef": 1.0, "form": "additive", "discount": 1.0, **policies}
    policies = {"ddof": 0, "eps": 1e-6, "singleton": "zero"}
    assert defaults(a2tgpo) == {"alpha": 0.3, "gamma": 1.0, "clip_width": 0.3, **policies}
    assert defaults(capo_credit) == {"outcome_weight": 2.0, "penalty": 1.0, "vote": "all", "ddof": 0, "eps": 1e-6}
    assert vars(Norm()) == {"scope": "group", "baseline": "mean", "divide": True, "ddof": 0, "eps": 1e-8}


@pytest.mark.parametrize("name", CALLS)
def test_half_precision_and_no_gradient(name: str) -> None:
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in ARGUMENTS[name].items()}
    half["rewards"].requires_grad_()
    out = CALLS[name](group=PAIR, mask=ALL, **half)
    assert out.advantage.dtype == out.weight.dtype == torch.float32 and not out.advantage.requires_grad
    assert out.live.all()


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        ("mt_grpo", {"rewards": torch.ones(2)}, r"rewards: expected \[B, R\]"),
        ("mt_grpo", {"rewards": torch.ones(2, 3)}, r"rewards: expected \[B, 2\].*\[2, 3\]"),
        ("mt_grpo", {"group": PAIR.int()}, "group: expected int64"),
        ("mt_grpo", {"mask": ALL[:1]}, "mask: expected bool"),
        ("mt_grpo", {"mask": ALL.float()}, "mask: expected bool"),
        ("mt_grpo", {"segment": TURNS.int()}, "segment: expected int64"),
        ("mt_grpo", {"segment": TURNS[:, :2]}, "segment: expected int64"),
        ("mt_grpo", {"segment": TURNS + 1}, r"segment: expected ids in -1 .. 2 .*1 .. 3"),
        ("mt_grpo", {"segment": TURNS - 2}, "segment: expected ids in -1"),
        ("mt_grpo", {"segment": TURNS.flip(1)}, "segment: .* never decrease.* row 0 does at step 1"),
        ("mt_grpo", {"segment": torch.tensor([[0, 1, 2], [0, 2, 1]])}, "row 1 does at step 2"),
        ("mt_grpo", {"coef": NAN}, "coef: expected a finite"),
        ("mt_grpo", {"discount": math.inf}, "discount: expected a finite"),
        ("mt_grpo", {"form": "cae"}, "form: expected one of additive, cumulative, got 'cae'"),
        ("mt_grpo", {"ddof": 2}, "ddof"),
        ("a2tgpo", {"confidence": GAIN[:1]}, r"confidence: expected real \[2, S\] with S >= 2"),
        ("a2tgpo", {"confidence": GAIN[:, :1]}, "confidence: expected real"),
        ("a2tgpo", {"confidence": GAIN[0]}, "confidence: expected real"),
        ("a2tgpo", {"confidence": GAIN.cfloat()}, "confidence: expected real"),
        ("a2tgpo", {"confidence": GAIN / 0}, "confidence: 3 values are infinite|confidence: . values are infinite"),
        ("a2tgpo", {"alpha": math.inf}, "alpha: expected a finite"),
        ("a2tgpo", {"gamma": -0.1}, "gamma: expected a finite number >= 0"),
        ("a2tgpo", {"clip_width": -1.0}, "clip_width: expected a finite number >= 0"),
        ("a2tgpo", {"mask": ALL[:1]}, "mask: expected bool"),
        ("a2tgpo", {"rewards": torch.full((2,), NAN)}, "rewards: every valid sample is NaN"),
        ("capo_credit", {"votes": torch.zeros(2, 2, 3)}, r"votes: expected bool \[N, 2, 3\]"),
        ("capo_credit", {"votes": torch.zeros(2, 3, dtype=torch.bool)}, "votes: expected bool"),
        ("capo_credit", {"votes": torch.zeros(0, 2, 3, dtype=torch.bool)}, "votes: expected bool"),
        ("capo_credit", {"votes": torch.zeros(1, 2, 2, dtype=torch.bool)}, "votes: expected bool"),
        ("capo_credit", {"votes": torch.zeros(1, 1, 3, dtype=torch.bool), "segment": TURNS}, r"\[N, 2, S\]"),
        ("capo_credit", {"votes": torch.zeros(1, 2, 2, dtype=torch.bool), "segment": TURNS}, "segment: .* -1 .. 1 "),
        ("capo_credit", {"vote": "most"}, "vote: expected one of all, majority"),
        ("capo_credit", {"penalty": -1.0}, "penalty: expected a finite number >= 0"),
        ("capo_credit", {"outcome_weight": -1.0}, "outcome_weight: expected a finite number >= 0"),
        ("capo_credit", {"mask": ALL[:1]}, "mask: expected bool"),
    ],
)
def test_bad_input(name: str, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CALLS[name](**{"group": PAIR, "mask": ALL, **ARGUMENTS[name], **changed})


@pytest.mark.parametrize(
    ("options", "told"),
    [({"scope": "row"}, "scope"), ({"baseline": "max"}, "baseline"), ({"ddof": 3}, "ddof"), ({"eps": -1.0}, "eps")],
)
def test_bad_norm(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Norm(**options)


def test_what_is_masked_is_not_looked_at() -> None:
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()
    junk = torch.tensor([[0, 99, 1], [0, 1, -7]])
    assert read_segments(junk, mask).tolist() == [[0, -1, 1], [0, 1, -1]]
