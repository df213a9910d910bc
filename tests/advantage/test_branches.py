"""Trees of rollouts and seed groups: worked numbers, plain recursions, identities, bad input."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.branches import branch_grpo, seed_grpo, tree_grpo, unique_transitions
from flowrl.advantage.estimators import grpo
from flowrl.advantage.trees import tree_values

NAN = math.nan
# One tree: rows 0 and 1 share two transitions, rows 2 and 3 none; all share the first. Row 3 parts at step 1 already.
NODE = torch.tensor([[5, 1, 1], [5, 1, 2], [5, 2, 3], [5, 3, 4]])
REWARD = torch.tensor([1.0, 0.0, 0.5, 0.0])
ONE = torch.zeros(4, dtype=torch.int64)
ALL = torch.ones(4, 3, dtype=torch.bool)
EVEN = torch.zeros(4, 3)


def _case(seed: int) -> dict[str, Tensor]:
    """Three groups of trees that repeat each other's ids; rows end early, masked steps hold junk, rewards are missing."""
    draw = torch.Generator().manual_seed(seed)
    rows, steps = 24, 5
    group = torch.tensor([3, -8, 9_000_000_000])[torch.randint(0, 3, (rows,), generator=draw)]
    node, path = torch.zeros(rows, steps, dtype=torch.int64), [(int(g),) for g in group]
    log_prob = torch.zeros(rows, steps, dtype=torch.float64)
    edges: dict[tuple[int, ...], float] = {}
    for t in range(steps):
        choice = torch.randint(0, 2, (rows,), generator=draw)
        path = [(*p, int(c)) for p, c in zip(path, choice, strict=True)]
        inside = [sorted({p for p in path if p[0] == int(g)}) for g in group]
        node[:, t] = torch.tensor([7 * paths.index(p) for paths, p in zip(inside, path, strict=True)])
        for b, p in enumerate(path):
            log_prob[b, t] = edges.setdefault(p, float(torch.randn(1, generator=draw)))
    length = torch.randint(2, steps + 1, (rows,), generator=draw)
    mask = torch.arange(steps) < length[:, None]
    mask[:, 1] = group != 3  # a hole: this group's second step is deterministic
    rewards = torch.rand(rows, generator=draw, dtype=torch.float64)
    rewards[torch.rand(rows, generator=draw) < 0.15] = NAN
    valid = torch.rand(rows, generator=draw) < 0.9
    node = torch.where(mask, node, torch.randint(-50, 50, (rows, steps), generator=draw))
    log_prob = torch.where(mask, log_prob, NAN)
    return {
        "rewards": rewards,
        "node": node,
        "group": group,
        "mask": mask,
        "valid": valid,
        "old_log_prob": log_prob,
    }


class _Tree:
    """A plain recursion over the nodes of a case: sets of rows by (group, step, id)."""

    def __init__(self, case: dict[str, Tensor], leaf: list[float]) -> None:
        self.leaf, self.mask, self.group = leaf, case["mask"].tolist(), case["group"].tolist()
        self.node, self.log_prob = case["node"].tolist(), case["old_log_prob"].tolist()

    def rows(self, b: int, t: int) -> list[int]:
        """Rows with a value that share row b's node at step t."""
        own = (self.group[b], self.node[b][t])
        return [
            i
            for i in range(len(self.leaf))
            if self.mask[i][t] and (self.group[i], self.node[i][t]) == own and not math.isnan(self.leaf[i])
        ]

    def mean(self, b: int, t: int) -> float:
        return statistics.fmean(self.leaf[i] for i in self.rows(b, t))

    def softmax(self, b: int, t: int, temperature: float) -> float:
        children: dict[tuple[int, ...], tuple[float, float]] = {}
        values, ended = [], False
        for i in self.rows(b, t):
            later = [u for u in range(t + 1, len(self.mask[i])) if self.mask[i][u]]
            ended = ended or not later
            values.append(self.softmax(i, later[0], temperature) if later else self.leaf[i])
            if later:
                children[tuple(self.rows(i, later[0]))] = (self.log_prob[i][later[0]] / temperature, values[-1])
        if ended:
            return statistics.fmean(values)
        total = sum(math.exp(edge) for edge, _ in children.values())
        return sum(math.exp(edge) * v for edge, v in children.values()) / total


