"""SPO-tree, SPO-chain and GRPO-MA: worked numbers, plain recursions and loops, identities, bad input."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from flowrl.advantage.estimators import dr_grpo, grpo
from flowrl.advantage.trees import grpo_ma, spo_chain, spo_cuts, spo_tree, tree_values

NAN = math.nan
LEAVES = torch.tensor([1.0, 0.0, 0.0, 0.0])
BRANCHES = torch.tensor([[7, 1], [7, 1], [7, 2], [7, 2]])
TWO = torch.tensor([[0, 1]] * 4)
ALL = torch.ones(4, 2, dtype=torch.bool)
UNEVEN = (torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([[0, 1], [0, 2], [0, 2], [0, 2]]))

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _case(seed: int, levels: int = 3, segments: int = 3) -> Case:
    """Trees of uneven shape, ids of any spacing that repeat under other parents, NaN, ragged masks, junk outside."""
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.rand(30, generator=draw, dtype=torch.float64)
    rewards[torch.rand(30, generator=draw) < 0.2] = NAN
    rewards[25:] = NAN
    node_path = torch.randint(0, 3, (30, levels), generator=draw) * 4_000_000_000_000 - 5
    node_path[25:] = 99
    mask = torch.rand(30, 6, generator=draw) < 0.8
    segment = torch.randint(-1, segments, (30, 6), generator=draw).sort(dim=1).values
    return rewards, node_path, torch.where(mask, segment, 1000), mask


def _node_value(prefix: tuple[int, ...], rewards: list[float], paths: list[list[int]]) -> float:
    """Mean of the children's values, None of them NaN; NaN for a node without a valued leaf."""
    below = [i for i, path in enumerate(paths) if tuple(path[: len(prefix)]) == prefix]
    if len(prefix) == len(paths[0]):
        values = [rewards[i] for i in below]
    else:
        children = {tuple(paths[i][: len(prefix) + 1]) for i in below}
        values = [_node_value(child, rewards, paths) for child in sorted(children)]
    values = [v for v in values if not math.isnan(v)]
    return statistics.fmean(values) if values else NAN


def _edges(rewards: list[float], paths: list[list[int]], row: int, mode: str) -> list[tuple[float, int]]:
    """(advantage, valued leaves below) of the edges on the way to a row."""
    out = []
    for level in range(1, len(paths[0]) + 1):
        parent = tuple(paths[row][:level])
        under = [i for i, path in enumerate(paths) if tuple(path[:level]) == parent]
        if level < len(paths[0]):
            own = tuple(paths[row][: level + 1])
            values = [_node_value(c, rewards, paths) for c in sorted({tuple(paths[i][: level + 1]) for i in under})]
            here = _node_value(own, rewards, paths)
            count = sum(tuple(p[: level + 1]) == own and not math.isnan(rewards[i]) for i, p in enumerate(paths))
        else:
            values, here, count = [rewards[i] for i in under], rewards[row], 1
        values = [v for v in values if not math.isnan(v)]
        gain = here - statistics.fmean(values)
        out.append((gain / (statistics.pstdev(values) + 1e-8) if mode == "grpo" else gain, count))
    return out


def test_tree_values_count_each_child_once() -> None:
    assert tree_values(*UNEVEN)[:, 0].tolist() == pytest.approx([2 / 3] * 4)
    assert tree_values(*UNEVEN)[:, 1].tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert tree_values(LEAVES.bfloat16(), BRANCHES).dtype == torch.float32


