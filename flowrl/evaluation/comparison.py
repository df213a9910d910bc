"""Methods side by side: intervals over prompts and seeds, verdicts against the first method, diversity of pictures.

Every method was trained once a seed and judged on the same prompts and noise, so all differences are paired: by picture
between tuned and base, by seed and picture between methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flowrl.evaluation.statistics import MIN_PROMPTS, Interval, bootstrap_mean

Row = Mapping[str, Any]
Array = npt.NDArray[np.float64]
Key = tuple[int, int, int]

DRAWS = 4000
MIN_CLIP = 0.05
"""Clip fraction of the baseline below which clipping decides too little to compare ways of clipping."""
MIN_UPDATES = 4
LAST = 0.1
"""Part of the iterations, from the end, over which a training figure is averaged."""
COUNTED = ("forward_samples", "backward_samples")


def crossed_mean(
    values: npt.ArrayLike, prompt_ids: npt.ArrayLike, seed: int = 0, draws: int = DRAWS, level: float = 0.95
) -> Interval:
    """Estimate a mean over runs and pictures, with an interval over both the seeds and the prompts.

    values: float [S, N], row s a training run with a seed of its own, column i one picture (prompt and noise) that all
    runs share; NaN is left out. prompt_ids: int [N].

    Each draw takes as many prompts as there are, with replacement, and S - 1 of the S seeds, with replacement, and
    averages their pictures: the crossed ("pigeonhole") bootstrap (Owen, Annals of Applied Statistics 1, 2007, 386-411).
    S - 1 draws give the mean over seeds its unbiased variance s^2 / S where S draws would give (S - 1) / S of it (the
    rescaling of Rao and Wu, JASA 83, 1988), which matters for two or three seeds. Simulated with 40 prompts, 95% intervals
    held the truth in 94 to 97% of cases where seeds moved results less than prompts did; with three seeds that moved them
    far more, in 79% (five: 90%), as so few seeds show too little of their own spread. One seed leaves the bootstrap over
    prompts, which says nothing of other seeds. Fewer than ``MIN_PROMPTS`` prompts give no interval.

    Raises ValueError for shapes that do not match, no valid value, or a level or number of draws out of range.
    """
    scores, ids = np.asarray(values, np.float64), np.asarray(prompt_ids)
    if scores.ndim != 2 or scores.shape[1:] != ids.shape:
        raise ValueError(
            f"crossed_mean: values {list(scores.shape)} must be [S, N] and prompt_ids {list(ids.shape)} [N]"
        )
    if not 0.0 < level < 1.0 or draws < 1:
        raise ValueError(f"crossed_mean: level {level} must lie in (0, 1) and draws {draws} be at least 1")
    if len(scores) == 1:
        return bootstrap_mean(scores[0], ids, seed, draws, level)
    valid = ~np.isnan(scores)
    if not valid.any():
        raise ValueError("crossed_mean: no valid value")
    _, cluster = np.unique(ids[valid.any(0)], return_inverse=True)
    known = np.where(valid, scores, 0.0)[:, valid.any(0)]
    totals = np.stack([np.bincount(cluster, row) for row in known])
    counts = np.stack([np.bincount(cluster, row) for row in valid[:, valid.any(0)].astype(np.float64)])
    mean = float(totals.sum() / counts.sum())
    runs, prompts = totals.shape
    if prompts < MIN_PROMPTS:
        return Interval(mean, None, None)
    rng = np.random.default_rng(seed)
    of_seed = rng.multinomial(runs - 1, np.full(runs, 1 / runs), draws).astype(np.float64)
    of_prompt = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws).astype(np.float64)
    drawn = ((of_seed @ counts) * of_prompt).sum(1)
    means = ((of_seed @ totals) * of_prompt).sum(1)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def seed_mean(values: Sequence[float | None], level: float = 0.95) -> Interval | None:
    """Average one number a run: mean and Student's t interval over the S seeds, which one seed has not.

    ``mean +- t_{S-1} s / sqrt(S)``, s with S - 1 in its denominator. None where no run has the number.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    mean = float(np.mean(known))
    if len(known) == 1:
        return Interval(mean, None, None)
    from scipy.special import stdtrit

    half = float(stdtrit(len(known) - 1, (1 + level) / 2) * np.std(known, ddof=1) / math.sqrt(len(known)))
    return Interval(mean, mean - half, mean + half)


def verdict(difference: Interval | None) -> str:
    """Say what an interval of a difference allows: better, worse, or cannot tell where it holds 0 or there is none."""
    if difference is None or difference.low is None or difference.high is None:
        return "cannot tell"
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "cannot tell"


