"""RubricEM, BRPO, GRPO-VPS, full-rollout credit and Graph-GRPO: worked numbers, plain loops, identities, bad input."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from flowrl.advantage.estimators import dr_grpo, grpo
from flowrl.advantage.record import Advantage
from flowrl.advantage.stages import brpo, full_rollout, graph_grpo, grpo_vps, rubricem, vps_cuts

NAN = math.nan
PAIR = torch.tensor([5, 5])
FOUR = torch.arange(4).expand(2, 4)
RUBRIC = torch.tensor([[0.2, 0.4, 0.6, 1.0], [0.6, 0.4, 0.2, 0.0]])
FULL = torch.ones(2, 4, dtype=torch.bool)


def _case(seed: int, *parts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards [16, *parts] with NaN, ragged groups, segments with junk on masked steps, masks, valid rows."""
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.rand(16, *parts, generator=draw, dtype=torch.float64)
    rewards[torch.rand(16, *parts, generator=draw) < 0.25] = NAN
    rewards[15] = NAN
    group = torch.randint(0, 4, (16,), generator=draw) * 3_000_000_000 - 1
    mask = torch.rand(16, 6, generator=draw) < 0.8
    segment = torch.randint(-1, parts[0] if parts else 3, (16, 6), generator=draw).sort(dim=1).values
    return rewards, group, torch.where(mask, segment, 999), mask, torch.rand(16, generator=draw) < 0.9


def _compare(out: Advantage, per_segment: Any, segment: torch.Tensor, mask: torch.Tensor) -> None:
    """Compare advantage and loss mask with values by (row, segment); None: nothing there."""
    got, where, inside = out.advantage.tolist(), segment.tolist(), (mask & (segment >= 0)).tolist()
    for b in range(len(got)):
        for t in range(len(got[b])):
            expected = per_segment(b, where[b][t]) if inside[b][t] else None
            assert got[b][t] == pytest.approx(0.0 if expected is None else expected, abs=1e-4)
            assert bool(out.loss_mask[b, t]) == (expected is not None) == bool(out.weight[b, t])


def _mates(group: torch.Tensor, b: int) -> list[int]:
    ids = group.tolist()
    return [i for i in range(len(ids)) if ids[i] == ids[b]]


def test_rubricem_worked_numbers() -> None:
    for decay, row in ((0.0, [-1, 0, 1, 1]), (1.0, [1, 1, 1, 1]), (0.5, [-1, 1, 1, 1])):
        out = rubricem(RUBRIC, PAIR, FOUR, FULL, decay=decay, eps=0.0)
        assert out.advantage[0].tolist() == pytest.approx(row, abs=1e-4)
        assert out.advantage[1].tolist() == pytest.approx([-x for x in row], abs=1e-4) and out.live.all()
    unbiased = rubricem(RUBRIC, PAIR, FOUR, FULL, ddof=1, eps=0.0).advantage[0]  # decay .5 by default
    assert unbiased.tolist() == pytest.approx([x / math.sqrt(2) for x in (-1, 1, 1, 1)])
    wide = rubricem(RUBRIC, PAIR, FOUR, FULL, eps=0.0875).advantage
    assert wide[0, 0].item() == pytest.approx(-0.5)  # G [.675, .850]: deviation .0875


