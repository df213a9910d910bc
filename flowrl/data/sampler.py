"""Which prompts an iteration draws: a pure function of (seed, iteration), so that no process or resume can change
it."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowrl import rng
from flowrl.errors import UserError
from flowrl.records import PromptRow

_PASS, _WEIGHTED = 0, 1  # the `step` part of the key keeps the two ways of drawing apart


@dataclass(frozen=True)
class Drawn:
    """One group of an iteration. occurrence: how often its prompt was drawn before in this iteration; all are int64."""

    prompt_id: int
    occurrence: int
    group_id: int


def draw_groups(
    seed: int, iteration: int, groups: int, count: int, weights: Sequence[float] | None = None
) -> list[Drawn]:
    """Draw the prompts of one iteration: ``groups`` of them out of ``count``.

    Without weights, position ``iteration * groups + index`` of an endless row of keyed permutations, so every prompt
    comes once a pass. With weights (float [count], at least 0), independent draws with P(i) = weights[i] /
    sum(weights). group_id = iteration * groups + index, unique over a run of constant ``groups``. Raises ValueError.
    """
    if groups < 1 or count < 1 or iteration < 0:
        raise ValueError(
            f"draw_groups: groups {groups} and count {count} must be at least 1, iteration {iteration} at least 0"
        )
    first = iteration * groups
    if weights is None:
        ids = _by_pass(seed, first, groups, count)
    else:
        ids = _by_weight(seed, iteration, groups, _checked(weights, count))
    seen: Counter[int] = Counter()
    drawn = []
    for index, prompt_id in enumerate(ids):
        drawn.append(Drawn(prompt_id, seen[prompt_id], first + index))
        seen[prompt_id] += 1
    return drawn


def _by_pass(seed: int, first: int, groups: int, count: int) -> list[int]:
    ids: list[int] = []
    for number in range(first // count, (first + groups - 1) // count + 1):
        order = rng.permutation(rng.key(seed, number, step=_PASS, stream="sampler"), count)
        start = number * count
        ids += order[max(0, first - start) : first + groups - start]
    return ids


def _by_weight(seed: int, iteration: int, groups: int, weights: Sequence[float]) -> list[int]:
    edges = list(itertools.accumulate(weights))
    last = max(index for index, weight in enumerate(weights) if weight > 0)
    ids = []
    for index in range(groups):
        point = rng.uniform(rng.key(seed, iteration, member=index, step=_WEIGHTED, stream="sampler")) * edges[-1]
        ids.append(min(bisect_right(edges, point), last))  # rounding may put the point on the last edge
    return ids


def _checked(weights: Sequence[float], count: int) -> Sequence[float]:
    if len(weights) != count:
        raise ValueError(f"draw_groups: {len(weights)} weights for {count} prompts")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(
        weight > 0 for weight in weights
    ):
        raise ValueError("draw_groups: weights must be finite, at least 0, and not all 0")
    return weights


def weights_by_tag(rows: Sequence[PromptRow], tags: Mapping[str, float]) -> list[float]:
    """Weight of each row so that a draw takes a tag in proportion to ``tags``, then one of its rows uniformly."""
    sizes = Counter(str(row.metadata.get("tag", "")) for row in rows)
    unknown = [tag for tag in tags if tag not in sizes]
    if unknown:
        raise UserError(f"data.tags: no prompt has the tag {unknown[0]!r}; the tags are {', '.join(sorted(sizes))}")
    wrong = [tag for tag, weight in tags.items() if not isinstance(weight, int | float) or not 0 <= weight < math.inf]
    if wrong or not any(tags.values()):
        raise UserError(f"data.tags.{(wrong or list(tags))[0]}: weights are numbers of at least 0, one of them above 0")
    return [tags.get(str(row.metadata.get("tag", "")), 0.0) / sizes[str(row.metadata.get("tag", ""))] for row in rows]