@pytest.mark.parametrize("seed", range(4))
def test_tree_values_against_a_recursion(seed: int) -> None:
    rewards, node_path, _, _ = _case(seed)
    paths = node_path.tolist()
    got = tree_values(rewards, node_path)
    for row, path in enumerate(paths):
        expected = [_node_value(tuple(path[: level + 1]), rewards.tolist(), paths) for level in range(3)]
        assert got[row].tolist() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_spo_tree_worked_numbers() -> None:
    out = spo_tree(LEAVES, BRANCHES, TWO, ALL)
    assert out.advantage.tolist() == pytest.approx(torch.tensor([[0.25, 0.5], [0.25, -0.5], [-0.25, 0], [-0.25, 0]]))
    assert out.weight.tolist() == [[0.5, 1.0], [0.5, 1.0], [0.5, 0.0], [0.5, 0.0]]
    assert out.loss_mask.tolist() == [[True, True], [True, True], [True, False], [True, False]]
    assert out.group_mean is not None and out.group_std is not None and out.live.all()
    assert out.group_mean.tolist() == [0.25] * 4 and out.group_std.tolist() == pytest.approx([math.sqrt(3) / 4] * 4)
    kept = spo_tree(LEAVES, BRANCHES, TWO, ALL, drop_zero=False)
    assert kept.loss_mask.all() and kept.weight[2:].tolist() == [[0.5, 1.0]] * 2
    normed = spo_tree(LEAVES, BRANCHES, TWO, ALL, mode="grpo").advantage
    assert normed.tolist() == pytest.approx(torch.tensor([[1.0, 1], [1, -1], [-1, 0], [-1, 0]]), abs=1e-4)
    wide = spo_tree(LEAVES, BRANCHES, TWO, ALL, mode="grpo", eps=0.25).advantage
    assert wide[0].tolist() == pytest.approx([0.5, 2 / 3])


@pytest.mark.parametrize("mode", ["rloo", "grpo"])
@pytest.mark.parametrize("seed", range(4))
def test_spo_tree_against_a_recursion(seed: int, mode: Any) -> None:
    rewards, node_path, segment, mask = _case(seed)
    out = spo_tree(rewards, node_path, segment, mask, mode=mode)
    for row in range(30):
        known = not bool(rewards[row].isnan())
        edges = _edges(rewards.tolist(), node_path.tolist(), row, mode) if known else []
        for t in range(6):
            level = int(segment[row, t])
            gain, leaves = edges[level] if known and bool(mask[row, t]) and level >= 0 else (0.0, 0)
            gain = 0.0 if abs(gain) < 1e-9 else gain
            assert float(out.advantage[row, t]) == pytest.approx(gain, abs=1e-5)
            assert float(out.weight[row, t]) == pytest.approx(1 / leaves if gain else 0.0)
            assert bool(out.loss_mask[row, t]) == (gain != 0)


@pytest.mark.parametrize("seed", range(3))
def test_spo_tree_identities(seed: int) -> None:
    rewards, node_path, _, _ = _case(seed)
    rewards = rewards.nan_to_num(nan=0.3)
    steps, full = torch.arange(3).expand(30, 3), torch.ones(30, 3, dtype=torch.bool)
    out = spo_tree(rewards, node_path, steps, full, drop_zero=False)
    values = tree_values(rewards, node_path)
    assert torch.allclose(out.advantage.sum(1), rewards.float() - values[:, 0], atol=1e-6)
    for level in range(3):  # sibling edges add up to 0, each once
        parents = torch.unique(node_path[:, : level + 1], dim=0, return_inverse=True)[1]
        total = torch.zeros(30).index_add_(0, parents, out.advantage[:, level] * out.weight[:, level])
        named = node_path[:, : level + 2] if level < 2 else torch.arange(30)[:, None]
        edge = torch.unique(named, dim=0, return_inverse=True)[1]
        count = torch.zeros(30).index_add_(0, edge, out.weight[:, level])
        assert torch.allclose(count[count > 0], torch.ones(1)) and torch.allclose(total, torch.zeros(1), atol=1e-6)
    flat = spo_tree(rewards, node_path[:, :1], steps[:, :1] * 0, full[:, :1])
    assert torch.allclose(flat.advantage[:, 0], dr_grpo(rewards, node_path[:, 0]).advantage, atol=1e-6)


def test_spo_tree_progress_adds_the_rise_of_best_of_k() -> None:
    out = spo_tree(LEAVES, BRANCHES, TWO, ALL, progress=5.0).advantage
    best = {v: 1 - (1 - v) ** 4 for v in (0.0, 0.25, 0.5, 1.0)}
    assert float(out[0, 0]) == pytest.approx(0.25 + 5 * (best[0.5] - best[0.25]))
    assert float(out[1, 1]) == pytest.approx(-0.5 + 5 * (best[0.0] - best[0.5]))
    assert out[2, 1] == 0
    two = spo_tree(LEAVES, BRANCHES, TWO, ALL, progress=1.0, best_of=2).advantage
    assert float(two[0, 0]) == pytest.approx(0.25 + (0.75 - 0.4375))
    far = spo_tree(LEAVES * 2, torch.tensor([[0], [0], [1], [1]]), TWO * 0, ALL, progress=1.0, best_of=1).advantage
    assert far[:, 0].tolist() == [2, -2, 0, 0]
    one = spo_tree(LEAVES, BRANCHES, TWO, ALL, progress=1.0, best_of=1).advantage
    assert torch.allclose(one, 2 * spo_tree(LEAVES, BRANCHES, TWO, ALL).advantage)