@pytest.mark.parametrize("singleton", ["zero", "raw"])
@pytest.mark.parametrize("seed", range(3))
def test_rubricem_against_a_loop(seed: int, singleton: Any) -> None:
    rewards, group, segment, mask, valid = _case(seed, 3)
    matrix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.8, -0.3], [0.0, 0.0, 2.0]])
    out = rubricem(rewards, group, segment, mask, valid, matrix, singleton=singleton)

    def total(b: int, j: int) -> float:
        used = [float(matrix[j, k] * rewards[b, k]) for k in range(3) if matrix[j, k] != 0 and valid[b]]
        used = [x for x in used if not math.isnan(x)]
        return math.fsum(used) if used else NAN

    totals = [[total(b, j) for j in range(3)] for b in range(16)]

    def expected(b: int, j: int) -> float | None:
        mates = [totals[i][j] for i in _mates(group, b) if not math.isnan(totals[i][j])]
        own = totals[b][j]
        if math.isnan(own):
            return None
        if len(mates) == 1:
            return own / (1 + 1e-4) if singleton == "raw" else 0.0
        return (own - statistics.fmean(mates)) / (statistics.pstdev(mates) + 1e-4)

    _compare(out, expected, segment, mask)
    for b in range(16):
        assert bool(out.live[b]) == any(expected(i, j) for i in _mates(group, b) for j in range(3))


def test_rubricem_special_matrices_are_grpo() -> None:
    rewards = torch.rand(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    stages, mask = FOUR[:1].expand(8, 4), FULL[:1].expand(8, 4)
    own = rubricem(rewards, group, stages, mask, decay=0.0).advantage
    later = rubricem(rewards, group, stages, mask, None, torch.ones(4, 4).triu()).advantage
    assert torch.allclose(later, rubricem(rewards, group, stages, mask, decay=1.0).advantage)
    terminal = (torch.arange(4) == 3).float().expand(4, 4)
    last = rubricem(rewards, group, stages, mask, None, terminal).advantage
    for j in range(4):
        assert torch.allclose(own[:, j], grpo(rewards[:, j], group).advantage, atol=1e-6)
        assert torch.allclose(later[:, j], grpo(rewards[:, j:].sum(1), group).advantage, atol=1e-6)
        assert torch.allclose(last[:, j], grpo(rewards[:, 3], group).advantage, atol=1e-6)


def test_rows_that_agree_are_exactly_zero() -> None:
    group = torch.tensor([0] * 7 + [1] * 2)
    same = torch.tensor([[0.1, 0.7, 0.3, 0.9]], dtype=torch.float64).repeat(9, 1)
    same[8] = 0.5
    stages, mask = FOUR[:1].expand(9, 4), FULL[:1].expand(9, 4)
    out = rubricem(same, group, stages, mask, decay=0.3, eps=0.0)
    assert not out.advantage[:7].any() and out.live.tolist() == [False] * 7 + [True] * 2
    assert out.advantage[7:].all() and out.loss_mask.all()
    tenth = same[:, :1, None].expand(9, 4, 2) * 0 + 0.1
    level = brpo(tenth, group, stages, mask, budgets="linear")
    assert not level.advantage.any() and not level.live.any() and level.loss_mask.all()
    assert not level.channels["summary"].any()
    lone = brpo(tenth[..., :1], group, stages, mask)
    assert not lone.advantage.any() and not lone.channels["summary"].any()
    chosen = torch.tensor([[True, False], [True, False], [False, True]] * 3)
    flat = graph_grpo(same[:1, 0].expand(9), group * 0, chosen, eps=0.0)
    assert not flat.advantage.any() and not flat.live.any() and torch.equal(flat.loss_mask, chosen)


def test_brpo_worked_numbers() -> None:
    two = brpo(torch.tensor([[0.0, 1.0], [0.0, 0.0]])[..., None], PAIR, FOUR[:, :2], FULL[:, :2])
    assert two.advantage.tolist() == pytest.approx(torch.tensor([[0.25, 0.375], [-0.25, -0.125]]), abs=1e-4)
    three = brpo(torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])[..., None], PAIR, FOUR[:, :3], FULL[:, :3])
    assert three.advantage[0].tolist() == pytest.approx([0, 0.3333, 0.1296], abs=1e-4)
    assert three.advantage[1].tolist() == pytest.approx([0, -0.2222, -0.2778], abs=1e-4)
    assert torch.equal(three.channels["thinking"], three.advantage) and three.live.all()
    assert three.channels["summary"][..., 0].tolist() == [[-0.5, 0, 0.5], [0.5, 0, -0.5]]
    halves = torch.full((2,), 0.5)
    even = brpo(torch.tensor([[[0.0], [1.0]], [[0.0], [0.0]]]), PAIR, FOUR[:, :2], FULL[:, :2], None, halves)
    assert torch.equal(even.advantage, two.advantage)
    one = brpo(torch.tensor([[[1.0]], [[0.0]]]), PAIR, FOUR[:, :1], FULL[:, :1])
    assert one.advantage.tolist() == [[0.5], [-0.5]]


