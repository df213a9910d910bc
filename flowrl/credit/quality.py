"""How good a process reward is at each noise level, measured inside groups against the final reward. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.credit.networks import noise_level
from flowrl.credit.reward_model_losses import group_pairs


@dataclass(frozen=True)
class LevelQuality:
    """One noise level. low, high: its range of t.

    pairs: pairs of members of one group whose final rewards differ; accuracy: how often the value has them in the right
    order, a tie counting half, 0.5 is chance; rank_correlation: Kendall's tau-b, the mean over groups, of value and final
    reward; slope, offset: least squares of the final reward on the value, ``reward ~ slope value + offset``; explained: the
    share of the reward's variance that the fit explains; calibration_error: mean distance between the stated chance
    that one of two is better, ``sigmoid(gap / temperature)``, and how often it was, over ten bins of that chance;
    invalid: samples without a value; milliseconds: a sample, None where it was not timed. None: too little to say.
    """

    low: float
    high: float
    samples: int
    invalid: int
    pairs: int
    accuracy: float | None
    rank_correlation: float | None
    slope: float | None
    offset: float | None
    explained: float | None
    calibration_error: float | None
    milliseconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def quality(
    value: Tensor,
    valid: Tensor,
    reward: Tensor,
    group: Tensor,
    t: Tensor,
    *,
    levels: int = 8,
    seconds: Sequence[float | None] = (),
) -> list[LevelQuality]:
    """Judge values of latents against what they ended in: one `LevelQuality` a level, cleanest first.

    value: float [N], in units of its temperature (see calibration_error); valid: bool [N]; reward: float [N], NaN where
    there is none; group: int64 [N]; t: float [N]; seconds: a level's time for all its samples. Pairs are taken within a
    group and a level, whatever their t within it. Raises ValueError for lengths that differ.
    """
    if len({len(x) for x in (value, valid, reward, group, t)}) != 1:
        raise ValueError("quality: value, valid, reward, group and t must be equally long")
    level = noise_level(t, levels)
    found = []
    for number in range(levels):
        here = level == number
        known = here & valid & value.isfinite() & reward.isfinite()
        spent = seconds[number] if number < len(seconds) else None
        found.append(
            LevelQuality(
                low=number / levels,
                high=(number + 1) / levels,
                samples=int(here.sum()),
                invalid=int((here & ~(valid & value.isfinite())).sum()),
                **_of_level(value[known].double(), reward[known].double(), group[known]),
                milliseconds=1e3 * spent / int(here.sum()) if spent is not None and bool(here.any()) else None,
            )
        )
    return found


def _of_level(value: Tensor, reward: Tensor, group: Tensor) -> dict[str, Any]:
    right, pairs = pair_counts(value, reward, group)
    slope, offset, explained = linear_fit(value, reward)
    return {
        "pairs": pairs,
        "accuracy": right / pairs if pairs else None,
        "rank_correlation": rank_correlation(value, reward, group),
        "slope": slope,
        "offset": offset,
        "explained": explained,
        "calibration_error": calibration_error(value, reward, group),
    }


def pair_counts(value: Tensor, reward: Tensor, group: Tensor) -> tuple[float, int]:
    """Count (pairs that the value has in the right order, all pairs) within groups where the rewards differ.

    A pair of equal values counts half. value, reward: float [N], finite; group: int64 [N].
    """
    i, j, outcome = group_pairs(reward, group, torch.zeros_like(group))
    decided = outcome == 1
    gap = value[i[decided]] - value[j[decided]]
    return float((gap > 0).sum()) + 0.5 * float((gap == 0).sum()), int(decided.sum())


def rank_correlation(value: Tensor, reward: Tensor, group: Tensor) -> float | None:
    """Kendall's tau-b of value and reward, the mean over groups in which both vary; None where there is none.

    ``(concordant - discordant) / sqrt((pairs - ties in value) (pairs - ties in reward))``.
    """
    found = []
    for number in torch.unique(group).tolist():
        rows = group == number
        a, b = (_signs(x[rows]) for x in (value, reward))
        varied = float((a != 0).sum()) * float((b != 0).sum())
        if varied:
            found.append(float((a * b).sum()) / varied**0.5)
    return sum(found) / len(found) if found else None


def _signs(x: Tensor) -> Tensor:
    first, second = torch.triu_indices(len(x), len(x), 1)
    return (x[first] - x[second]).sign()


def linear_fit(value: Tensor, reward: Tensor) -> tuple[float | None, float | None, float | None]:
    """Fit ``reward ~ slope value + offset`` by least squares: (slope, offset, explained share), None for what cannot be."""
    if len(value) < 2:
        return None, None, None
    dv, dr = value - value.mean(), reward - reward.mean()
    spread, varied = float(dv.square().sum()), float(dr.square().sum())
    if spread == 0:
        return None, None, None
    slope = float((dv * dr).sum()) / spread
    offset = float(reward.mean()) - slope * float(value.mean())
    return slope, offset, slope**2 * spread / varied if varied else None


def calibration_error(value: Tensor, reward: Tensor, group: Tensor, bins: int = 10) -> float | None:
    """Mean distance between stated and observed chance of being the better of a pair, weighted by pairs; None without any.

    Every pair counts in both directions, so both chances are symmetric about 1/2.
    """
    i, j, outcome = group_pairs(reward, group, torch.zeros_like(group))
    decided = outcome == 1
    gap = value[i[decided]] - value[j[decided]]
    if not len(gap):
        return None
    stated = torch.cat([torch.sigmoid(gap), torch.sigmoid(-gap)])
    won = torch.cat([torch.ones_like(gap), torch.zeros_like(gap)])
    place = (stated * bins).long().clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins).double()
    off = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, (stated - won).double())
    return float(off.abs().sum() / count.sum())


def usable_levels(found: Sequence[LevelQuality], threshold: float, least: int = 1) -> list[bool]:
    """Which levels may give credit: those of at least ``threshold`` pair accuracy over at least ``least`` pairs."""
    return [q.accuracy is not None and q.pairs >= least and q.accuracy >= threshold for q in found]


def quality_text(found: Sequence[LevelQuality]) -> str:
    """Lay a quality report out as text, one line a level, noisiest first."""
    head = ("t", "samples", "invalid", "pairs", "pair accuracy", "tau", "slope", "explained", "calibration", "ms")
    rows = [head, *(_cells(q) for q in reversed(found))]
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cells(q: LevelQuality) -> tuple[str, ...]:
    def shown(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    return (
        f"{q.low:.3g} to {q.high:.3g}", str(q.samples), str(q.invalid), str(q.pairs), shown(q.accuracy),
        shown(q.rank_correlation), shown(q.slope), shown(q.explained), shown(q.calibration_error), shown(q.milliseconds),
    )  # fmt: skip