def test_means_that_differ_by_rounding_alone_are_equal() -> None:
    rewards = torch.tensor([0.1] * 5 + [0.1, 0.3, 0.2], dtype=torch.float64)
    node_path = torch.tensor([[0, 1]] * 3 + [[0, 2]] * 2 + [[1, 1]] * 2 + [[1, 2]])
    segment = torch.zeros(8, 1, dtype=torch.int64)
    out = spo_tree(rewards, node_path, segment, segment == 0, mode="grpo", eps=0.0, drop_zero=False)
    assert not out.advantage.any() and out.loss_mask.all()
    assert out.live.tolist() == [False] * 5 + [True] * 3
    assert not spo_tree(rewards, node_path, segment, segment == 0, progress=5.0).loss_mask.any()
    thoughts = grpo_ma(rewards, node_path, segment, segment == 0, eps=0.0).advantage
    answers = grpo_ma(rewards, node_path, segment + 1, segment == 0, eps=0.0).advantage
    assert not thoughts.any() and not answers[:5].any() and answers[5:7].all()
    tiny = spo_tree(rewards * 1e-9, node_path, segment + 1, segment == 0)
    assert tiny.advantage[5:, 0].tolist() == pytest.approx([-1e-10, 1e-10, 0])


def test_an_unsure_step_alone_is_trained() -> None:
    log_prob = torch.tensor([[0.5, 0.95], [0.95, 0.85], [0.95, 0.99], [0.1, 0.2]]).log()
    out = spo_tree(LEAVES, BRANCHES, TWO, ALL, log_prob, max_probability=0.9, drop_zero=False)
    assert out.loss_mask.tolist() == [[True, False], [False, True], [True, True], [True, True]]
    assert out.advantage[0].tolist() == [0.25, 0.0] and out.weight[0].tolist() == [0.5, 0.0]
    valid = torch.tensor([True, True, True, False])
    gone = spo_tree(LEAVES, BRANCHES, TWO, ALL, valid=valid)
    assert gone.weight[2].tolist() == [1.0, 0.0] and not gone.loss_mask[3].any()


def _chain() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_prob = torch.tensor([[0.5, 0.95, 0.8, 0.99, 0.6, 0.97]]).log()
    return log_prob, torch.tensor([[0.4, 0.6, 0.2, 1.0]]), torch.ones(1, 6, dtype=torch.bool)


def test_spo_chain_worked_numbers() -> None:
    log_prob, value, mask = _chain()
    for interval, columns, plain, unsure in (
        (1, [0, 1, 2, 3], [0.2, 0.2, -0.4, -0.4, 0.8, 0.8], [0.2, 0, -0.4, 0, 0.8, 0]),
        (2, [0, 2, 3], [-0.2, -0.2, -0.2, -0.2, 0.8, 0.8], [-0.2, 0, -0.2, 0, 0.8, 0]),
    ):
        segment = spo_cuts(log_prob, mask, interval=interval)
        out = spo_chain(value[:, columns], segment, mask, whiten=False)
        assert out.advantage[0].tolist() == pytest.approx(plain) and out.live.all() and out.loss_mask.all()
        few = spo_chain(value[:, columns], segment, mask, log_prob, max_probability=0.9, whiten=False)
        assert few.advantage[0].tolist() == pytest.approx(unsure)
        assert few.loss_mask[0].tolist() == [u != 0 for u in unsure] == few.weight[0].bool().tolist()