def test_brpo_with_one_budget_is_dr_grpo() -> None:
    rewards, group, segment, mask, valid = _case(3, 1)
    out = brpo(rewards[..., None], group, segment, mask, valid)
    expected = dr_grpo(rewards[:, 0], group, valid).over_steps(mask & (segment == 0))
    assert torch.allclose(out.advantage, expected.advantage, atol=1e-6)
    assert torch.equal(out.loss_mask, expected.loss_mask) and torch.equal(out.live, expected.live)
    assert torch.allclose(out.channels["summary"][:, 0, 0], dr_grpo(rewards[:, 0], group, valid).advantage, atol=1e-6)


def test_the_first_segment_has_the_group_for_baseline() -> None:
    rewards, group, _, _, _ = _case(4, 3)
    rewards = rewards.nan_to_num(nan=0.4)
    first = brpo(rewards[..., None], group, torch.zeros(16, 1).long(), torch.ones(16, 1).bool()).advantage[:, 0]
    assert torch.allclose(first, dr_grpo(rewards.mean(1), group).advantage, atol=1e-6)


@pytest.mark.parametrize(
    ("baseline", "budgets"),
    [("mixed", "uniform"), ("mixed", "linear"), ("history", "base"), ("group", "given"), ("none", "linear")],
)
@pytest.mark.parametrize("answers", [1, 3])
def test_brpo_against_a_loop(baseline: Any, budgets: Any, answers: int) -> None:
    rewards, group, segment, mask, valid = _case(answers, 4, answers)
    p = {"uniform": [0.25] * 4, "linear": [0.1, 0.2, 0.3, 0.4], "base": [0, 0, 0, 1.0], "given": [0.5, 0, 0.7, 0]}[
        budgets
    ]
    chosen: dict[str, Any] = {"budgets": "uniform" if budgets == "given" else budgets, "baseline": baseline}
    given = torch.tensor(p) if budgets == "given" else None
    out = brpo(rewards, group, segment, mask, valid, given, **chosen)
    score: list[list[float]] = []
    for b in range(16):
        known = [[float(x) for x in rewards[b, s] if not x.isnan() and valid[b]] for s in range(4)]
        score.append([statistics.fmean(k) if k else NAN for k in known])

    def reward(b: int, s: int) -> float:
        used = [p[j] * score[b][j] for j in range(s, 4) if not math.isnan(score[b][j]) and p[j] > 0]
        return math.fsum(used) if used else NAN

    rewarded = [[reward(b, s) for s in range(4)] for b in range(16)]

    def expected(b: int, s: int) -> float | None:
        if math.isnan(rewarded[b][s]):
            return None
        group_mean = statistics.fmean(r for r in (rewarded[i][s] for i in _mates(group, b)) if not math.isnan(r))
        earlier = [(2**j, score[b][j]) for j in range(s) if not math.isnan(score[b][j])]
        past = sum(w * x for w, x in earlier) / sum(w for w, _ in earlier) * sum(p[s:]) if earlier else 0.0
        share = s / 4 if earlier else 0.0
        mixed = share * past + (1 - share) * group_mean
        return rewarded[b][s] - {"mixed": mixed, "history": past, "group": group_mean, "none": 0.0}[baseline]

    _compare(out, expected, segment, mask)
    for b in range(16):
        assert bool(out.live[b]) == any(abs(expected(i, s) or 0) > 1e-9 for i in _mates(group, b) for s in range(4))
        for s in range(4):
            for q in range(answers):
                if rewards[b, s, q].isnan() or not valid[b]:
                    wanted = 0.0
                elif answers > 1:
                    wanted = float(rewards[b, s, q]) - score[b][s]
                else:
                    mates = [score[i][s] for i in _mates(group, b) if not math.isnan(score[i][s])]
                    wanted = score[b][s] - statistics.fmean(mates)
                assert float(out.channels["summary"][b, s, q]) == pytest.approx(wanted, abs=1e-6)


