"""Credit on trees and chains of segments: rollouts that share a prefix, values at the cut points.

Shapes: B rows, T steps, L tree levels, S segments. A row is a path from the root of its tree to a leaf. ``node_path``
(int64 [B, L]) names its nodes, level 0 the root: rows with equal ids up to a level share that node, so ids need to
differ only among the children of one node. The row itself is the leaf below level L - 1: a path may stop above the leaf
or name it, and a branch that ends early repeats any id. Segment s of a row is the edge into level s + 1, so ids lie in
0 .. L - 1 (the last one is the row's own steps) and -1 is outside.

A NaN reward is no value: its row leaves every mean and is not trained, and a node without a valued leaf is no child.
Differences below 1e-12 of the values compared are rounding and count as 0. Statistics are float64; results are float32
and carry no gradient. Raises ValueError, naming the argument, for a wrong shape, dtype or range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, check_share
from .inputs import check_flags, check_mask, read_rewards, read_segments, read_steps
from .method import Method
from .moments import Reduce, masked_whiten
from .record import Advantage
from .segments import Groups
from .statistics import check_policies, divide, drop_rounding, group_statistics, step_result
from .steps import boundaries_to_segments, known_steps, segment_gather


@dataclass(frozen=True)
class _Edges:
    """The edges into one level, n of them: value of the lower node, its siblings, valued leaves below it.

    index: int64 [B], the row's edge; value: float64 [n], NaN for none; siblings: nodes grouped by parent, the valued
    ones valid; leaves: float64 [n].
    """

    index: Tensor
    value: Tensor
    siblings: Groups
    leaves: Tensor


def _prefix_ids(node_path: Tensor) -> list[Tensor]:
    """Number the nodes of every level from 0, two rows alike where they agree on all levels so far: L times [B]."""
    above = torch.zeros_like(node_path[:, 0])
    ids = []
    for column in node_path.unbind(1):
        own = torch.unique(column, return_inverse=True)[1]
        above = torch.unique(above * (own.max() + 1) + own, return_inverse=True)[1]
        ids.append(above)
    return ids


def _climb(value: Tensor, known: Tensor, node_path: Tensor) -> tuple[list[_Edges], Tensor]:
    """Back values up from the rows: the edges into levels 1 .. L, and the roots' values, float64 [B]."""
    index = torch.arange(len(value), device=value.device)
    leaves = known.double()
    found = []
    for upper in reversed(_prefix_ids(node_path)):
        parent = torch.empty_like(value, dtype=torch.int64).scatter_(0, index, upper)
        siblings = Groups.of(parent, known)
        found.append(_Edges(index=index, value=value, siblings=siblings, leaves=leaves))
        value = torch.zeros_like(siblings.size).scatter_(0, parent, siblings.mean(value))
        leaves = torch.zeros_like(siblings.size).index_add_(0, parent, leaves)
        known, index = siblings.size > 0, upper
    return found[::-1], value[index]


def _read_tree(rewards: Tensor, node_path: Tensor, valid: Tensor | None, levels: int = 1) -> tuple[Tensor, Tensor]:
    rows = rewards.shape[:1]
    if (
        node_path.dtype != torch.int64
        or node_path.ndim != 2
        or node_path.shape[1] < levels
        or node_path.shape[:1] != rows
    ):
        raise ValueError(
            f"node_path: expected int64 [B, L] with B of rewards {list(rows)} and L >= {levels}, got {node_path.dtype} "
            f"{list(node_path.shape)}"
        )
    return read_rewards(rewards, node_path[:, 0], valid)


def tree_values(rewards: Tensor, node_path: Tensor, valid: Tensor | None = None) -> Tensor:
    """Back leaf rewards up a tree: V(node) = mean of its children's V, each child counted once.

    rewards: [B], one a leaf; node_path: int64 [B, L]; valid: bool [B]. Returns float32 [B, L], the value of each node
    of the row's path, NaN where no leaf below has a value. On an unbalanced tree this is not the mean of the leaves: a
    root with children 1 and (0, 0, 1) has 2/3 here, 1/2 there. Level by level, no loop over nodes.
    """
    value, known = _read_tree(rewards, node_path, valid)
    edges, root = _climb(value, known, node_path)
    return torch.stack([root, *(e.value[e.index] for e in edges[:-1])], dim=1).float()