def test_spo_cuts() -> None:
    log_prob, _, mask = _chain()
    assert spo_cuts(log_prob, mask, interval=1).tolist() == [[0, 0, 1, 1, 2, 2]]
    assert spo_cuts(log_prob, mask, interval=2).tolist() == [[0, 0, 0, 0, 1, 1]]
    assert spo_cuts(log_prob, mask).tolist() == [[0] * 6]
    assert spo_cuts(log_prob, mask, interval=1, max_cuts=2).tolist() == [[0, 0, 1, 1, 1, 1]]
    assert spo_cuts(log_prob, mask, interval=2, max_cuts=1).tolist() == [[0] * 6]
    assert spo_cuts(log_prob, mask, interval=2, max_cuts=2).tolist() == [[0, 0, 0, 0, 1, 1]]
    assert spo_cuts(log_prob, mask, interval=1, max_probability=0.7).tolist() == [[0, 0, 0, 0, 1, 1]]
    holes = torch.tensor([[False, True, False, True, True, True], [False] * 6])
    assert spo_cuts(log_prob.expand(2, 6), holes, interval=1).tolist() == [[-1, 0, -1, 0, 1, 1], [-1] * 6]
    assert spo_cuts(torch.full((1, 7), -1.0), torch.ones(1, 7) > 0).tolist() == [[0] * 5 + [1] * 2]
    tie = torch.tensor([[-0.6, -0.5, -0.6]])
    assert spo_cuts(tie, tie < 0, interval=1, max_probability=math.exp(-0.5)).tolist() == [[0, 0, 1]]
    sure = torch.full((1, 6), -0.01)
    assert spo_cuts(sure, mask, interval=1).tolist() == [[0] * 6]
    assert spo_cuts(sure, mask, interval=4, max_probability=1.0).tolist() == [[0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("seed", range(4))
def test_spo_chain_against_a_loop(seed: int) -> None:
    _, _, segment, mask = _case(seed)
    draw = torch.Generator().manual_seed(seed)
    value, log_prob = torch.rand(30, 4, generator=draw), -torch.rand(30, 6, generator=draw)
    value[torch.rand(30, 4, generator=draw) < 0.2] = NAN
    value[:, 0].nan_to_num_(nan=0.7)
    value[3] = NAN
    valid = torch.rand(30, generator=draw) < 0.9
    out = spo_chain(value, segment, mask, log_prob, valid, max_probability=0.6, ddof=0, eps=1e-3)
    raw: dict[tuple[int, int], float] = {}
    for b in range(30):
        known = [t for t in range(6) if mask[b, t] and segment[b, t] >= 0 and valid[b]]
        known = [t for t in known if not math.isnan(value[b, segment[b, t]] + value[b, segment[b, t] + 1])]
        unsure = [t for t in range(6) if mask[b, t] and log_prob[b, t].exp() < 0.6]
        for t in known:
            if t in unsure or not unsure:
                raw[b, t] = float(value[b, segment[b, t] + 1] - value[b, segment[b, t]])
        assert bool(out.live[b]) == bool(known)
    mean, spread = statistics.fmean(raw.values()), statistics.pvariance(raw.values())
    for b in range(30):
        for t in range(6):
            assert bool(out.loss_mask[b, t]) == ((b, t) in raw)
            expected = (raw[b, t] - mean) / math.sqrt(spread + 1e-3) if (b, t) in raw else 0.0
            assert float(out.advantage[b, t]) == pytest.approx(expected, abs=1e-5)


def test_spo_chain_telescopes() -> None:
    draw = torch.Generator().manual_seed(3)
    value, mask = torch.randn(5, 4, generator=draw), torch.ones(5, 3, dtype=torch.bool)
    out = spo_chain(value, torch.arange(3).expand(5, 3), mask, whiten=False).advantage
    assert torch.allclose(out.sum(1), value[:, 3] - value[:, 0], atol=1e-6)
    one = spo_chain(value[:, [0, 3]], torch.zeros(5, 3, dtype=torch.int64), mask, whiten=False).advantage
    assert torch.allclose(one, (value[:, 3] - value[:, 0])[:, None].expand(5, 3), atol=1e-6)
    # GAE with lambda 0, gamma 1 on the chain of segments, the outcome a terminal reward: its one-step TD error.
    reward = torch.zeros(5, 3)
    reward[:, 2] = value[:, 3]
    following = torch.cat([value[:, 1:3], torch.zeros(5, 1)], dim=1)
    assert torch.allclose(out, reward + following - value[:, :3], atol=1e-6)


def test_spo_chain_defaults_whiten_with_an_unbiased_variance_over_ranks() -> None:
    value, mask = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 1, dtype=torch.bool)
    segment = torch.zeros(2, 1, dtype=torch.int64)
    assert spo_chain(value, segment, mask).advantage[:, 0].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    both = spo_chain(value, segment, mask, reduce=lambda x: 2 * x).advantage[:, 0]
    assert both.tolist() == pytest.approx([math.sqrt(0.75), -math.sqrt(0.75)])
    assert spo_chain(value, segment, mask).live.tolist() == [True, False]


def test_grpo_ma_worked_numbers() -> None:
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0])
    answer = [0.5774, 0.5774, 0.5774, -1.7321]
    out = grpo_ma(rewards, BRANCHES, TWO, ALL, eps=1e-9)
    assert out.advantage[:, 0].tolist() == pytest.approx([1, 1, -1, -1], abs=1e-4)
    assert out.advantage[:, 1].tolist() == pytest.approx(answer, abs=1e-4)
    assert out.weight.tolist() == [[0.25, 0.25]] * 4 and out.live.all()
    unbiased = grpo_ma(rewards, BRANCHES, TWO, ALL, ddof=1, eps=1e-9).advantage
    assert unbiased[:, 0].tolist() == pytest.approx([0.7071, 0.7071, -0.7071, -0.7071], abs=1e-4)
    assert unbiased[:, 1].tolist() == pytest.approx([0.5, 0.5, 0.5, -1.5], abs=1e-4)
    parent = grpo_ma(rewards, BRANCHES, TWO, ALL, answer_baseline="parent", eps=1e-9).advantage
    assert parent[:, 1].tolist() == pytest.approx([0, 0, 2 / math.sqrt(3), -2 / math.sqrt(3)], abs=1e-4)