def test_grpo_vps_worked_numbers() -> None:
    confidence = torch.tensor([[0.1, 0.3, 0.2, 0.9], [0.5, 0.5, 0.5, 0.5]])
    out = grpo_vps(torch.tensor([1.0, 0.0]), PAIR, confidence, FOUR[:, :3], FULL[:, :3])
    assert out.advantage[0].tolist() == pytest.approx([0.74, 0.38, 1.34], abs=1e-4)
    assert out.advantage[1].tolist() == [-0.5] * 3 and out.group_mean is not None
    assert out.group_mean.tolist() == [0.5, 0.5] and out.live.all()
    assert out.group_std is not None and out.group_std.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("singleton", ["zero", "raw"])
@pytest.mark.parametrize("seed", range(3))
def test_grpo_vps_against_a_loop(seed: int, singleton: Any) -> None:
    rewards, group, segment, mask, valid = _case(seed)
    rewards[:4] = 0.5
    draw = torch.Generator().manual_seed(seed)
    confidence = torch.rand(16, 4, generator=draw)
    confidence[torch.rand(16, 4, generator=draw) < 0.2] = NAN
    out = grpo_vps(rewards, group, confidence, segment, mask, valid, alpha=0.7, singleton=singleton)

    def expected(b: int, s: int) -> float | None:
        mates = [float(rewards[i]) for i in _mates(group, b) if valid[i] and not rewards[i].isnan()]
        if not valid[b] or rewards[b].isnan():
            return None
        mean = 0.0 if len(mates) == 1 and singleton == "raw" else statistics.fmean(mates)
        rise = float(confidence[b, s + 1] - confidence[b, s])
        return float(rewards[b]) - mean + (0.0 if math.isnan(rise) else 0.7 * rise)

    _compare(out, expected, segment, mask)


def test_grpo_vps_telescopes_and_reduces_to_dr_grpo() -> None:
    rewards, group, _, _, _ = _case(5)
    rewards = rewards.nan_to_num(nan=0.2)
    confidence = torch.rand(16, 4, generator=torch.Generator().manual_seed(5))
    steps, mask = FOUR[:1, :3].expand(16, 3), torch.ones(16, 3, dtype=torch.bool)
    base = dr_grpo(rewards, group).over_steps(mask).advantage
    out = grpo_vps(rewards, group, confidence, steps, mask, alpha=2.0).advantage
    assert torch.allclose((out - base).sum(1), 2 * (confidence[:, 3] - confidence[:, 0]), atol=1e-5)
    assert torch.equal(grpo_vps(rewards, group, confidence, steps, mask, alpha=0.0).advantage, base)
    assert torch.equal(grpo_vps(rewards, group, confidence * 0 + 0.4, steps, mask).advantage, base)
    level, ids, inside = torch.full((4,), 0.3), torch.tensor([0, 0, 1, 1]), torch.zeros(4, 1).long()
    rising = torch.tensor([[0.1, 0.4], [0.2, 0.2], [0.3, 0.3], [0.5, 0.5]])
    lively = grpo_vps(level, ids, rising, inside, inside == 0)
    assert lively.live.tolist() == [True, True, False, False] and not lively.advantage[1:].any()
    assert not grpo_vps(level, ids, rising, inside - 1, inside == 0).live.any()