def _known(case: dict[str, Tensor]) -> Tensor:
    return case["valid"] & ~case["rewards"].isnan()


def test_branch_grpo_worked_numbers() -> None:
    """V: .375 at the root; .5, .5, 0 at the second step; 1, 0, .5, 0 at the leaves."""
    result = branch_grpo(REWARD, NODE, ONE, ALL)
    second = [0.57735, 0.57735, 0.57735, -1.154701]
    third = [1.305582, -0.783349, 0.261116, -0.783349]
    assert result.advantage.T.tolist() == pytest.approx(torch.tensor([[0.0] * 4, second, third]), abs=1e-5)
    assert result.weight.T.tolist() == [[0.25] * 4, [0.5, 0.5, 1, 1], [1, 1, 1, 1]]
    assert result.loss_mask.all() and result.live.all() and result.group_mean is not None
    assert result.group_mean.tolist() == pytest.approx([0.375] * 4)
    leaves = branch_grpo(REWARD, NODE, ONE, ALL, over="leaves", ddof=0)  # mean .375, std sqrt(3 / 64)
    assert leaves.advantage[:, 1].tolist() == pytest.approx([0.57735, 0.57735, 0.57735, -1.732051], abs=1e-5)


def test_branch_grpo_weighs_children_by_their_log_probs() -> None:
    """Edges with odds 3 : 1 under the node of rows 0 and 1: V = .75."""
    log_prob = torch.zeros(4, 3)
    log_prob[0, 2] = math.log(3)
    given: dict[str, Any] = {"old_log_prob": log_prob, "node_value": "softmax", "ddof": 0}
    result = branch_grpo(REWARD, NODE, ONE, ALL, **given)
    wanted = torch.tensor([0.75, 0.75, 0.5, 0.0])
    mean, std = 1.25 / 3, statistics.pstdev([0.75, 0.5, 0.0])
    assert torch.allclose(result.advantage[:, 1], (wanted - mean) / std, atol=1e-5)
    cold = branch_grpo(REWARD, NODE, ONE, ALL, temperature=0.5, **given)  # odds 9 : 1
    std = statistics.pstdev([0.9, 0.5, 0.0])
    assert float(cold.advantage[0, 1]) == pytest.approx((0.9 - 1.4 / 3) / std, abs=1e-5)


def test_tree_grpo_worked_numbers() -> None:
    """Leaves +-1 and the like; odds 3 : 1 under rows 0 and 1, and 1 : 2 : 1 under the root."""
    log_prob = torch.zeros(4, 3)
    log_prob[0, 2], log_prob[2, 1] = math.log(3), math.log(2)
    result = tree_grpo(REWARD, NODE, ONE, ALL, log_prob, eps=0.0)
    leaf = (REWARD - 0.375) / REWARD.std(correction=0)
    second = torch.stack([0.75 * leaf[0] + 0.25 * leaf[1]] * 2 + [leaf[2], leaf[3]])
    root = 0.25 * second[0] + 0.5 * second[2] + 0.25 * second[3]
    assert torch.allclose(result.advantage.T, torch.stack([root.expand(4), second, leaf]), atol=1e-6)
    assert result.advantage[:, 2].tolist() == pytest.approx([1.507557, -0.904534, 0.301511, -0.904534], abs=1e-5)
    mild = tree_grpo(REWARD, NODE, ONE, ALL, log_prob, eps=0.0, temperature=1e6).advantage
    assert torch.allclose(mild[:, 1], torch.stack([(leaf[0] + leaf[1]) / 2] * 2 + [leaf[2], leaf[3]]), atol=1e-5)


