"""Rewards that look at more than one sample: whole groups, and pairs of a group's members.

A pair judge has ``compare(first, second) -> RewardResult``: for each row the degree to which the first picture is the
better one, in [0, 1], 1/2 for a tie. Each pair is shown in both orders, so that a liking for the first place cancels, and
a member's score is its mean over the opponents that it met: a win rate where the judge answers 0, 1/2 or 1, an expected
one where it answers with a probability (Pref-GRPO, 2508.20751, takes win rates in one order).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flowrl.errors import UserError
from flowrl.protocols import PairReward, Reward
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.rows import take
from flowrl.scoring.shaping import rows_of

Rows = npt.NDArray[np.int64]
SCOPES = ("sample", "pair", "group")
ALONE = "a group of one has nothing to be compared with"


def draw_pairs(count: int, opponents: int, key: int) -> Rows:
    """Choose who meets whom: int64 [P, 2], each unordered pair once.

    opponents 0, or as many as there are others: all ``count (count - 1) / 2`` pairs. Otherwise members stand in a ring
    in an order drawn from ``key`` and meet their neighbours up to ``ceil(opponents / 2)`` places away, so that all have
    equally many opponents: ``opponents``, rounded up to an even number.
    """
    reach = (opponents + 1) // 2
    if opponents == 0 or 2 * reach >= count - 1:
        return np.array([(a, b) for a in range(count) for b in range(a + 1, count)], np.int64).reshape(-1, 2)
    from flowrl import rng  # imports torch

    order = rng.permutation(key, count)
    return np.array([(order[i], order[(i + d) % count]) for d in range(1, reach + 1) for i in range(count)], np.int64)


def win_rates(
    pairs: Rows, forward: npt.NDArray[np.float64], backward: npt.NDArray[np.float64], count: int
) -> npt.NDArray[np.float64]:
    """Return each member's mean over its opponents of ``(p_ab + 1 - p_ba) / 2``, float64 [count], in [0, 1].

    pairs: int64 [P, 2], members a and b; forward p_ab: float64 [P], how much better a is with a shown first; backward
    p_ba: the same pair with b shown first, how much better b is. A pair with either missing (NaN) does not count: one
    order alone would let the judge's liking for a place through. NaN for a member without any pair.
    """
    outcome = (forward + 1.0 - backward) / 2.0
    known = ~np.isnan(outcome)
    won, met = np.zeros(count), np.zeros(count)
    for side, value in ((0, outcome), (1, 1.0 - outcome)):
        np.add.at(won, pairs[known, side], value[known])
        np.add.at(met, pairs[known, side], 1.0)
    rates: npt.NDArray[np.float64] = np.divide(won, met, out=np.full(count, np.nan), where=met > 0)
    return rates


def groups_of(batch: RewardBatch) -> list[Rows]:
    """Rows of each group. Raises ValueError for a batch that names no groups."""
    if len(batch.group_ids) != len(batch):
        raise ValueError("RewardBatch.group_ids: a reward of scope pair or group needs them")
    return rows_of(np.asarray(batch.group_ids, np.int64))


class GroupWise:
    """A reward that is handed one whole group at a time."""

    scope = "group"

    def __init__(self, reward: Reward) -> None:
        self.name, self._reward = reward.name, reward

    def score(self, batch: RewardBatch) -> RewardResult:
        parts = [(rows, self._reward.score(take(batch, rows.tolist()))) for rows in groups_of(batch)]
        for rows, part in parts:
            if not isinstance(part, RewardResult) or len(part.scores) != len(rows):
                raise UserError(
                    f"reward {self.name!r}: score() of a group of {len(rows)} did not return a RewardResult with as many "
                    "scores; return one score a member"
                )
        return gather(len(batch), parts)


class PairWise:
    """A judge of pairs as a reward of samples: win rates within each group. opponents: as in ``draw_pairs``."""

    scope = "pair"

    def __init__(self, judge: PairReward, name: str, opponents: int = 0) -> None:
        self.name, self._judge, self.opponents = name, judge, opponents

    def score(self, batch: RewardBatch) -> RewardResult:
        from flowrl import rng  # imports torch

        groups = groups_of(batch)
        drawn = [
            draw_pairs(len(rows), self.opponents, rng.key(0, 0, int(batch.group_ids[rows[0]]), stream="sampler"))
            for rows in groups
        ]
        shown = [rows[pairs] for rows, pairs in zip(groups, drawn, strict=True)]
        both = np.concatenate([np.concatenate(shown), np.concatenate(shown)[:, ::-1]])
        scores = np.full(len(batch), np.nan)
        errors: list[str | None] = [f"{self.name}: {ALONE}"] * len(batch)
        if len(both):
            preferred = self._compare(take(batch, both[:, 0].tolist()), take(batch, both[:, 1].tolist()))
            forward, backward = np.split(np.where(preferred.valid, preferred.scores, np.nan).astype(np.float64), 2)
            first = next((error for error in preferred.errors if error), "no comparison was valid")
            place = 0
            for rows, pairs in zip(groups, drawn, strict=True):
                part = slice(place, place + len(pairs))
                scores[rows] = win_rates(pairs, forward[part], backward[part], len(rows))
                place += len(pairs)
                for row in rows if len(rows) > 1 else ():
                    errors[row] = first
        valid = ~np.isnan(scores)
        told = [None if ok else error for ok, error in zip(valid, errors, strict=True)]
        return RewardResult(scores.astype(np.float32), valid, told)

    def _compare(self, first: RewardBatch, second: RewardBatch) -> RewardResult:
        result = self._judge.compare(first, second)
        if not isinstance(result, RewardResult) or len(result.scores) != len(first):
            raise UserError(
                f"reward {self.name!r}: compare() did not return a RewardResult with one score for each of {len(first)} pairs"
            )
        found = result.scores[result.valid & ~np.isnan(result.scores)]
        if ((found < 0) | (found > 1)).any():
            wrong = found[(found < 0) | (found > 1)][0]
            raise UserError(
                f"reward {self.name!r}: compare() returned {wrong:g}; return how much better the first picture is, from 0 "
                "to 1, and 0.5 for a tie"
            )
        return result


def gather(count: int, parts: Sequence[tuple[Rows | list[int], RewardResult]]) -> RewardResult:
    """Put results of some rows each into one of ``count`` rows; rows that no part has are not valid."""
    scores, valid = np.full(count, np.nan, np.float32), np.zeros(count, np.bool_)
    errors: list[str | None] = [None] * count
    details: list[str | None] = [None] * count
    components: dict[str, npt.NDArray[np.float32]] = {}
    for rows, part in parts:
        scores[rows], valid[rows] = part.scores, part.valid
        for name, values in part.components.items():
            components.setdefault(name, np.full(count, np.nan, np.float32))[rows] = values
        for place, row in enumerate(rows):
            errors[row] = part.errors[place]
            details[row] = part.details[place] if part.details else None
    shown = details if any(part.details for _, part in parts) else ()
    return RewardResult(scores, valid, errors, components, shown)