def test_vps_cuts() -> None:
    entropy = torch.tensor([[5.0, 1, 5, 1, 1, 5, 1, 5]])
    mask = torch.ones(1, 8, dtype=torch.bool)
    assert vps_cuts(entropy, mask, quantile=0.7, points=2).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert vps_cuts(entropy, mask, quantile=0.7, points=1).tolist() == [[0, 0, 1, 1, 1, 2, 2, 3]]
    assert vps_cuts(entropy, mask, quantile=0.7, points=3).tolist() == [[0] * 8]
    assert vps_cuts(entropy, mask, quantile=0.7).tolist() == [[0] * 8]
    assert vps_cuts(entropy, mask, quantile=0.0, points=3).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    rising = torch.arange(11.0)[None]  # its 80th percentile is 8: three uncertain steps
    assert vps_cuts(rising, rising >= 0, points=1).tolist() == [[0] * 9 + [1, 2]]
    assert vps_cuts(rising, rising >= 0, quantile=0.79, points=1).tolist() == [[0] * 9 + [1, 2]]
    assert vps_cuts(rising, rising >= 0, quantile=1.0, points=1).tolist() == [[0] * 11]
    assert vps_cuts(rising[:, :9], rising[:, :9] >= 0, quantile=0.0).tolist() == [[0] * 5 + [1] * 4]
    assert vps_cuts(entropy[:, :1], mask[:, :1]).tolist() == [[0]]
    holes = torch.tensor([[False, True, True, False, True, True, True, True], [False] * 8])
    high = torch.tensor([[99.0, 1, 5, 99, 1, 5, 1, 5]]).expand(2, 8)
    assert vps_cuts(high, holes, quantile=0.6, points=1).tolist() == [[-1, 0, 0, -1, 0, 1, 1, 2], [-1] * 8]


@pytest.mark.parametrize("singleton", ["zero", "raw"])
def test_full_rollout_is_grpo_on_the_steps_of_its_phases(singleton: Any) -> None:
    rewards, group, _, mask, valid = _case(6)
    options: dict[str, Any] = {"ddof": 1, "eps": 1e-2, "singleton": singleton}
    whole = full_rollout(rewards, group, mask, None, valid, **options)
    plain = grpo(rewards, group, valid, **options).over_steps(mask)
    assert torch.equal(whole.advantage, plain.advantage) and torch.equal(whole.loss_mask, plain.loss_mask)
    assert torch.equal(full_rollout(rewards, group, mask, mask | ~mask, valid, **options).advantage, whole.advantage)
    draft = torch.arange(6).expand(16, 6) < 4
    first, second = (full_rollout(rewards, group, mask, phase, valid, **options) for phase in (draft, ~draft))
    assert torch.equal(first.advantage + second.advantage, whole.advantage) and first.advantage.any()
    assert torch.equal(first.loss_mask, whole.loss_mask & draft)
    default = full_rollout(rewards, group, mask)
    assert torch.equal(default.advantage, grpo(rewards, group).over_steps(mask).advantage)


EDGES = torch.tensor([[True, True, False], [True, False, True], [False, True, False]])


def test_graph_grpo_worked_numbers() -> None:
    # Rows with rewards 1, 0, 1; choice 1 made by rows 1 and 2, choice 2 by rows 1 and 3, choice 3 by row 2.
    out = graph_grpo(torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3).long(), EDGES)
    high = 1.2247
    expected = torch.tensor([[0, high, 0], [0, 0, -high], [0, high, 0]])
    assert torch.allclose(out.advantage, expected, atol=1e-4) and torch.equal(out.loss_mask, EDGES)
    unbiased = graph_grpo(torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3).long(), EDGES, ddof=1).advantage
    assert torch.allclose(unbiased, torch.tensor([[0.0, 1, 0], [0, 0, -1], [0, 1, 0]]), atol=1e-4)
    wide = graph_grpo(torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3).long(), EDGES, eps=6**-0.5)
    assert float(wide.advantage[0, 1]) == pytest.approx(0.5 / (2 / 6**0.5))
    assert not graph_grpo(torch.tensor([1.0, 0.0]), PAIR, torch.ones(2, 1) > 0).live.any()
    two = graph_grpo(torch.tensor([1.0, 0.0]), PAIR, torch.eye(2) > 0, ddof=1, eps=0.0).advantage
    assert two.diagonal().tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])
    moved = graph_grpo(torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3).long(), EDGES[[1, 0, 2]])
    assert torch.equal(moved.advantage, out.advantage[[1, 0, 2]])