@pytest.mark.parametrize("over", ["nodes", "leaves"])
@pytest.mark.parametrize("node_value", ["mean", "softmax"])
def test_branch_grpo_against_a_recursion(node_value: Any, over: Any) -> None:
    for seed in range(4):
        case = _case(seed)
        known, kept = _known(case), case["mask"] & _known(case)[:, None]
        tree = _Tree(case, torch.where(known, case["rewards"], NAN).tolist())
        result = branch_grpo(**case, node_value=node_value, over=over, temperature=0.7)
        assert torch.equal(result.loss_mask, kept)
        for b, t in kept.nonzero().tolist():
            mates = [i for i in range(24) if kept[i, t] and case["group"][i] == case["group"][b]]
            value = {i: tree.mean(i, t) if node_value == "mean" else tree.softmax(i, t, 0.7) for i in mates}
            counted = mates if over == "leaves" else [i for i in mates if tree.rows(i, t)[0] == i]
            values = [value[i] for i in counted]
            std = statistics.stdev(values) if len(values) > 1 else 0.0
            expected = 0.0 if std < 1e-6 else (value[b] - statistics.fmean(values)) / (std + 1e-8)
            assert float(result.advantage[b, t]) == pytest.approx(expected, abs=1e-5)
            assert float(result.weight[b, t]) == pytest.approx(1 / len(tree.rows(b, t)))


def test_tree_grpo_against_a_recursion() -> None:
    for seed in range(4):
        case = _case(seed)
        leaf = grpo(case["rewards"], case["group"], case["valid"])
        tree = _Tree(case, torch.where(_known(case), leaf.advantage.double(), NAN).tolist())
        result = tree_grpo(**case, temperature=1.3)
        for b, t in (case["mask"] & _known(case)[:, None]).nonzero().tolist():
            assert float(result.advantage[b, t]) == pytest.approx(tree.softmax(b, t, 1.3), abs=1e-5)
        assert torch.equal(result.live, leaf.live)


@pytest.mark.parametrize(("ddof", "eps"), [(0, 1e-4), (1, 1e-8)])
def test_rows_that_share_nothing_give_grpo(ddof: int, eps: float) -> None:
    case = _case(0) | {"node": torch.arange(24)[:, None].expand(24, 5) * 3}
    case["mask"] = torch.ones(24, 5, dtype=torch.bool)
    case["old_log_prob"] = torch.randn(24, 5, generator=torch.Generator().manual_seed(3))
    plain = grpo(case["rewards"], case["group"], case["valid"], ddof=ddof, eps=eps).over_steps(case["mask"])
    for result in (
        branch_grpo(**case, ddof=ddof, eps=eps),
        branch_grpo(**case, ddof=ddof, eps=eps, node_value="softmax"),
        branch_grpo(**case, ddof=ddof, eps=eps, over="leaves", shared="first"),
        tree_grpo(**case, ddof=ddof, eps=eps),
    ):
        assert torch.allclose(result.advantage, plain.advantage, atol=1e-6)
        assert torch.equal(result.loss_mask, plain.loss_mask) and torch.equal(result.weight, plain.weight)
        assert torch.equal(result.live, plain.live)
    assert torch.equal(unique_transitions(case["node"], case["mask"]), case["mask"])


@pytest.mark.parametrize("node_value", ["mean", "softmax"])
def test_advantages_of_a_depth_add_up_to_zero(node_value: Any) -> None:
    for seed in range(3):
        case = _case(seed)
        result = branch_grpo(**case, node_value=node_value, shared="first")
        for g in case["group"].unique():
            sums = result.advantage[case["group"] == g].sum(0)
            assert torch.allclose(sums, torch.zeros(5), atol=1e-5)
        assert torch.equal(result.weight, result.loss_mask.float())