@pytest.mark.parametrize("baseline", ["global", "parent"])
@pytest.mark.parametrize("seed", range(3))
def test_grpo_ma_against_a_loop(seed: int, baseline: Any) -> None:
    rewards, node_path, segment, mask = _case(seed)
    out = grpo_ma(rewards, node_path, segment, mask, answer_baseline=baseline)
    reward, paths = rewards.tolist(), node_path.tolist()
    for b in range(30):
        mates = [i for i in range(30) if paths[i][0] == paths[b][0] and not math.isnan(reward[i])]
        thoughts: dict[int, list[float]] = {}
        for i in mates:
            thoughts.setdefault(paths[i][1], []).append(reward[i])
        values = {key: statistics.fmean(r) for key, r in thoughts.items()}
        for t in range(6):
            if not mask[b, t] or segment[b, t] < 0 or math.isnan(reward[b]):
                expected, weight = 0.0, 0.0
            elif segment[b, t] == 0:
                own = values[paths[b][1]] - statistics.fmean(values.values())
                expected = own / (statistics.pstdev(values.values()) + 1e-4)
                weight = 1 / (len(values) * len(thoughts[paths[b][1]]))
            else:
                answers = [reward[i] for i in mates]
                base = statistics.fmean(answers) if baseline == "global" else values[paths[b][1]]
                expected = (reward[b] - base) / (statistics.pstdev(answers) + 1e-4)
                weight = 1 / len(mates)
            assert float(out.advantage[b, t]) == pytest.approx(expected, abs=1e-4)
            assert float(out.weight[b, t]) == pytest.approx(weight) and bool(out.loss_mask[b, t]) == (weight > 0)


def test_grpo_ma_with_one_answer_is_grpo() -> None:
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([0, 0, 0, 5, 5, 5, 5, 9])
    node_path = torch.stack([group, torch.arange(8)], dim=1)
    out = grpo_ma(rewards, node_path, TWO.repeat(2, 1), ALL.repeat(2, 1))
    expected = grpo(rewards, group).advantage
    assert torch.allclose(out.advantage, expected[:, None].expand(8, 2), atol=1e-6)
    assert out.live.tolist() == [True] * 7 + [False] and out.weight[7].tolist() == [1.0, 1.0]