def _edge_advantage(edges: _Edges, mode: str, eps: float, progress: float, best_of: int) -> Tensor:
    """Advantage of each edge into a level, float64 [n]; of no meaning where its node has no value."""
    siblings = edges.siblings
    parent = siblings.mean(edges.value)
    gain = drop_rounding(edges.value - parent, siblings.max(edges.value.abs()))
    if progress != 0.0:
        best = (1 - parent) ** best_of - (1 - edges.value) ** best_of
        gain = torch.where(gain == 0, 0.0, gain + progress * best)
    if mode == "grpo":
        gain = divide(gain, siblings.std(edges.value), eps)
    return gain


def _below(mask: Tensor, old_log_prob: Tensor | None, max_probability: float) -> Tensor:
    """Steps of ``mask`` less probable than ``max_probability``, all where that is 1: bool [B, T].

    Raises ValueError where old_log_prob is needed and missing, or a density (above 0).
    """
    check_share("max_probability", max_probability, strict=True)
    if max_probability == 1:
        return mask
    if old_log_prob is None:
        raise ValueError(f"old_log_prob: needed for max_probability {max_probability}, got None")
    log_prob = read_steps("old_log_prob", old_log_prob, mask)
    if bool((log_prob > 0).any()):
        raise ValueError(
            f"old_log_prob: expected log-probabilities <= 0 for max_probability {max_probability}, got "
            f"{float(log_prob.max()):.4g}; a density has no probability: leave max_probability at 1 and use mask"
        )
    return mask & (log_prob < math.log(max_probability))


def _unsure(kept: Tensor, mask: Tensor, old_log_prob: Tensor | None, max_probability: float) -> Tensor:
    """Leave in ``kept`` the steps that ``_below`` finds; every step of a row in which it finds none."""
    below = _below(mask, old_log_prob, max_probability)
    return kept if below is mask else kept & torch.where(below.any(dim=1, keepdim=True), below, mask)


def spo_tree(
    rewards: Tensor,
    node_path: Tensor,
    segment: Tensor,
    mask: Tensor,
    old_log_prob: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    mode: Literal["rloo", "grpo"] = "rloo",
    eps: float = 1e-8,
    drop_zero: bool = True,
    max_probability: float = 1.0,
    progress: float = 0.0,
    best_of: int = 4,
) -> Advantage:
    """Credit each edge of a tree with the value it adds: A(child) = V(child) - V(parent).

    V as ``tree_values``. rewards: [B]; node_path: int64 [B, L]; segment: int64 [B, T], s the edge into level s + 1, a
    value of 0 .. L - 1 or -1; mask: bool [B, T]; old_log_prob: [B, T], sampling-time log-probabilities.
    weight = 1 / valued leaves below the edge: rows repeat a shared prefix, and so each edge counts once
    (reconstructed: the public code has one training sample an edge). group_mean, group_std: over the leaves of a tree.

    mode: "rloo" as above (the public code's name; the baseline holds the child itself), "grpo" divides by the population
    deviation over siblings + eps. drop_zero: edges worth exactly 0 leave the loss. max_probability: train only steps
    less probable than this; the public code has 0.9 for tokens, 1 is off. progress: adds progress times the rise of
    1 - (1 - V)^best_of, V in [0, 1] (public code: 5 and 4, off by default; as read, reconstructed).

    Identities: with "rloo" the edges under a node add up to 0, a path to leaf minus root; L = 1 is ``dr_grpo``.
    Source: SPO-tree, 2505.23564; AIFrameResearch/SPO.
    On denoising steps: branch rollouts; a node is a latent shared by several branches, a segment the steps between two
    branch points. Densities have no probability, so max_probability stays 1.
    """
    check_choice("mode", mode, ("rloo", "grpo"))
    check_policies(eps=eps)
    if not math.isfinite(progress) or best_of < 1:
        raise ValueError(f"progress, best_of: expected a finite number and one >= 1, got {progress} and {best_of}")
    value, known = _read_tree(rewards, node_path, valid)
    check_mask(mask, len(value))
    segment = read_segments(segment, mask, node_path.shape[1], ordered=False)
    edges, _ = _climb(value, known, node_path)
    gain = torch.stack([_edge_advantage(e, mode, eps, progress, best_of)[e.index] for e in edges], dim=1)
    leaves = torch.stack([e.leaves[e.index] for e in edges], dim=1)
    trained = known[:, None] & (gain.float() != 0) if drop_zero else known[:, None]
    advantage, kept, _ = known_steps(torch.where(trained, gain, torch.nan), segment)
    kept = _unsure(kept, mask, old_log_prob, max_probability)
    s = group_statistics(value, node_path[:, 0], known, 0, "zero")
    weight = segment_gather(1 / leaves.clamp(min=1).float(), segment)
    return step_result(advantage, kept, s.live, weight=weight, statistics=s)