def test_a_split_without_noise_gives_its_children_one_value() -> None:
    """Rows 0 and 1, and 2 and 3, came out alike: the split at the last step earns what the one before it does."""
    twin = torch.tensor([[1, 1, 1], [1, 1, 2], [1, 2, 3], [1, 2, 4]])
    result = branch_grpo(torch.tensor([0.7, 0.7, 0.2, 0.2]), twin, ONE, ALL, ddof=0)
    assert result.advantage.tolist() == pytest.approx(torch.tensor([[0.0, 1, 1]] * 2 + [[0.0, -1, -1]] * 2))
    same = branch_grpo(torch.full((4,), 0.1), twin, ONE, ALL, old_log_prob=EVEN + 0.3, node_value="softmax")
    assert not same.advantage.any() and not same.live.any()


def test_mean_values_of_balanced_trees_are_tree_values() -> None:
    reward = torch.rand(8, generator=torch.Generator().manual_seed(0))
    paths = torch.tensor([[0, a, 2 * a + b] for a in range(2) for b in range(2) for _ in range(2)])
    on = torch.ones(8, 3, dtype=torch.bool)
    values = tree_values(reward, paths)[:, 1:]
    values = values - values.mean(0)
    expected = values / torch.stack([values[::4, 0].std(), values[::2, 1].std()])
    result = branch_grpo(reward, paths, torch.zeros(8, dtype=torch.int64), on)
    assert torch.allclose(result.advantage[:, 1:], expected, atol=1e-5) and not result.advantage[:, 0].any()


def test_rounding_is_no_signal() -> None:
    """Eight, five and five units of the last place have a mean of six, but not in float64."""
    reward = torch.tensor([8, 5, 5, 6], dtype=torch.float64) * 2**-16 + 1e11
    node = torch.tensor([[1], [1], [1], [2]])
    assert float(reward[:3].sum() / 3) != float(reward[3])
    result = branch_grpo(reward, node, ONE, ALL[:, :1], eps=0.0)
    assert not result.advantage.any() and result.live.all()


def test_a_depth_of_almost_no_spread_is_silent() -> None:
    """Deviations .29 and .48 times 2.5e-6; the public code's threshold is 1e-6."""
    quiet = branch_grpo(REWARD * 2.5e-6, NODE, ONE, ALL)
    assert not quiet.advantage[:, :2].any() and quiet.advantage[:, 2].any()


def test_unique_transitions_trains_each_once() -> None:
    expected = [[True, True, True], [False, False, True], [False, True, True], [False, True, True]]
    assert unique_transitions(NODE, ALL).tolist() == expected
    for method in (branch_grpo, tree_grpo):
        result = method(REWARD, NODE, ONE, ALL, EVEN, shared="first")
        assert result.loss_mask.tolist() == expected and result.weight.tolist() == torch.tensor(expected).tolist()
        spread, full = method(REWARD, NODE, ONE, ALL, EVEN), method(REWARD, NODE, ONE, ALL, EVEN, shared="all")
        assert full.loss_mask.all() and full.weight.eq(1).all()
        once = (result.weight * result.advantage).sum(0)
        assert torch.allclose((spread.weight * spread.advantage).sum(0), once, atol=1e-6)
    two = torch.tensor([1, 1, 2, 2])
    assert unique_transitions(NODE, ALL, two)[:, 0].tolist() == [True, False, True, False]
    held = ALL.clone()
    held[0, 0] = held[2, 1] = False
    assert unique_transitions(NODE, held)[:, :2].tolist() == [
        [False, True],
        [True, False],
        [False, False],
        [False, True],
    ]


def test_a_row_without_a_reward_is_left_out_of_its_nodes() -> None:
    reward = torch.tensor([NAN, 0.0, 0.5, 1.0])
    result = branch_grpo(reward, NODE, ONE, ALL, ddof=0)
    assert not result.loss_mask[0].any() and not result.advantage[0].any()
    assert result.weight[1:, 0].tolist() == pytest.approx([1 / 3] * 3) and float(result.weight[1, 1]) == 1
    assert result.advantage[1:, 1].tolist() == pytest.approx([-1.224745, 0, 1.224745], abs=1e-5)


