"""Conflicts on a Gram matrix against the same surgery on real vectors; worked numbers; memory; bad input."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.conflict import (
    METHODS,
    GCondState,
    advantage_gram,
    combine_channels,
    conflict_strengths,
    gcond_update,
    pcgrad,
    random_order,
)

ZERO_ANGLE = torch.tensor([[1.0, -1.0], [-1.0, 2.0]])
Vector = list[float]


def _same(left: Tensor, right: Tensor, atol: float = 1e-7) -> None:
    assert left.dtype == right.dtype and torch.allclose(left, right, rtol=1e-6, atol=atol)


def _dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _minus(a: Vector, factor: float, b: Vector) -> Vector:
    return [x - factor * y for x, y in zip(a, b, strict=True)]


def _vectors(seed: int, number: int, size: int = 7) -> list[Vector]:
    """Vectors that mostly oppose each other: random ones, less most of their mean."""
    rng = random.Random(seed)
    raw = [[rng.gauss(0, 1) * (i + 1) for _ in range(size)] for i in range(number)]
    mean = [math.fsum(column) / number for column in zip(*raw, strict=True)]
    return [_minus(v, rng.choice((0.8, 1.2, 1.6)), mean) for v in raw]


def _gram(vectors: list[Vector]) -> Tensor:
    g = torch.tensor(vectors, dtype=torch.float64)
    return g @ g.T


def _added(vectors: list[Vector], coefficients: Tensor) -> Vector:
    return (coefficients.double() @ torch.tensor(vectors, dtype=torch.float64)).tolist()


def _pair(cosine: float, first: float = 1.0, second: float = 1.0) -> Tensor:
    off = cosine * first * second
    return torch.tensor([[first**2, off], [off, second**2]], dtype=torch.float64)


def test_pcgrad_worked_number() -> None:
    coefficients = pcgrad(ZERO_ANGLE)
    assert coefficients.tolist() == pytest.approx([2, 1.5]) and coefficients.dtype == torch.float32
    assert _added([[1.0, 0.0], [-1.0, 1.0]], coefficients) == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize("seed", range(8))
def test_pcgrad_is_pcgrad_on_vectors(seed: int) -> None:
    channels = 2 + seed % 4
    vectors = _vectors(seed, channels)
    if seed == 5:
        vectors[1] = [0.0] * 7  # a reward without a gradient
    order = random_order(channels, torch.Generator().manual_seed(seed))
    total, conflicts = [0.0] * 7, 0
    for i in range(channels):
        present = list(vectors[i])
        for j in order[i].tolist():
            if j != i and _dot(present, vectors[j]) < 0:
                present = _minus(present, _dot(present, vectors[j]) / _dot(vectors[j], vectors[j]), vectors[j])
                conflicts += 1
        total = [a + b for a, b in zip(total, present, strict=True)]
    assert conflicts > 0
    assert _added(vectors, pcgrad(_gram(vectors), order)) == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_default_order_is_ascending_and_order_matters() -> None:
    gram = _gram(_vectors(2, 4))
    ascending = torch.arange(4).expand(4, 4)
    assert pcgrad(gram).equal(pcgrad(gram, ascending))
    assert not torch.allclose(pcgrad(gram), pcgrad(gram, ascending.flip(1)), atol=1e-3)


def test_random_order_is_permutations_of_a_seed() -> None:
    order = random_order(5, torch.Generator().manual_seed(0))
    assert order.sort(1).values.equal(torch.arange(5).expand(5, 5)) and len({tuple(r) for r in order.tolist()}) > 1
    assert order.equal(random_order(5, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "gram", [torch.diag(torch.tensor([1.0, 4.0, 0.0])), torch.ones(3, 3), torch.zeros(2, 2), torch.ones(1, 1)]
)
def test_no_conflict_gives_ones(gram: Tensor) -> None:
    assert pcgrad(gram).eq(1).all()
    after = gcond_update(gram, GCondState.start(len(gram)))
    assert after.coefficients.tolist() == pytest.approx([1] * len(gram))
    assert after.winners.tolist() == [-1, -1, -1]


def test_conflict_strengths_worked_numbers() -> None:
    table = {
        0.5: (0, 0),
        0.0: (0, 0),
        -0.25: (0.7071, 0.7071),
        -0.5: (1, 1),
        -0.65: (0.9239, 1),
        -0.8: (0, 1),
        -1.0: (0, 1),
    }
    for cosine, expected in table.items():
        assert conflict_strengths(cosine) == pytest.approx(expected, abs=1e-4)
    other = conflict_strengths(-0.45, critical=-0.9, main=-0.3, weak=0.1, power=1.0)
    assert other == pytest.approx((math.sin(math.pi / 2 * 1.25), 1.0))
    assert conflict_strengths(-0.1, critical=-0.9, main=-0.3, weak=0.1) == pytest.approx((math.sin(math.pi / 4),) * 2)
    assert conflict_strengths(0.1, weak=0.1) == (0.0, 0.0)
    assert conflict_strengths(-0.75, critical=-1.0, power=1.0) == pytest.approx((math.sin(math.pi * 0.75), 1.0))
    assert conflict_strengths(0.9, weak=1.0)[0] == pytest.approx(math.sin(math.pi / 2 * 0.1 / 1.5))


@pytest.mark.parametrize("norms", [(1.0, 1.0), (3.0, 0.2)])
def test_gcond_at_main_is_pcgrad_of_the_pair(norms: tuple[float, float]) -> None:
    gram = _pair(-0.5, *norms)
    for smooth in (True, False):  # in steps, -0.5 is still in the weak zone, where both are projected
        after = gcond_update(gram, GCondState.start(2), smooth=smooth)
        assert after.coefficients.tolist() == pytest.approx(pcgrad(gram).tolist(), rel=1e-5)


def test_critical_conflict_spares_the_winner() -> None:
    for winner in (0, 1):
        gram = _pair(-0.9, *((3.0, 1.0) if winner == 0 else (1.0, 3.0)))
        after = gcond_update(gram, GCondState.start(2))
        expected = [1 + 0.9 / 3, 1.0] if winner == 0 else [1.0, 1 + 0.9 / 3]
        assert after.coefficients.tolist() == pytest.approx(expected, rel=1e-5)
        assert after.winners.tolist() == [-1, -1, winner]
        dropped = gcond_update(gram, GCondState.start(2), smooth=False)
        assert dropped.coefficients.tolist() == ([1, 0] if winner == 0 else [0, 1])
        projected = gcond_update(
            _pair(-0.6, *((3.0, 1.0) if winner == 0 else (1.0, 3.0))), GCondState.start(2), smooth=False
        )
        assert projected.coefficients[winner] == pytest.approx(1.2) and projected.coefficients[1 - winner] == 1
        assert projected.winners.tolist() == [-1, -1, winner]
    at_critical = gcond_update(_pair(-0.8, 2.0), GCondState.start(2), smooth=False, critical=-0.8 - 1e-9)
    assert at_critical.coefficients.tolist() == pytest.approx([1.4, 1])  # not below critical: not dropped
    opposed = gcond_update(_pair(-1.0), GCondState.start(2))
    assert opposed.coefficients.tolist() == pytest.approx([2, 1])  # the loser vanished, and that is the end of it
    weak = gcond_update(_pair(-0.25), GCondState.start(2), smooth=False)
    assert weak.winners.tolist() == [-1, -1, -1] and weak.coefficients.tolist() == pytest.approx([1.25, 1.25])


def test_a_vanished_gradient_conflicts_with_nobody() -> None:
    """Beside one of norm 1e6, a norm of 0.1 is rounding, whatever its angle; one of 2 still counts."""
    assert gcond_update(_pair(-0.9, 1e6, 0.1), GCondState.start(2)).coefficients.tolist() == pytest.approx([1, 1])
    assert gcond_update(_pair(-0.9, 1e6, 2.0), GCondState.start(2)).coefficients.tolist() != [1, 1]


def test_winner_is_the_stabler_unless_strength_outweighs_it() -> None:
    gram, start = _pair(-0.9, 3.0, 1.0), GCondState.start(2)

    def winner(stability: list[float] | None, **options: Any) -> int:
        values = None if stability is None else torch.tensor(stability)
        return int(gcond_update(gram, start, values, **options).winners[-1])

    assert winner(None) == 0 and winner([0.0, 0.3]) == 1
    assert winner([-1.0, -0.2]) == 0  # a flipped gradient is as unstable as none
    # norms over their moving averages: 3 / 1.1 and 1 / 1, so N differs by (2.7273 - 1) / 3.7273 = 0.4634
    assert winner([0.0, 0.115]) == 0 and winner([0.0, 0.117]) == 1  # 0.2 x 0.4634 / 0.8 = 0.1159
    assert winner([0.0, 0.9], stability_share=0.0) == 0
    assert int(gcond_update(_pair(-0.9), start).winners[-1]) == 0  # a tie goes to the first
    # the moving average is of the norm before it is used: 0.05 x 3 + 0.95 = 1.1
    after = gcond_update(gram, start)
    assert after.norm_ema.tolist() == pytest.approx([1.1, 1.0])
    tame = replace(start, norm_ema=torch.tensor([30.0, 0.1], dtype=torch.float64))
    assert int(gcond_update(gram, tame, norm_decay=0.99).winners[-1]) == 1
    assert gcond_update(gram, start, norm_decay=0.0).norm_ema.tolist() == pytest.approx([3, 1])


def test_a_lasting_winner_must_lose() -> None:
    gram, state, winners = _pair(-0.9, 3.0, 1.0), GCondState.start(2, window=2), []
    for _ in range(7):
        state = gcond_update(gram, state, torch.tensor([0.5, 0.0]))
        winners.append(int(state.winners[-1]))
    assert winners == [0, 0, 1, 0, 0, 1, 0] and state.winners.tolist() == [1, 0]
    never = GCondState.start(2, window=0)
    for _ in range(4):
        never = gcond_update(gram, never, momentum=0.0)
        assert never.coefficients.tolist() == pytest.approx([1.3, 1]) and never.winners.shape == (0,)
    third = GCondState.start(3, window=1)
    third = replace(third, winners=torch.tensor([2]))
    wide = torch.eye(3, dtype=torch.float64)
    wide[:2, :2] = _pair(-0.9, 1.0, 1.0)
    assert gcond_update(wide, third).winners.tolist() == [0]  # the lasting winner is no party to this conflict
    second = replace(GCondState.start(2, window=1), winners=torch.tensor([1]))
    assert gcond_update(_pair(-0.9, 1.0, 3.0), second).winners.tolist() == [0]


def test_momentum_runs_over_coefficients() -> None:
    first = gcond_update(_pair(-0.5), GCondState.start(2))
    assert first.coefficients.tolist() == pytest.approx([1.5, 1.5])  # corrected for its start
    second = gcond_update(_pair(0.5), first)
    expected = (0.85 * 0.15 * 1.5 + 0.15 * 1.0) / (1 - 0.85**2)
    assert second.coefficients.tolist() == pytest.approx([expected] * 2)
    assert int(second.updates) == 2 and second.momentum.tolist() == pytest.approx([expected * (1 - 0.85**2)] * 2)
    assert gcond_update(_pair(0.5), first, momentum=0.0).coefficients.tolist() == [1, 1]


def _reference(vectors: list[Vector], stability: list[float], smooth: bool) -> tuple[Vector, list[int]]:
    """GCond on vectors, from a fresh state: the published rules, one scalar at a time."""
    g, history = [list(v) for v in vectors], []
    ema = [0.95 + 0.05 * math.sqrt(_dot(v, v)) for v in g]
    for _ in range(2 * len(g)):
        worst, pair = -1e-9, None
        for a in range(len(g)):
            for b in range(a + 1, len(g)):
                size = math.sqrt(_dot(g[a], g[a]) * _dot(g[b], g[b]))
                if size > 1e-9 and _dot(g[a], g[b]) / size < worst:
                    worst, pair = _dot(g[a], g[b]) / size, (a, b)
        if pair is None:
            break
        w, loser = pair
        if smooth or worst < -0.5:
            size_a, size_b = (math.sqrt(_dot(g[x], g[x])) / ema[x] for x in pair)
            score_a = 0.8 * max(0.0, stability[w]) + 0.2 * size_a / (size_a + size_b)
            score_b = 0.8 * max(0.0, stability[loser]) + 0.2 * size_b / (size_a + size_b)
            dominant = history[-1] if len(history) >= 3 and len(set(history[-3:])) == 1 else None
            if dominant == w or (dominant != loser and score_b > score_a):
                w, loser = loser, w
            history.append(w)
        if smooth:
            angle = -worst * math.pi if worst >= -0.5 else math.pi / 2 * (1 + min((-0.5 - worst) / 0.3, 1.0) ** 2)
            s_w, s_l = math.sin(angle), math.sin(min(angle, math.pi / 2))
        else:
            s_w, s_l = (1.0, 1.0) if worst >= -0.5 else (0.0, 1.0)
        inner, old_w, old_l = _dot(g[w], g[loser]), list(g[w]), list(g[loser])
        g[w] = _minus(old_w, s_w * inner / _dot(old_l, old_l), old_l)
        g[loser] = _minus(old_l, s_l * inner / _dot(old_w, old_w), old_w)
        if not smooth and worst < -0.8:
            g[loser] = [0.0] * len(old_l)
    return [math.fsum(column) for column in zip(*g, strict=True)], history


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_gcond_is_gcond_on_vectors(seed: int, smooth: bool) -> None:
    vectors = _vectors(seed, 2 + seed % 4, size=3 if seed % 2 else 7)
    stability = torch.rand(len(vectors), generator=torch.Generator().manual_seed(seed)) * 0.6 - 0.2
    expected, history = _reference(vectors, stability.tolist(), smooth)
    after = gcond_update(_gram(vectors), GCondState.start(len(vectors)), stability, smooth=smooth)
    assert _added(vectors, after.coefficients) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert after.winners.tolist() == [-1, -1, -1, *history][-3:]


def test_vectors_exercise_every_zone() -> None:
    """The comparison above would prove little on vectors that hardly conflict."""
    lengths = [len(_reference(_vectors(s, 2 + s % 4, 3 if s % 2 else 7), [0.0] * 5, True)[1]) for s in range(12)]
    assert max(lengths) >= 6 and sum(n > 0 for n in lengths) >= 8


def test_state_survives_a_round_trip() -> None:
    state = gcond_update(_pair(-0.9, 2.0), GCondState.start(2))
    again = GCondState.from_state_dict(state.state_dict())
    for left, right in ((gcond_update(_pair(-0.7), s) for s in (state, again)),):
        assert left.coefficients.equal(right.coefficients) and left.winners.equal(right.winners)
    fresh = GCondState.start(2)
    assert fresh.coefficients.tolist() == [1, 1] and int(fresh.updates) == 0 and fresh.winners.tolist() == [-1] * 3
    gcond_update(_pair(-0.9, 2.0), fresh)
    assert fresh.winners.tolist() == [-1] * 3 and fresh.norm_ema.tolist() == [1, 1]  # nothing changed in place


def test_advantage_gram_is_the_gram_matrix_of_orthogonal_scores() -> None:
    g = torch.Generator().manual_seed(0)
    advantage = torch.randn(5, 3, generator=g, dtype=torch.float64)
    scores = torch.eye(5, dtype=torch.float64)[[3, 0, 4, 1, 2]] * torch.tensor([1.0, -1, -1, 1, 1]).double()
    gradients = advantage.T @ scores / math.sqrt(5)
    _same(advantage_gram(advantage), gradients @ gradients.T)
    valid = torch.tensor([1, 1, 0, 1, 1]).bool()
    _same(advantage_gram(advantage, valid), advantage_gram(advantage[valid]))
    _same(advantage_gram(advantage, reduce=lambda x: 2 * x), advantage_gram(advantage))
    _same(advantage_gram(advantage[:1]), advantage[:1].T @ advantage[:1])
    advantage[2, 1] = float("nan")
    assert advantage_gram(advantage)[1, 1] == pytest.approx(float(advantage[[0, 1, 3, 4], 1].square().sum()) / 5)
    assert advantage_gram(advantage, ~torch.ones(5, dtype=torch.bool)).eq(0).all()


def test_combined_advantage_is_the_resolved_gradient() -> None:
    advantage = torch.tensor([[1.0, -1.0], [0.0, 1.0], [2.0, float("nan")]])
    coefficients = pcgrad(ZERO_ANGLE)
    combined = combine_channels(advantage, coefficients)
    assert combined.tolist() == pytest.approx([0.5, 1.5, 4.0]) and combined.dtype == torch.float32
    assert combine_channels(advantage[:, None], coefficients).tolist() == [[v] for v in combined.tolist()]


START = GCondState.start(2)
BAD: list[tuple[str, Any]] = [
    ("gram", lambda: pcgrad(torch.ones(2, 3))),
    ("gram", lambda: pcgrad(torch.ones(2))),
    ("gram", lambda: pcgrad(torch.ones(0, 0))),
    ("gram", lambda: pcgrad(torch.tensor([[1.0, 0.5], [0.4, 1.0]]))),
    ("gram", lambda: pcgrad(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))),
    ("gram", lambda: pcgrad(torch.tensor([[float("nan")]]))),
    ("gram", lambda: pcgrad(torch.tensor([[math.inf]]))),
    ("gram", lambda: pcgrad(torch.ones(2, 2, dtype=torch.complex64))),
    ("order", lambda: pcgrad(ZERO_ANGLE, torch.tensor([0, 1]))),
    ("order", lambda: pcgrad(ZERO_ANGLE, torch.tensor([[0, 1], [1, 1]]))),
    ("channels", lambda: GCondState.start(0)),
    ("window", lambda: GCondState.start(1, -1)),
    ("state", lambda: gcond_update(torch.ones(3, 3), START)),
    ("stability", lambda: gcond_update(ZERO_ANGLE, START, torch.ones(3))),
    ("stability", lambda: gcond_update(ZERO_ANGLE, START, torch.tensor([0.0, 1.1]))),
    ("stability", lambda: gcond_update(ZERO_ANGLE, START, torch.tensor([0.0, float("nan")]))),
    ("critical, main, weak", lambda: gcond_update(ZERO_ANGLE, START, critical=-0.5)),
    ("critical, main, weak", lambda: gcond_update(ZERO_ANGLE, START, main=0.0)),
    ("critical, main, weak", lambda: gcond_update(ZERO_ANGLE, START, power=0.0)),
    ("critical, main, weak", lambda: conflict_strengths(0.0, weak=1.1)),
    ("critical, main, weak", lambda: conflict_strengths(0.0, critical=-1.1)),
    ("stability_share", lambda: gcond_update(ZERO_ANGLE, START, stability_share=1.1)),
    ("stability_share", lambda: gcond_update(ZERO_ANGLE, START, stability_share=-0.1)),
    ("norm_decay", lambda: gcond_update(ZERO_ANGLE, START, norm_decay=1.0)),
    ("norm_decay", lambda: gcond_update(ZERO_ANGLE, START, norm_decay=-0.1)),
    ("momentum", lambda: gcond_update(ZERO_ANGLE, START, momentum=1.0)),
    ("momentum", lambda: gcond_update(ZERO_ANGLE, START, momentum=-0.1)),
    ("channel_advantage", lambda: advantage_gram(torch.ones(3))),
    ("channel_advantage", lambda: advantage_gram(torch.ones(0, 2))),
    ("channel_advantage", lambda: advantage_gram(torch.full((2, 2), math.inf))),
    ("valid", lambda: advantage_gram(torch.ones(3, 2), torch.ones(3))),
    ("coefficients", lambda: combine_channels(torch.ones(3, 2), torch.ones(3))),
    ("coefficients", lambda: combine_channels(torch.ones(3, 2), torch.ones(2, 1))),
]


@pytest.mark.parametrize(("named", "call"), BAD)
def test_bad_input_is_named(named: str, call: Any) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def test_entries_point_to_tests() -> None:
    assert [m.key for m in METHODS] == ["pcgrad", "gcond"]
    for m in METHODS:
        assert all(test.split("::")[1] in globals() for test in m.evidence.values())
