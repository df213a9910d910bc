"""GiGPO: worked numbers, a plain loop in both layouts, identities, bad input."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from flowrl.advantage.anchors import gigpo
from flowrl.advantage.estimators import dr_grpo, grpo
from flowrl.advantage.trees import spo_tree

NAN = math.nan
# Episode 1 earns 10 at its third turn, episode 2 nothing in two turns; the first two states are the same.
STEP_REWARD = torch.tensor([[0.0, 0.0, 10.0], [0.0, 0.0, 0.0]])
ANCHOR = torch.tensor([[0, 1, 2], [0, 1, 77]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
GROUP = torch.tensor([3, 3])
WORKED = torch.tensor([[9.5125, 9.75, 5.0], [-9.5125, -9.75, 0.0]])


def _whole(x: torch.Tensor) -> list[float]:
    return [float(v) for v in x.flatten()]


def test_gigpo_worked_numbers() -> None:
    out = gigpo(None, GROUP, ANCHOR, MASK, STEP_REWARD)
    assert _whole(out.advantage) == pytest.approx(_whole(WORKED), abs=1e-4)
    assert torch.equal(out.loss_mask, MASK) and torch.equal(out.weight, MASK.float()) and out.live.all()
    assert out.group_mean is not None and out.group_mean.tolist() == [5.0, 5.0]
    assert out.group_std is not None and out.group_std.tolist() == pytest.approx([50**0.5] * 2)
    terminal = gigpo(torch.tensor([10.0, 0.0]), GROUP, ANCHOR, MASK)
    assert torch.equal(terminal.advantage, out.advantage)
    normed = gigpo(None, GROUP, ANCHOR, MASK, STEP_REWARD, normalise="std").advantage
    half = math.sqrt(0.5)
    assert _whole(normed) == pytest.approx([2 * half, 2 * half, half, -2 * half, -2 * half, 0], abs=1e-4)
    wide = gigpo(None, GROUP, ANCHOR, MASK, STEP_REWARD, normalise="std", omega=0.0, eps=50**0.5).advantage
    assert float(wide[0, 0]) == pytest.approx(half / 2)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_row_for_each_turn_gives_the_same_numbers(shuffled: bool) -> None:
    where = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    trajectory, turn = (torch.tensor(x) for x in zip(*where, strict=True))
    token = torch.tensor(
        [[False, True, True], [True, True, False], [True, False, False], [True] * 3, [False, True, True]]
    )
    reward = torch.zeros(5, 3)
    reward[2, 0] = 10.0
    state = torch.tensor([[9, 0, 8], [1, 9, 9], [2, 9, 9], [0, 5, 6], [9, 1, 4]])
    order = torch.tensor([4, 2, 0, 1, 3]) if shuffled else torch.arange(5)
    rows = {"group": GROUP[trajectory], "anchor": state, "mask": token, "trajectory": trajectory * 50 - 9}
    rows = {name: x[order] for name, x in rows.items()}
    when = turn[order] * 4_000_000_000 if shuffled else None
    for given in ({"rewards": None, "step_reward": reward[order]}, {"rewards": 10.0 * (1 - trajectory[order])}):
        out = gigpo(**rows, **given, turn=when)  # type: ignore[arg-type]
        expected = torch.tensor([WORKED[i, t] for i, t in where])[order]
        assert torch.allclose(out.advantage, torch.where(token[order], expected[:, None], 0.0), atol=1e-4)
        assert out.group_mean is not None and out.group_mean.tolist() == [5.0] * 5


def _loop(
    episodes: list[dict[str, Any]], gamma: float, omega: float, std: bool, eps: float, raw: bool
) -> list[list[float]]:
    """Turn advantages of episodes {group, rewards: [..], anchors: [..], total}; NaN total: no value."""

    def centre(own: float, mates: list[float], raw: bool) -> float:
        if len(mates) == 1 and not raw:
            return 0.0
        mean = statistics.fmean(mates) if len(mates) > 1 else 0.0
        spread = statistics.stdev(mates) if len(mates) > 1 else 1.0
        return (own - mean) / (spread + eps) if std else own - mean

    live = [e for e in episodes if not math.isnan(e["total"])]
    for e in live:
        turns = range(len(e["rewards"]))
        e["to_go"] = [sum(gamma ** (k - t) * e["rewards"][k] for k in turns if k >= t) for t in turns]
    out = []
    for e in episodes:
        if e not in live:
            out.append([0.0] * len(e["rewards"]))
            continue
        mates = [m for m in live if m["group"] == e["group"]]
        outcome = centre(e["total"], [m["total"] for m in mates], raw)
        row = []
        for own, state in zip(e["to_go"], e["anchors"], strict=True):
            same = [g for m in mates for g, a in zip(m["to_go"], m["anchors"], strict=True) if a == state]
            row.append(outcome + omega * centre(own, same, False))
        out.append(row)
    return out


def _episodes(seed: int, terminal: bool) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(14):
        turns = int(torch.randint(1, 7, (1,), generator=draw))
        rewards = torch.rand(turns, generator=draw).double().tolist()
        total = 9.0 * float(torch.rand(1, generator=draw)) if i % 5 else NAN
        if terminal:
            rewards = [0.0] * (turns - 1) + [0.0 if math.isnan(total) else total]
        group = -4_000_000_000_000 if i == 13 else int(torch.randint(0, 3, (1,), generator=draw)) * 7
        anchors = (torch.randint(0, 4, (turns,), generator=draw) * 10**12).tolist()
        found.append({"group": group, "rewards": rewards, "anchors": anchors, "total": total})
    return found


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("normalise", ["mean", "std"])
@pytest.mark.parametrize("seed", range(3))
def test_gigpo_against_a_loop(seed: int, normalise: Any, terminal: bool) -> None:
    episodes = _episodes(seed, terminal)
    raw = seed % 2 == 0
    expected = _loop(episodes, 0.9, 0.7, normalise == "std", 1e-2, raw)
    options: dict[str, Any] = {"gamma": 0.9, "omega": 0.7, "normalise": normalise, "eps": 1e-2}
    options["singleton"] = "raw" if raw else "zero"
    draw = torch.Generator().manual_seed(seed)
    columns = [torch.randperm(9, generator=draw)[: len(e["rewards"])].sort().values for e in episodes]
    mask, reward = torch.zeros(14, 9, dtype=torch.bool), torch.full((14, 9), NAN, dtype=torch.float64)
    anchor = torch.randint(0, 4, (14, 9), generator=draw)
    for i, (e, where) in enumerate(zip(episodes, columns, strict=True)):
        mask[i, where] = True
        reward[i, where] = torch.tensor(e["rewards"], dtype=torch.float64)
        anchor[i, where] = torch.tensor(e["anchors"])
    total = torch.tensor([e["total"] for e in episodes], dtype=torch.float64)
    group = torch.tensor([e["group"] for e in episodes])
    out = gigpo(total, group, anchor, mask, None if terminal else reward, **options)
    for i, where in enumerate(columns):
        assert out.advantage[i, where].tolist() == pytest.approx(expected[i], abs=1e-5)
        assert not out.advantage[i, ~mask[i]].any() and torch.equal(out.loss_mask[i], mask[i] & ~total[i].isnan())
    # The other layout: a row for each turn, in any order, trajectory ids alike in different groups.
    turns = [(i, t) for i, e in enumerate(episodes) for t in range(len(e["rewards"]))]
    turns = [turns[k] for k in torch.randperm(len(turns), generator=draw)]
    row = torch.tensor([i for i, _ in turns])
    number = torch.tensor([sum(m["group"] == e["group"] for m in episodes[:i]) for i, e in enumerate(episodes)])
    flat = gigpo(
        total[row],
        group[row],
        torch.tensor([[episodes[i]["anchors"][t]] * 2 for i, t in turns]),
        torch.ones(len(turns), 2, dtype=torch.bool),
        None if terminal else torch.tensor([[0.0, episodes[i]["rewards"][t]] for i, t in turns], dtype=torch.float64),
        number[row],
        torch.tensor([t for _, t in turns]) - 3,
        **options,
    )
    assert flat.advantage[:, 1].tolist() == pytest.approx([expected[i][t] for i, t in turns], abs=1e-5)
    assert torch.equal(flat.advantage[:, 0], flat.advantage[:, 1])
    assert flat.group_mean is not None and out.group_mean is not None
    assert torch.allclose(flat.group_mean, out.group_mean[row], equal_nan=True)


def test_without_the_step_term_it_is_grpo() -> None:
    draw = torch.Generator().manual_seed(0)
    rewards, group = torch.rand(9, generator=draw), torch.tensor([0, 0, 0, 0, 4, 4, 4, 4, 8])
    anchor, mask = torch.randint(0, 3, (9, 4), generator=draw), torch.rand(9, 4, generator=draw) < 0.8
    mask[:, 0] = True
    for normalise, expected in (("mean", dr_grpo(rewards, group)), ("std", grpo(rewards, group, ddof=1, eps=1e-6))):
        wanted = expected.over_steps(mask).advantage
        options: dict[str, Any] = {"normalise": normalise, "singleton": "zero"}
        off = gigpo(rewards, group, anchor, mask, omega=0.0, **options)
        assert torch.allclose(off.advantage, wanted, atol=1e-6)
        assert off.live.tolist() == [True] * 8 + [False]
        alone = gigpo(rewards, group, torch.arange(36).view(9, 4), mask, **options)
        assert torch.allclose(alone.advantage, wanted, atol=1e-6)
    once = gigpo(rewards, group, anchor * 0, mask[:, :1].expand(9, 4) & (torch.arange(4) < 2), gamma=1.0).advantage
    assert torch.allclose(once[:8], 2 * dr_grpo(rewards, group).advantage[:8, None] * (torch.arange(4) < 2), atol=1e-6)
    assert once[8, 0] == rewards[8]  # a lone episode keeps its reward; its states are met twice, at equal returns


def test_gigpo_averages_to_the_edges_of_a_tree() -> None:
    leaves = torch.tensor([1.0, 0.0, 0.0, 0.0])
    node_path = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]])
    full, group = torch.ones(4, 2, dtype=torch.bool), node_path[:, 0]
    whole = gigpo(leaves, group, node_path, full, gamma=1.0, omega=1.0).advantage
    local = whole - gigpo(leaves, group, node_path, full, omega=0.0).advantage
    assert local[:, 0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    edges = spo_tree(leaves, node_path, torch.tensor([[0, 1]] * 4), full, drop_zero=False).advantage
    assert local[:, 0].view(2, 2).mean(1).tolist() == pytest.approx([0.25, -0.25]) == edges[::2, 0].tolist()
    assert torch.allclose(local[:, 1], edges[:, 1])  # at the last branch point a leaf's term is its own edge
    draw = torch.Generator().manual_seed(1)
    leaves = torch.rand(27, generator=draw)
    row = torch.arange(27)
    node_path = torch.stack([row * 0, row // 9, row // 3], dim=1)
    full, group = torch.ones(27, 3, dtype=torch.bool), node_path[:, 0]
    local = gigpo(leaves, group, node_path + torch.tensor([0, 100, 200]), full, gamma=1.0).advantage
    local = local - dr_grpo(leaves, group).advantage[:, None]
    edges = spo_tree(leaves, node_path, torch.arange(3).expand(27, 3), full).advantage
    for level, below in enumerate((9, 3, 1)):
        averaged = local[:, level].view(-1, below).mean(1)
        assert torch.allclose(averaged, edges[::below, level], atol=1e-6)


def test_equal_returns_are_zero_and_what_has_no_value_is_left_out() -> None:
    third = torch.full((3, 2), 0.1, dtype=torch.float64)
    out = gigpo(None, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2).long(), third > 0, third, gamma=0.0)
    assert not out.advantage.any() and not out.live.any() and out.loss_mask.all()
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    group = torch.tensor([0, 0, 0])
    idle = gigpo(None, group, torch.arange(6).view(3, 2), mask, mask * torch.tensor([[1.0], [5.0], [0.0]]))
    assert idle.group_mean is not None and idle.group_mean.tolist() == [3.5] * 3
    rows = gigpo(None, group, torch.zeros(3, 2).long(), mask, mask * 1.0, torch.tensor([0, 1, 2]))
    assert rows.group_mean is not None and rows.group_mean.tolist() == [1.5] * 3
    single = gigpo(torch.tensor([2.0, 3.0]), torch.tensor([0, 1]), torch.tensor([[0], [0]]), torch.tensor([[True]] * 2))
    assert single.advantage[:, 0].tolist() == [2.0, 3.0] and single.live.all()
    same = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    options: dict[str, Any] = {"normalise": "std", "eps": 0.0}
    flat = gigpo(same, group.repeat(2)[:5], torch.zeros(5, 1).long(), torch.ones(5, 1).bool(), **options)
    assert not flat.advantage.any() and not flat.live.any()
    # Returns that agree up to rounding: 0.1 + 0.2 and 0.3.
    near = torch.tensor([[0.1, 0.2], [0.3, 0.0]], dtype=torch.float64)
    almost = gigpo(None, group[:2], torch.tensor([[0, 1], [0, 2]]), near >= 0, near, gamma=1.0, **options)
    assert not almost.advantage.any() and not almost.live.any()


def test_two_rows_of_an_episode_cannot_share_a_turn() -> None:
    same, column = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1)
    with pytest.raises(ValueError, match="turn: two rows"):
        gigpo(None, same, column.long(), column == 0, column, same, torch.tensor([1, 0, 1]))


def test_half_precision_gives_float32_without_gradient() -> None:
    rewards = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True)
    out = gigpo(rewards, GROUP, ANCHOR, MASK)
    assert out.advantage.dtype == torch.float32 and not out.advantage.requires_grad


def test_what_is_masked_is_no_signal_and_a_turn_may_be_one_step() -> None:
    mask = torch.tensor([[True, False, False], [False, True, True]])
    equal = gigpo(torch.tensor([1.0, 1.0]), GROUP, torch.tensor([[0, 5, 5], [5, 1, 2]]), mask)
    assert not equal.live.any() and torch.equal(equal.loss_mask, mask)
    short = gigpo(torch.tensor([4.0, 0.0]), GROUP, torch.tensor([[0, 5, 5], [5, 0, 2]]), mask)
    assert short.advantage.tolist() == [[4, 0, 0], [0, -4, -2]]
    rows = gigpo(
        torch.tensor([4.0, 0.0]), GROUP, torch.tensor([[0], [0]]), mask[:, :1] | True, None, torch.tensor([1, 0])
    )
    assert rows.advantage.tolist() == [[4], [-4]]


ROWS = torch.tensor([0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": None}, "rewards, step_reward"),
        ({"rewards": torch.tensor([NAN, NAN])}, "rewards"),
        ({"rewards": torch.zeros(3)}, "group"),
        ({"group": GROUP.int()}, "group"),
        ({"group": GROUP[:1]}, "group"),
        ({"anchor": ANCHOR.float()}, "anchor"),
        ({"anchor": ANCHOR[:, :2]}, "anchor"),
        ({"mask": MASK.long()}, "mask"),
        ({"step_reward": torch.ones(2, 3)}, "step_reward: a reward on a masked step"),
        ({"trajectory": ROWS[:1]}, "trajectory"),
        ({"trajectory": ROWS}, "different returns"),
        ({"trajectory": ROWS, "turn": ROWS}, "turn: two rows"),
        ({"trajectory": ROWS, "turn": ROWS.float()}, "turn"),
        ({"gamma": 1.1}, "gamma"),
        ({"gamma": -0.1}, "gamma"),
        ({"omega": NAN}, "omega"),
        ({"normalise": "max"}, "normalise"),
        ({"eps": -1e-9}, "eps"),
        ({"singleton": "one"}, "singleton"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"rewards": torch.tensor([1.0, 0.0]), "group": GROUP, "anchor": ANCHOR, "mask": MASK}
    with pytest.raises(ValueError, match=message):
        gigpo(**{**good, **change})