def spo_cuts(
    old_log_prob: Tensor,
    mask: Tensor,
    *,
    interval: int = 5,
    max_probability: float = 0.9,
    max_cuts: int | None = None,
) -> Tensor:
    """Cut rows into segments where the policy is unsure: int64 [B, T], -1 on masked steps.

    Of the unmasked steps with probability below max_probability every ``interval``-th, the first included, starts a
    segment; so does the first unmasked step. The state before the first step of segment k is the cut point whose value
    is ``segment_value[:, k]`` of ``spo_chain``. old_log_prob: [B, T], <= 0; max_cuts: keep the first ones only (a public
    config has 25). Source: SPO-chain, 2505.23564; AIFrameResearch/SPO.
    On denoising steps: cut at fixed steps instead, a density has no probability.
    """
    check_mask(mask)
    for name, number in (("interval", interval), ("max_cuts", 1 if max_cuts is None else max_cuts)):
        if number < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {number}")
    unsure = _below(mask, old_log_prob, max_probability)
    rank = unsure.long().cumsum(dim=1) - 1
    cut = unsure & (rank % interval == 0)
    if max_cuts is not None:
        cut = cut & (rank < max_cuts * interval)
    first = mask & (mask.long().cumsum(dim=1) == 1)
    return torch.where(mask, boundaries_to_segments(cut | first), -1)