@pytest.mark.parametrize("seed", range(3))
def test_graph_grpo_against_a_loop(seed: int) -> None:
    rewards, group, _, choice, valid = _case(seed)
    out = graph_grpo(rewards, group, choice, valid, eps=1e-3)
    for b in range(16):
        mates = [i for i in _mates(group, b) if valid[i] and not rewards[i].isnan()]
        success = {}
        for e in range(6):
            with_e = [float(rewards[i]) for i in mates if choice[i, e]]
            if with_e:
                success[e] = statistics.fmean(with_e)
        for e in range(6):
            made = bool(choice[b, e]) and b in mates
            wanted = 0.0
            if made:
                wanted = success[e] - statistics.fmean(success.values())
                wanted /= statistics.pstdev(success.values()) + 1e-3
            assert float(out.advantage[b, e]) == pytest.approx(wanted, abs=1e-4)
            assert bool(out.loss_mask[b, e]) == made
        assert bool(out.live[b]) == (len(success) > 1 and statistics.pstdev(success.values()) > 1e-9)


RUBRICEM: dict[str, Any] = {"stage_reward": RUBRIC, "group": PAIR, "segment": FOUR, "mask": FULL}
BRPO: dict[str, Any] = {"answer_reward": RUBRIC[..., None], "group": PAIR, "segment": FOUR, "mask": FULL}
VPS: dict[str, Any] = {"rewards": RUBRIC[:, 0], "confidence": torch.rand(2, 5)}
VPS |= {name: RUBRICEM[name] for name in ("group", "segment", "mask")}
CUTS: dict[str, Any] = {"entropy": RUBRIC, "mask": FULL}
ROLLOUT: dict[str, Any] = {"rewards": RUBRIC[:, 0], "group": PAIR, "mask": FULL}
GRAPH: dict[str, Any] = {"rewards": RUBRIC[:, 0], "group": PAIR, "choice": FULL}