def picture_spread(images: npt.NDArray[np.uint8], prompt_ids: Sequence[int], cells: int = 12) -> dict[int, float]:
    """Measure how different the pictures of each prompt are, as a root mean square over coarse pixels.

    Pictures are reduced to at most ``cells`` x ``cells`` block means in [0, 1]. The result is the root of the variance
    over a prompt's pictures (n - 1 in its denominator), averaged over blocks and channels: 0 for equal pictures, at most
    sqrt(1 / 2), for two that are black and white. The mean squared distance of two of the pictures, a coarse pixel, is
    twice its square.

    images: uint8 [N, H, W, 3]; prompt_ids: [N]. Prompts with a single picture are left out.
    """
    ids = np.asarray(prompt_ids)
    if images.ndim != 4 or len(images) != len(ids):
        raise ValueError(f"picture_spread: images {list(images.shape)} must be [N, H, W, 3] for {len(ids)} prompt_ids")
    spread = {}
    for prompt in dict.fromkeys(ids.tolist()):
        mine = images[ids == prompt]
        if len(mine) > 1:
            coarse = _blocks(_blocks(mine.astype(np.float64) / 255, cells, 1), cells, 2)
            spread[int(prompt)] = math.sqrt(float(coarse.var(0, ddof=1).mean()))
    return spread


def _blocks(values: Array, cells: int, axis: int) -> Array:
    """Means over at most ``cells`` stretches of nearly equal length along one axis."""
    size = values.shape[axis]
    count = min(cells, size)
    edges = np.arange(count + 1) * size // count
    shape = [1] * values.ndim
    shape[axis] = count
    sums: Array = np.add.reduceat(values, edges[:-1], axis=axis)
    means: Array = sums / np.diff(edges).reshape(shape)
    return means


# ------------------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class MethodRuns:
    """The finished runs of one method, one entry a seed, in the same order of seeds for every method.

    metrics: rows of metrics.jsonl. samples: rows of samples.jsonl, base and tuned. spread: `picture_spread` of both
    sides, as {"base": {prompt: value}, "tuned": ...}. kl: whether its loss has a KL term.
    """

    label: str
    metrics: Sequence[Sequence[Row]]
    samples: Sequence[Sequence[Row]]
    spread: Sequence[Mapping[str, Mapping[int, float]]]
    kl: bool = False


def compare_methods(methods: Sequence[MethodRuns], gold: Sequence[str] = ()) -> dict[str, Any]:
    """Judge methods over the same seeds, each against its base and against the first one.

    gold: names of evaluated rewards that were not trained on. Returns ``{"measure", "base", "methods": {label: ...}}``
    with intervals as ``{mean, low, high}`` or None where there is nothing to average. ``measure`` is what the verdicts
    go by: ``strict`` where it was recorded, else ``score``. A method has ``held_out`` (each measure's tuned level and
    ``change`` from the base), ``gold`` and ``diversity`` alike, ``train_score`` (mean of score/mean over the last
    tenth of the iterations), ``kl``, ``clip_fraction``, ``calls``, ``seconds``, and ``against``: each measure's paired
    difference from the first method, with the ``verdict``.

    Raises ValueError where the runs were judged on different pictures, or methods have different numbers of seeds.
    """
    sides = {method.label: _Sides.of(method) for method in methods}
    first = next(iter(sides.values()))
    for label, found in sides.items():
        if found.keys != first.keys or found.runs != first.runs:
            raise ValueError(
                f"compare_methods: {label} was judged on other pictures, or other seeds, than the first method"
            )
    columns = {"strict": _strict, "score": _score, **{name: _reward(name) for name in gold}}
    columns = {name: read for name, read in columns.items() if first.known(read)}
    return {
        "measure": next(iter(columns), "score"),
        "base": {name: _json(first.mean("base", read)) for name, read in columns.items()}
        | {"diversity": _json(_diversity(methods[0], "base"))},
        "methods": {
            method.label: _judged(method, sides[method.label], columns, gold)
            | {"against": None if index == 0 else _against(sides[method.label], first, columns)}
            for index, method in enumerate(methods)
        },
    }


Read = Callable[[Row], float | None]


def _strict(row: Row) -> float | None:
    return None if row["strict"] is None else float(row["strict"])


def _score(row: Row) -> float | None:
    value: float | None = row["score"]
    return value


def _reward(name: str) -> Read:
    return lambda row: row["scores"].get(name)


@dataclass(frozen=True)
class _Sides:
    """Rows by side and picture, a mapping a seed."""

    keys: tuple[Key, ...]
    rows: Mapping[str, Sequence[Mapping[Key, Row]]]

    @property
    def runs(self) -> int:
        return len(self.rows["tuned"])

    @classmethod
    def of(cls, method: MethodRuns) -> _Sides:
        rows = {
            which: [
                {(row["prompt_id"], row["member"], row["seed"]): row for row in run if row["which"] == which}
                for run in method.samples
            ]
            for which in ("base", "tuned")
        }
        keys = sorted(rows["tuned"][0])
        if any(sorted(run) != keys for which in rows for run in rows[which]):
            raise ValueError(f"compare_methods: the runs of {method.label} were judged on different pictures")
        return cls(tuple(keys), rows)

    @property
    def prompts(self) -> npt.NDArray[np.int64]:
        return np.array([key[0] for key in self.keys], np.int64)

    def values(self, which: str, read: Read) -> Array:
        """[S, N], NaN where a picture has no such number."""
        return np.array([[_nan(read(run[key])) for key in self.keys] for run in self.rows[which]])

    def known(self, read: Read) -> bool:
        return bool((~np.isnan(self.values("base", read))).any())

    def mean(self, which: str, read: Read) -> Interval | None:
        return _crossed(self.values(which, read), self.prompts)


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _crossed(values: Array, prompts: npt.NDArray[np.int64]) -> Interval | None:
    return crossed_mean(values, prompts) if (~np.isnan(values)).any() else None