TREE = {"rewards": LEAVES, "node_path": BRANCHES, "segment": TWO, "mask": ALL}
CHAIN = {"segment_value": torch.zeros(4, 3), "segment": TWO, "mask": ALL}
NO_START = torch.tensor([[0.0, 1.0, 1.0], [NAN, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
SURE = {"max_probability": 0.9}


@pytest.mark.parametrize(
    ("call", "inputs", "change", "message"),
    [
        (spo_tree, TREE, {"mode": "loo"}, "mode"),
        (spo_tree, TREE, {"eps": -1.0}, "eps"),
        (spo_tree, TREE, {"progress": NAN}, "progress"),
        (spo_tree, TREE, {"best_of": 0}, "best_of"),
        (spo_tree, TREE, {"node_path": BRANCHES.int()}, "node_path"),
        (spo_tree, TREE, {"node_path": BRANCHES[:, 0]}, "node_path"),
        (spo_tree, TREE, {"node_path": BRANCHES[:3]}, "node_path"),
        (spo_tree, TREE, {"node_path": BRANCHES[:, :0]}, "node_path"),
        (spo_tree, TREE, {"node_path": BRANCHES[:, :1]}, r"segment: expected ids in -1 .. 0 .* got 0 .. 1"),
        (spo_tree, TREE, {"segment": TWO - 2}, "segment: .* got -2"),
        (spo_tree, TREE, {"segment": TWO.int()}, "segment"),
        (spo_tree, TREE, {"segment": TWO[:, :1]}, "segment"),
        (spo_tree, TREE, {"mask": ALL[:3]}, "mask"),
        (spo_tree, TREE, {"rewards": LEAVES * NAN}, "rewards"),
        (spo_tree, TREE, {"rewards": LEAVES[:, None]}, "rewards: expected"),
        (spo_tree, TREE, SURE, "old_log_prob: needed"),
        (spo_tree, TREE, {"old_log_prob": torch.ones(4, 2), **SURE}, "a density has no probability"),
        (spo_tree, TREE, {"max_probability": 0.0}, "max_probability: expected"),
        (spo_tree, TREE, {"max_probability": 1.1}, "max_probability: expected"),
        (spo_chain, CHAIN, {"segment_value": torch.zeros(4)}, "segment_value"),
        (spo_chain, CHAIN, {"segment_value": torch.zeros(4, 1)}, "segment_value"),
        (spo_chain, CHAIN, {"segment_value": torch.zeros(3, 3)}, "segment_value"),
        (spo_chain, CHAIN, {"segment_value": torch.zeros(4, 2)}, "segment: "),
        (spo_chain, CHAIN, {"segment_value": torch.full((4, 3), math.inf)}, "segment_value"),
        (spo_chain, CHAIN, {"segment_value": torch.full((4, 3), NAN)}, "segment_value: .* not all NaN"),
        (spo_chain, CHAIN, {"segment_value": NO_START}, "row 1 has no value at its start"),
        (spo_chain, CHAIN, {"valid": ALL}, "valid"),
        (spo_chain, CHAIN, {"mask": ALL.float()}, "mask"),
        (spo_chain, CHAIN, {"ddof": 2}, "ddof"),
        (spo_chain, CHAIN, SURE, "old_log_prob: needed"),
        (grpo_ma, TREE, {"answer_baseline": "root"}, "answer_baseline"),
        (grpo_ma, TREE, {"node_path": BRANCHES[:, :1]}, "node_path: .* L >= 2"),
        (grpo_ma, TREE, {"segment": TWO - 2}, "segment"),
        (grpo_ma, TREE, {"mask": ALL[:2]}, "mask"),
        (grpo_ma, TREE, {"ddof": 3}, "ddof"),
        (spo_cuts, {"old_log_prob": -torch.ones(4, 2), "mask": ALL}, {"interval": 0}, "interval"),
        (spo_cuts, {"old_log_prob": -torch.ones(4, 2), "mask": ALL}, {"max_cuts": 0}, "max_cuts"),
        (spo_cuts, {"old_log_prob": torch.ones(4, 2), "mask": ALL}, {}, "density"),
    ],
)
def test_bad_input_is_named(call: Any, inputs: dict[str, Any], change: dict[str, Any], message: str) -> None:
    call(**inputs) if call is not spo_cuts else None
    with pytest.raises(ValueError, match=message):
        call(**{**inputs, **change})


def test_a_row_without_values_may_lack_its_start_and_an_invalid_row_hold_anything() -> None:
    value = torch.tensor([[0.0, 1.0, 2.0], [NAN, NAN, NAN], [math.inf, 1.0, NAN], [NAN, 0.5, 2.0]])
    segment = torch.tensor([[0, 1], [0, 1], [0, 1], [-1, 1]])
    valid = torch.tensor([True, True, False, True])
    out = spo_chain(value, segment, ALL, valid=valid, whiten=False)
    assert out.advantage.tolist() == [[1, 1], [0, 0], [0, 0], [0, 1.5]]
    assert out.live.tolist() == [True, False, False, True]
    nobody = torch.zeros(4, dtype=torch.bool)
    assert not spo_chain(value, segment, ALL, valid=nobody).loss_mask.any()