def _read_segment_value(
    segment_value: Tensor, segment: Tensor, mask: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the value as float64 [B, S + 1], NaN for none and for rows that do not count, and the segments."""
    check_mask(mask)
    if segment_value.ndim != 2 or len(segment_value) != len(mask) or segment_value.shape[1] < 2:
        raise ValueError(f"segment_value: expected [{len(mask)}, S + 1] with S >= 1, got {list(segment_value.shape)}")
    segment = read_segments(segment, mask, segment_value.shape[1] - 1, ordered=False)
    asked = torch.ones_like(mask[:, 0]) if valid is None else valid
    check_flags("valid", asked, (len(mask),))
    value = torch.where(asked[:, None], segment_value.detach().double(), torch.nan)
    known = ~value.isnan().all(dim=1)
    if bool(value.isinf().any()) or (bool(asked.any()) and not bool(known.any())):
        raise ValueError("segment_value: expected finite numbers or NaN, not all NaN, among the valid rows")
    missing = value[:, 0].isnan() & known & (segment == 0).any(dim=1)
    if bool(missing.any()):
        raise ValueError(
            f"segment_value: row {int(missing.nonzero()[0])} has no value at its start (column 0), which its first "
            "segment needs; sample it, or mask the segment"
        )
    return value, segment


def spo_chain(
    segment_value: Tensor,
    segment: Tensor,
    mask: Tensor,
    old_log_prob: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    max_probability: float = 1.0,
    whiten: bool = True,
    ddof: int = 1,
    eps: float = 1e-8,
    reduce: Reduce | None = None,
) -> Advantage:
    """Credit each segment with the change of value across it: A_t = V(end of its segment) - V(start).

    segment_value: [B, S + 1]; column k the value of the state before segment k (the mean reward of rollouts continued
    from there), column 0 always needed, and the column after a row's last segment its outcome. NaN: no value; the
    segments that it bounds are not trained, and a row of NaN alone not at all. segment: int64 [B, T], 0 .. S - 1 or -1,
    for instance of ``spo_cuts``; mask: bool [B, T]; old_log_prob: [B, T], sampling-time log-probabilities.

    max_probability: train only steps less probable than this (a row without any: all); the public code has 0.9 for
    tokens, 1 is off. whiten: standardise over the steps in the loss of the whole batch, ``reduce`` over ranks, with
    ddof and eps as ``masked_whiten`` (public code: on). live: the row has a segment worth something. The public code
    gives 0 before the first cut where the start has no value; here that is an error. Without whitening, the
    advantages of a row's segments add up to outcome minus V(start): it is GAE with lambda 0 and gamma 1 on segments.
    Source: SPO-chain, 2505.23564; AIFrameResearch/SPO.
    On denoising steps: fixed cut steps, V the mean reward of branches from the latent there; max_probability stays 1.
    """
    check_policies(ddof=ddof, eps=eps)
    value, segment = _read_segment_value(segment_value, segment, mask, valid)
    gain = value.diff(dim=1)
    advantage, kept, live = known_steps(gain, segment)
    kept = _unsure(kept, mask, old_log_prob, max_probability)
    if whiten:
        advantage = masked_whiten(advantage, kept, ddof=ddof, eps=eps, reduce=reduce)
    return step_result(advantage, kept, live)


def grpo_ma(
    rewards: Tensor,
    node_path: Tensor,
    segment: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    *,
    answer_baseline: Literal["global", "parent"] = "global",
    ddof: int = 0,
    eps: float = 1e-4,
) -> Advantage:
    """Judge a thought by the mean reward of its answers, an answer by its own: both standardised in their group.

    A_thought = (V_k - mean_k V) / (std_k V + eps), V_k = mean_m R_km; A_answer = (R - b) / (std R + eps), the deviation
    over all answers of the group, b their mean ("global") or V_k ("parent", as ``spo_tree``).

    rewards: [B], one a row (answer); node_path: int64 [B, L >= 2], level 0 the group, level 1 the thought, deeper levels
    unused; segment: int64 [B, T], 0 the thought, 1 or more the answer, -1 outside; mask: bool [B, T]. weight: 1 / (K M_k)
    on the thought's steps (a thought counts 1 / K, its M_k rows share it), 1 / N on the answer's, N answers a group.
    ddof: the source does not say; 0 here. One answer a thought gives ``grpo`` on both parts. group_mean, group_std: over
    the answers. Source: GRPO-MA, 2509.24494.
    On denoising steps: a thought is the prefix of steps up to a branch point, its answers the branches from there.
    """
    check_choice("answer_baseline", answer_baseline, ("global", "parent"))
    check_policies(ddof, eps)
    value, known = _read_tree(rewards, node_path, valid, levels=2)
    check_mask(mask, len(value))
    segment = read_segments(segment, mask, torch.iinfo(torch.int64).max, ordered=False)
    (thoughts, answers), _ = _climb(value, known, node_path[:, :2])
    s = group_statistics(value, node_path[:, 0], known, ddof, "zero")
    scale = s.groups.max(value.abs())
    mates = thoughts.siblings
    gain = drop_rounding(thoughts.value - mates.mean(thoughts.value), mates.max(thoughts.value.abs()))
    thought = divide(gain, mates.std(thoughts.value, ddof), eps)[thoughts.index]
    baseline = s.mean if answer_baseline == "global" else answers.siblings.mean(value)
    answer = divide(drop_rounding(value - baseline, scale), s.scale, eps)
    sizes = torch.stack([mates.count()[thoughts.index] * thoughts.leaves[thoughts.index], s.groups.count().double()], 1)
    part = segment.clamp(max=1)
    gain = torch.where(known[:, None], torch.stack([thought, answer], dim=1), torch.nan)
    advantage, kept, _ = known_steps(gain, part)
    weight = segment_gather(1 / sizes.clamp(min=1).float(), part)
    return step_result(advantage, kept, s.live, weight=weight, statistics=s)


_TESTS = "tests/advantage/test_trees.py::"
_NO_STD = "in the units of the reward: no deviation divides"

METHODS: tuple[Method, ...] = (
    Method(
        key="spo_tree",
        kind="estimator",
        paper_id="2505.23564",
        title="SPO-tree: each edge of a tree of branches earns child's value minus parent's",
        tier=2,
        evidence={
            "exact": _TESTS + "test_spo_tree_worked_numbers",
            "formula": _TESTS + "test_spo_tree_against_a_recursion",
            "identity": _TESTS + "test_spo_tree_identities",
        },
        call=spo_tree,
        exempt={"scale": _NO_STD},
    ),
    Method(
        key="spo_chain",
        kind="estimator",
        paper_id="2505.23564",
        title="SPO-chain: each segment earns the change of sampled value across it",
        tier=2,
        evidence={
            "exact": _TESTS + "test_spo_chain_worked_numbers",
            "formula": _TESTS + "test_spo_chain_against_a_loop",
            "identity": _TESTS + "test_spo_chain_telescopes",
        },
        call=spo_chain,
        exempt={
            "isolation": "whitening takes statistics of the whole batch",
            "constant": "it has no groups: whitening centres a row of constant value with the rest of the batch",
        },
    ),
    Method(
        key="grpo_ma",
        kind="estimator",
        paper_id="2509.24494",
        title="GRPO-MA: a thought earns the mean of its answers, an answer its own reward",
        tier=2,
        evidence={
            "exact": _TESTS + "test_grpo_ma_worked_numbers",
            "formula": _TESTS + "test_grpo_ma_against_a_loop",
            "identity": _TESTS + "test_grpo_ma_with_one_answer_is_grpo",
        },
        call=grpo_ma,
    ),
)