def test_seed_grpo_worked_numbers() -> None:
    result = seed_grpo(torch.tensor([1.0, 0.0, 0.9, 0.5]), ONE, torch.tensor([7, 7, 2, 2]), eps=0.0)
    assert result.advantage.tolist() == pytest.approx([1, -1, 1, -1])
    assert result.group_mean is not None and result.group_mean.tolist() == pytest.approx([0.5, 0.5, 0.7, 0.7])


def test_seed_grpo_against_a_loop() -> None:
    draw = torch.Generator().manual_seed(5)
    reward = torch.rand(30, generator=draw, dtype=torch.float64)
    group = torch.randint(-1, 2, (30,), generator=draw) * 4_000_000_000_000_000_000
    seed = torch.randint(0, 2, (30,), generator=draw) * 9_000_000_000_000_000_000 - 5
    result = seed_grpo(reward, group, seed, ddof=1, eps=0.1)
    for i in range(30):
        mates = [float(reward[j]) for j in range(30) if group[j] == group[i] and seed[j] == seed[i]]
        expected = (float(reward[i]) - statistics.fmean(mates)) / (statistics.stdev(mates) + 0.1)
        assert float(result.advantage[i]) == pytest.approx(expected, abs=1e-5)


def test_one_seed_a_group_is_grpo() -> None:
    case = _case(1)
    plain = grpo(case["rewards"], case["group"], case["valid"], singleton="raw")
    result = seed_grpo(case["rewards"], case["group"], case["group"] * 2 % 5, case["valid"], singleton="raw")
    assert torch.equal(result.advantage, plain.advantage) and torch.equal(result.live, plain.live)
    alone = seed_grpo(case["rewards"], case["group"], torch.arange(24), case["valid"])
    assert not alone.advantage.any() and not alone.live.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"node": NODE.int()}, "node"),
        ({"node": NODE[:, :2]}, "node"),
        ({"node": torch.tensor([[1, 1, 1], [2, 1, 2], [3, 2, 3], [4, 3, 4]])}, "node"),
        ({"mask": ALL[:3]}, "mask"),
        ({"group": ONE.float()}, "group"),
        ({"rewards": REWARD[:3]}, "group"),
        ({"old_log_prob": torch.full((4, 3), NAN)}, "old_log_prob"),
        ({"old_log_prob": None}, "old_log_prob"),
        ({"temperature": 0.0}, "temperature"),
        ({"node_value": "max"}, "node_value"),
        ({"over": "rows"}, "over"),
        ({"shared": "none"}, "shared"),
        ({"ddof": 2}, "ddof"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"rewards": REWARD, "node": NODE, "group": ONE, "mask": ALL, "old_log_prob": EVEN}
    with pytest.raises(ValueError, match=f"^{message}: "):
        branch_grpo(**{**given, "node_value": "softmax", **change})
    if message not in ("node_value", "over") and change != {"old_log_prob": None}:
        with pytest.raises(ValueError, match=f"^{message}: "):
            tree_grpo(**{**given, **change})


def test_rows_cannot_meet_again() -> None:
    with pytest.raises(ValueError, match="row 0 shares node 1 at step 1 with a row that it does not share step 0 with"):
        unique_transitions(torch.tensor([[1, 1], [2, 1]]), torch.ones(2, 2, dtype=torch.bool))
    apart = torch.tensor([4, 9])
    assert unique_transitions(torch.tensor([[1, 1], [2, 1]]), torch.ones(2, 2, dtype=torch.bool), apart).all()


def test_bad_input_of_seed_grpo() -> None:
    with pytest.raises(ValueError, match=r"^seed_group: "):
        seed_grpo(REWARD, ONE, ONE.float())
    with pytest.raises(ValueError, match=r"^rewards: "):
        seed_grpo(REWARD[:0], ONE[:0], ONE[:0])
