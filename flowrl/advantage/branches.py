"""Credit on trees of rollouts whose rows share transitions, and on groups that are split by their start.

``rewards``: float [B], one a row, NaN for none; ``node``: int64 [B, T], rows of a group with an equal id at a step share
that transition, and so all before it (ids need to differ only inside a group and a step); ``group``: int64 [B];
``mask``: bool [B, T]; ``valid``: bool [B]; ``old_log_prob``: float [B, T], sampling-time log-probabilities.

A node is a transition and the state behind it; its children are the nodes at the next unmasked step of its rows, its
leaves its rows with a reward. A row without a reward leaves every mean and is not trained. shared: how the rows of a
node share its loss; "weight": each has weight 1 / leaves, "first": only the first row is trained (as
``unique_transitions``: the update may leave the others out), "all": each counts fully, so a prefix weighs as its leaves do.
Both of the former train a transition once.

ddof: 0 divides a variance by n, 1 by n - 1; eps is added to a deviation. Values equal up to rounding (1e-12) give
exactly 0. live, group_mean, group_std: of the rewards of a group. Statistics are float64; results are float32 and carry
no gradient. Raises ValueError, naming the argument, for a wrong shape, dtype or range, and where rows share a node
after they have parted. Groups that hold several trees are compared across trees; pass each tree as its own group to
keep them apart.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, check_number
from .estimators import grpo
from .inputs import check_ids, check_mask, read_rewards, read_steps
from .method import Method
from .record import Advantage
from .scans import next_step
from .segments import Groups
from .statistics import GroupStatistics, Singleton, check_policies, divide, drop_rounding, group_statistics, step_result

Shared = Literal["weight", "first", "all"]
_MIN_STD = 1e-6


def _pair(a: Tensor, b: Tensor) -> Tensor:
    """Number the pairs of two int64 tensors of one shape from 0."""
    second = torch.unique(b, return_inverse=True)[1]
    joined = torch.unique(a, return_inverse=True)[1] * (second.max() + 1) + second
    found: Tensor = torch.unique(joined, return_inverse=True)[1]
    return found


def _nodes(node: Tensor, mask: Tensor, group: Tensor | None) -> Tensor:
    """Number nodes over all steps and groups: int64 [B, T]; masked steps hold numbers of their own."""
    check_mask(mask)
    check_ids("node", node, tuple(mask.shape))
    found = _pair(torch.where(mask, node, 0), mask.long())
    if group is not None:
        check_ids("group", group, tuple(mask.shape[:1]))
        found = _pair(found, group[:, None].expand_as(node))
    found = _pair(found, torch.arange(mask.shape[1], device=mask.device).expand_as(node))
    before, here = found[:, :-1], found[:, 1:]
    both = (mask[:, :-1] & mask[:, 1:]).flatten()
    if bool(both.any()):
        step = Groups.of(here.flatten(), both)
        parted = both & (step.max(before.flatten()) != step.min(before.flatten()))
        if bool(parted.any()):
            row, at = divmod(int(parted.nonzero()[0]), mask.shape[1] - 1)
            raise ValueError(
                f"node: row {row} shares node {int(node[row, at + 1])} at step {at + 1} with a row that it does not share "
                f"step {at} with; rows that have parted need nodes of their own"
            )
    return found


def _first(nodes: Tensor, kept: Tensor) -> Tensor:
    """The first row of ``kept`` in each node: bool [B, T]."""
    rows = torch.arange(len(nodes), device=nodes.device)[:, None].expand_as(nodes)
    least = Groups.of(nodes.flatten(), kept.flatten()).min(rows.flatten()).view_as(nodes)
    return kept & (rows == least)


def unique_transitions(node: Tensor, mask: Tensor, group: Tensor | None = None) -> Tensor:
    """Pick one row of each node, the first, so that a shared transition is trained once: bool [B, T].

    node: int64 [B, T]; mask: bool [B, T]; group: int64 [B], needed where groups use the same ids at a step. It is
    ``mask`` where no rows share a node.
    """
    return _first(_nodes(node, mask, group), mask)


def _means(value: Tensor, nodes: Tensor, kept: Tensor) -> Tensor:
    """Mean of the leaves of each node: float64 [B, T], NaN for none."""
    spread = value[:, None].expand(nodes.shape).flatten()
    return Groups.of(nodes.flatten(), kept.flatten()).mean(spread).view_as(nodes)


def _backed_up(value: Tensor, nodes: Tensor, kept: Tensor, log_prob: Tensor) -> Tensor:
    """Value of each node: the mean of its children's weighted by the softmax of their log-probs: float64 [B, T].

    A node at which some row ends takes the plain mean over its rows.
    """
    steps = kept.shape[1]
    following = next_step(kept)
    columns = [value] * steps
    for t in range(steps - 1, -1, -1):
        here, at = kept[:, t], following[:, t]
        goes, at = at < steps, at.clamp(max=steps - 1)[:, None]
        node = Groups.of(nodes[:, t], here)
        child = Groups.of(nodes.gather(1, at)[:, 0], here & goes)
        edge = log_prob.gather(1, at)[:, 0]
        softmax = (edge - node.max(torch.where(goes, edge, -torch.inf))).exp() / child.count().clamp(min=1)
        weight = torch.where(node.max((~goes).double()) > 0, 1.0, softmax)
        value = torch.where(here, node.sum(weight * value) / node.sum(weight), value)
        columns[t] = value
    return torch.stack(columns, dim=1)


def _weights(nodes: Tensor, kept: Tensor, shared: str) -> tuple[Tensor, Tensor]:
    """Weight and loss mask of the rows of each node, float64 and bool [B, T]."""
    if shared == "first":
        first = _first(nodes, kept)
        return first.double(), first
    if shared == "all":
        return kept.double(), kept
    leaves = Groups.of(nodes.flatten(), kept.flatten()).count().view_as(nodes)
    return 1.0 / leaves.clamp(min=1), kept


def _close(advantage: Tensor, nodes: Tensor, kept: Tensor, shared: str, s: GroupStatistics) -> Advantage:
    weight, trained = _weights(nodes, kept, shared)
    advantage = torch.where(s.live[:, None], advantage, 0.0)
    return step_result(advantage, trained, s.live, weight=weight, statistics=s)


def _per_depth(value: Tensor, nodes: Tensor, group: Tensor, kept: Tensor, over: str, ddof: int, eps: float) -> Tensor:
    """Standardise node values inside each (group, step): float64 [B, T]."""
    steps = torch.arange(kept.shape[1], device=kept.device).expand_as(nodes)
    depth = _pair(group[:, None].expand_as(nodes), steps).flatten()
    level = Groups.of(depth, (_first(nodes, kept) if over == "nodes" else kept).flatten())
    flat = value.flatten()
    centred = drop_rounding(flat - level.mean(flat), level.max(flat.abs()))
    std = level.std(flat, ddof)
    return torch.where(std < _MIN_STD, 0.0, divide(centred, std, eps)).view_as(value)


def branch_grpo(
    rewards: Tensor,
    node: Tensor,
    group: Tensor,
    mask: Tensor,
    old_log_prob: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    node_value: Literal["mean", "softmax"] = "mean",
    over: Literal["nodes", "leaves"] = "nodes",
    temperature: float = 1.0,
    ddof: int = 1,
    eps: float = 1e-8,
    shared: Shared = "weight",
) -> Advantage:
    """Give each node the value of what grows from it, standardised over the nodes of its depth.

    A(n) = (V(n) - mean V) / (std V + eps) over the nodes of the group at the same step, 0 where std V < 1e-6; every row
    takes at a step the advantage of its node. node_value: V(n) is the mean of the node's leaves ("mean"), or its
    children's V weighted by the softmax of their log_prob / temperature ("softmax", which needs old_log_prob; a node
    with a row that ends there takes the plain mean of its rows). over: statistics count each node once ("nodes", the
    public code: the nodes of a depth add up to 0), or once a leaf ("leaves").

    The softmax follows the scale of the log-prob: the public code has the mean over latent elements; with sums it picks
    one child, so raise the temperature. Rows that share nothing: ``grpo`` with the same ddof and eps, on every step. On a
    balanced tree "mean" is ``tree_values``. Source: BranchGRPO, 2509.06040; Fredreic1849/BranchGRPO, whose pruning of
    widths and depths is a matter of ``mask``.
    """
    check_policies(ddof, eps)
    check_number("temperature", temperature, 0.0, strict=True)
    check_choice("node_value", node_value, ("mean", "softmax"))
    check_choice("over", over, ("nodes", "leaves"))
    check_choice("shared", shared, ("weight", "first", "all"))
    value, known = read_rewards(rewards, group, valid)
    check_mask(mask, len(value))
    nodes = _nodes(node, mask, group)
    kept = mask & known[:, None]
    if node_value == "mean":
        states = _means(value, nodes, kept)
    elif old_log_prob is None:
        raise ValueError("old_log_prob: needed for node_value 'softmax', got None")
    else:
        log_prob = read_steps("old_log_prob", old_log_prob, mask, torch.float64)
        states = _backed_up(value, nodes, kept, log_prob / temperature)
    advantage = _per_depth(states, nodes, group, kept, over, ddof, eps)
    return _close(advantage, nodes, kept, shared, group_statistics(value, group, known, ddof, "zero"))


def tree_grpo(
    rewards: Tensor,
    node: Tensor,
    group: Tensor,
    mask: Tensor,
    old_log_prob: Tensor,
    valid: Tensor | None = None,
    *,
    temperature: float = 1.0,
    ddof: int = 0,
    eps: float = 1e-4,
    shared: Shared = "weight",
) -> Advantage:
    """Standardise the leaves and back their advantages up the tree: A(n) = sum_c softmax_c(log_prob / temperature) A(c).

    A leaf has A = (r - mean) / (std + eps) over the leaves of the group; c runs over the children of a node, with the
    log-probability of the transition into each; a node with a row that ends there takes the plain mean of its rows. The
    softmax follows the scale of the log-prob (see ``branch_grpo``). Rows that share nothing: ``grpo`` on every step. Equal
    log-probabilities: the mean of the children's. Source: TreeGRPO, 2512.08153, from notes; ddof and eps as Flow-GRPO.
    """
    check_policies(ddof, eps)
    check_number("temperature", temperature, 0.0, strict=True)
    check_choice("shared", shared, ("weight", "first", "all"))
    value, known = read_rewards(rewards, group, valid)
    check_mask(mask, len(value))
    nodes = _nodes(node, mask, group)
    kept = mask & known[:, None]
    log_prob = read_steps("old_log_prob", old_log_prob, mask, torch.float64)
    s = group_statistics(value, group, known, ddof, "zero")
    leaf = divide(s.centred, s.scale, eps)
    return _close(_backed_up(leaf, nodes, kept, log_prob / temperature), nodes, kept, shared, s)


def seed_grpo(
    rewards: Tensor,
    group: Tensor,
    seed_group: Tensor,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
) -> Advantage:
    """Compare only rows that started alike: ``grpo`` inside each (group, seed_group).

    rewards: [B]; seed_group: int64 [B], rows of a group with an equal id have the same start noise (and differ by the
    noise of the one stochastic step, to which their difference is due). One seed a group: ``grpo``. group_mean and
    group_std are the seed group's. The published setting has 4 seeds of 6 branches a prompt. Source: TempFlow-GRPO,
    2508.04324.
    """
    rows = tuple(rewards.shape[:1])
    check_ids("group", group, rows)
    check_ids("seed_group", seed_group, rows)
    if rewards.numel() == 0:
        raise ValueError("rewards: expected [B] with at least one value, got none")
    return grpo(rewards, _pair(group, seed_group), valid, ddof=ddof, eps=eps, singleton=singleton)


_TESTS = "tests/advantage/test_branches.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="branch_grpo",
        kind="estimator",
        paper_id="2509.06040",
        title="BranchGRPO: a node of a rollout tree earns its leaves' mean, standardised over its depth",
        tier=2,
        evidence={
            "exact": _TESTS + "test_branch_grpo_worked_numbers",
            "formula": _TESTS + "test_branch_grpo_against_a_recursion",
            "identity": _TESTS + "test_rows_that_share_nothing_give_grpo",
        },
        call=branch_grpo,
    ),
    Method(
        key="tree_grpo",
        kind="estimator",
        paper_id="2512.08153",
        title="TreeGRPO: standardised leaves, backed up by the softmax of log-probabilities",
        tier=2,
        evidence={
            "exact": _TESTS + "test_tree_grpo_worked_numbers",
            "formula": _TESTS + "test_tree_grpo_against_a_recursion",
            "identity": _TESTS + "test_rows_that_share_nothing_give_grpo",
        },
        call=tree_grpo,
    ),
    Method(
        key="seed_grpo",
        kind="estimator",
        paper_id="2508.04324",
        title="TempFlow-GRPO's seed groups: rewards compared among rows of one start noise",
        tier=2,
        evidence={
            "exact": _TESTS + "test_seed_grpo_worked_numbers",
            "formula": _TESTS + "test_seed_grpo_against_a_loop",
            "identity": _TESTS + "test_one_seed_a_group_is_grpo",
            "learned": "docs/results/credit/main.json",
        },
        call=seed_grpo,
    ),
)