def _json(interval: Interval | None) -> dict[str, float | None] | None:
    return None if interval is None else interval.as_json()


def _judged(method: MethodRuns, sides: _Sides, columns: Mapping[str, Read], gold: Sequence[str]) -> dict[str, Any]:
    changes = {
        name: {
            "tuned": _json(sides.mean("tuned", read)),
            "change": _json(_crossed(sides.values("tuned", read) - sides.values("base", read), sides.prompts)),
        }
        for name, read in columns.items()
    }
    calls = {name: _mean(_total(run, f"calls/{name}") for run in method.metrics) for name in COUNTED}
    return {
        "seeds": sides.runs,
        "train_score": _json(seed_mean([last_mean(run, "score/mean") for run in method.metrics])),
        "held_out": {name: value for name, value in changes.items() if name not in gold},
        "gold": {name: value for name, value in changes.items() if name in gold},
        "kl": _json(seed_mean([last_mean(run, "policy/kl") for run in method.metrics])) if method.kl else None,
        "diversity": {"tuned": _json(_diversity(method, "tuned")), "change": _json(_diversity(method, "change"))},
        "clip_fraction": _mean(_average(run, "policy/clip_fraction") for run in method.metrics),
        "calls": calls,
        "seconds": _mean(_total(run, "time/iteration_s") for run in method.metrics),
    }


def _against(mine: _Sides, first: _Sides, columns: Mapping[str, Read]) -> dict[str, Any]:
    found = {
        name: _crossed(mine.values("tuned", read) - first.values("tuned", read), mine.prompts)
        for name, read in columns.items()
    }
    measure = next(iter(columns), "")
    return {name: _json(value) for name, value in found.items()} | {"verdict": verdict(found.get(measure))}


def _diversity(method: MethodRuns, which: str) -> Interval | None:
    """Mean spread of a side, or of tuned less base, over seeds and prompts."""
    prompts = sorted(set.intersection(*(set(run["tuned"]) & set(run["base"]) for run in method.spread)))
    if not prompts:
        return None
    parts = {side: np.array([[run[side][p] for p in prompts] for run in method.spread]) for side in ("base", "tuned")}
    values = parts["tuned"] - parts["base"] if which == "change" else parts[which]
    return crossed_mean(values, prompts)


# ---------------------------------------------------------------------------------------------------- training figures


def _column(rows: Iterable[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def last_mean(rows: Sequence[Row], key: str) -> float | None:
    """Average ``key`` over the last tenth of the iterations (at least one) that have it; None where none has."""
    values = _column(rows, key)
    return float(np.mean(values[-max(1, round(LAST * len(values))) :])) if values else None


def _average(rows: Sequence[Row], key: str) -> float | None:
    values = _column(rows, key)
    return float(np.mean(values)) if values else None


def _total(rows: Sequence[Row], key: str) -> float | None:
    values = _column(rows, key)
    return float(np.sum(values)) if values else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def clip_note(label: str, fraction: float | None, updates: int, ratio_methods: Sequence[str]) -> tuple[str, str]:
    """Say how often the baseline's ratio was clipped, and warn where that is too seldom to compare ``ratio_methods``.

    updates: optimizer steps a rollout. ratio_methods: those whose ratio, loss or clip range differs from the baseline's.
    Returns the fact, and a warning where there are such methods and clipping acted on less than ``MIN_CLIP`` or in fewer
    than ``MIN_UPDATES`` updates, else "".
    """
    shown = "was not recorded" if fraction is None else f"{100 * fraction:.1f}%"
    fact = f"clip fraction of {label}: {shown}, at {updates} update{'s' if updates > 1 else ''} a rollout"
    if not ratio_methods or (fraction is not None and fraction >= MIN_CLIP and updates >= MIN_UPDATES):
        return fact, ""
    verb = "differs" if len(ratio_methods) == 1 else "differ"
    return fact, (
        f"{', '.join(ratio_methods)} {verb} from {label} in ratio or clipping, which hardly acts where less than "
        f"{MIN_CLIP:.0%} is clipped or there are fewer than {MIN_UPDATES} updates a rollout ({fact}); raise "
        "objective.updates or objective.passes, or lower objective.clip_range, before reading much into the difference"
    )