@pytest.mark.parametrize(
    ("call", "good", "change", "message"),
    [
        (rubricem, RUBRICEM, {"stage_reward": RUBRIC[0]}, r"stage_reward: expected real \[B, S\]"),
        (rubricem, RUBRICEM, {"stage_reward": RUBRIC[:0], "group": PAIR[:0]}, "stage_reward"),
        (rubricem, RUBRICEM, {"stage_reward": RUBRIC + 1j}, "stage_reward"),
        (rubricem, RUBRICEM, {"stage_reward": RUBRIC * NAN}, "stage_reward: every value"),
        (rubricem, RUBRICEM, {"stage_reward": RUBRIC / 0}, "stage_reward: infinite"),
        (rubricem, RUBRICEM, {"group": PAIR.int()}, "group"),
        (rubricem, RUBRICEM, {"valid": FULL}, "valid"),
        (rubricem, RUBRICEM, {"mask": FULL[:1]}, "mask"),
        (rubricem, RUBRICEM, {"segment": FOUR + 1}, "segment: .* got 1 .. 4"),
        (rubricem, RUBRICEM, {"stage_matrix": torch.eye(4) + torch.ones(3).diag(-1)}, "stage_matrix"),
        (rubricem, RUBRICEM, {"stage_matrix": torch.eye(3)}, "stage_matrix"),
        (rubricem, RUBRICEM, {"stage_matrix": torch.eye(4) / 0}, "stage_matrix"),
        (rubricem, RUBRICEM, {"decay": 1.01}, "decay"),
        (rubricem, RUBRICEM, {"decay": -0.01}, "decay"),
        (rubricem, RUBRICEM, {"eps": NAN}, "eps"),
        (brpo, BRPO, {"answer_reward": RUBRIC}, r"answer_reward: expected real \[B, S, Q\]"),
        (brpo, BRPO, {"mask": FULL[:1]}, "mask"),
        (brpo, BRPO, {"segment": FOUR + 1}, "segment"),
        (brpo, BRPO, {"budget_probability": torch.ones(3)}, "budget_probability"),
        (brpo, BRPO, {"budget_probability": torch.zeros(4)}, "budget_probability"),
        (brpo, BRPO, {"budget_probability": torch.tensor([1.0, 1.0, 1.0, -0.5])}, "budget_probability"),
        (brpo, BRPO, {"budget_probability": torch.tensor([1.0, 1.0, 1.0, math.inf])}, "budget_probability"),
        (brpo, BRPO, {"budgets": "last"}, "budgets"),
        (brpo, BRPO, {"baseline": "v1"}, "baseline"),
        (grpo_vps, VPS, {"confidence": torch.rand(2)}, "confidence"),
        (grpo_vps, VPS, {"confidence": torch.rand(3, 5)}, "confidence"),
        (grpo_vps, VPS, {"confidence": torch.rand(2, 1)}, "confidence"),
        (grpo_vps, VPS, {"confidence": torch.rand(2, 4)}, "segment"),
        (grpo_vps, VPS, {"confidence": torch.rand(2, 5) / 0}, "confidence: infinite"),
        (grpo_vps, VPS, {"mask": FULL[:1]}, "mask"),
        (grpo_vps, VPS, {"alpha": NAN}, "alpha"),
        (grpo_vps, VPS, {"singleton": "one"}, "singleton"),
        (vps_cuts, CUTS, {"quantile": 1.1}, "quantile"),
        (vps_cuts, CUTS, {"quantile": -0.1}, "quantile"),
        (vps_cuts, CUTS, {"points": 0}, "points"),
        (vps_cuts, CUTS, {"entropy": RUBRIC[:, :2]}, "entropy"),
        (full_rollout, ROLLOUT, {"phase_mask": FULL[:, :2]}, "phase_mask"),
        (full_rollout, ROLLOUT, {"mask": FULL.long()}, "mask"),
        (graph_grpo, GRAPH, {"choice": FULL[:, 0]}, "choice"),
        (graph_grpo, GRAPH, {"choice": FULL[:, :0]}, "choice"),
        (graph_grpo, GRAPH, {"choice": FULL.long()}, "choice"),
        (graph_grpo, GRAPH, {"choice": FULL[:1]}, "choice"),
        (graph_grpo, GRAPH, {"ddof": 2}, "ddof"),
    ],
)
def test_bad_input_is_named(call: Any, good: dict[str, Any], change: dict[str, Any], message: str) -> None:
    call(**good)
    with pytest.raises(ValueError, match=message):
        call(**{**good, **change})


def test_invalid_rows_may_hold_anything_and_nobody_may_be_valid() -> None:
    valid = torch.tensor([True, False])
    junk = torch.tensor([[1.0], [math.inf]])
    assert grpo_vps(RUBRIC[:, 0], PAIR, torch.rand(2, 5) / junk, FOUR, FULL, valid).loss_mask.tolist() == [
        [True] * 4,
        [False] * 4,
    ]
    assert not rubricem(RUBRIC * junk, PAIR, FOUR, FULL, valid).live.any()
    nobody = valid & ~valid
    assert not brpo(RUBRIC[..., None], PAIR, FOUR, FULL, nobody).loss_mask.any()
    assert not graph_grpo(RUBRIC[:, 0], PAIR, FULL, nobody).loss_mask.any()
