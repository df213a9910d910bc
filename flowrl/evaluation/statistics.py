"""Paired statistics of an evaluation: means, differences and win counts with bootstrap intervals over prompts.

Pictures of one prompt are not independent, so prompts are resampled, each with all its pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MIN_PROMPTS = 5
"""Below this many distinct prompts an interval would say more than the data can: none is given."""

ACCURACIES = ("strict", "dense", "exact", "edit", "substring")
"""Components of a reward that say whether a picture is right: GenEval's two, and those of OCR (see rewards/ocr.py)."""

_CHUNK = 2**22  # resampled indices held at a time
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval; low and high are None where too few prompts allow none."""

    mean: float
    low: float | None
    high: float | None

    def as_json(self) -> dict[str, float | None]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap_mean(
    values: npt.ArrayLike, prompt_ids: npt.ArrayLike, seed: int = 0, draws: int = 4000, level: float = 0.95
) -> Interval:
    """Estimate a mean and its percentile interval, resampling whole prompts with replacement.

    The mean over pictures is ``sum_p total_p / sum_p count_p``; each draw replaces the prompts p by as many drawn with
    replacement (cluster bootstrap; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13, percentile
    interval). It runs a few points narrow below some 20 prompts.

    values: float [N]; NaN marks a picture without a score and is left out. prompt_ids: int [N]. seed: of the
    resampling; equal inputs give equal intervals. level: coverage aimed at, in (0, 1). Raises ValueError for unequal
    lengths, no valid value, or a level or number of draws out of range.
    """
    tags = np.zeros(np.shape(values), np.int64)
    return bootstrap_tag_mean(values, prompt_ids, tags, seed, draws, level)


def bootstrap_tag_mean(
    values: npt.ArrayLike, prompt_ids: npt.ArrayLike, tags: npt.ArrayLike, seed: int = 0, draws: int = 4000,
    level: float = 0.95,
) -> Interval:  # fmt: skip
    """Estimate the mean over tags of the mean over each tag's pictures (GenEval's overall score), with its interval.

    Every tag counts alike, however many pictures it has; prompts are resampled within their tag. tags: [N]; an interval needs
    MIN_PROMPTS prompts of each. Otherwise as `bootstrap_mean`.
    """
    scores, ids, names = np.asarray(values, np.float64), np.asarray(prompt_ids), np.asarray(tags)
    if scores.ndim != 1 or scores.shape != ids.shape or scores.shape != names.shape:
        raise ValueError(f"bootstrap_mean: values {list(scores.shape)} and prompt_ids {list(ids.shape)} must be [N]")
    if not 0.0 < level < 1.0 or draws < 1:
        raise ValueError(f"bootstrap_mean: level {level} must lie in (0, 1) and draws {draws} be at least 1")
    valid = ~np.isnan(scores)
    if not valid.any():
        raise ValueError("bootstrap_mean: no valid value")
    parts = []
    for name in np.unique(names[valid]):
        rows = valid & (names == name)
        _, cluster = np.unique(ids[rows], return_inverse=True)
        parts.append((np.bincount(cluster, scores[rows]).astype(np.float64), np.bincount(cluster).astype(np.float64)))
    mean = sum(float(totals.sum() / counts.sum()) for totals, counts in parts) / len(parts)
    if min(len(totals) for totals, _ in parts) < MIN_PROMPTS:
        return Interval(mean, None, None)
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for totals, counts in parts:
        means += _resampled(totals, counts, draws, rng) / len(parts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def _resampled(
    totals: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], draws: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Means of ``draws`` resamples of the prompts."""
    means: list[npt.NDArray[np.float64]] = []
    rows = max(1, _CHUNK // len(totals))
    for start in range(0, draws, rows):
        drawn = rng.integers(len(totals), size=(min(rows, draws - start), len(totals)))
        means.append(totals[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def paired_difference(
    base: npt.ArrayLike,
    tuned: npt.ArrayLike,
    prompt_ids: npt.ArrayLike,
    seed: int = 0,
    draws: int = 4000,
    level: float = 0.95,
) -> Interval:
    """Estimate the mean of ``tuned - base`` over pictures made from the same prompt and noise.

    base, tuned: float [N], row i of both the same prompt and noise; a pair with a NaN is left out. Otherwise as
    `bootstrap_mean`.
    """
    before, after = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
    if before.shape != after.shape:
        raise ValueError(f"paired_difference: base {list(before.shape)} and tuned {list(after.shape)} must match")
    return bootstrap_mean(after - before, prompt_ids, seed, draws, level)


Row = Mapping[str, Any]


def summarise(
    rows: Sequence[Row], *, main: str | None = None, seed: int = 0, draws: int = 4000, level: float = 0.95
) -> dict[str, Any]:
    """Summarise the rows of samples.jsonl, base against tuned, as JSON.

    rows: objects with ``which``, ``iteration``, ``prompt_id``, ``member``, ``seed``, ``tag``, ``scores``, ``strict``.
    Rows of other checkpoints are ignored; where tuned was evaluated more than once, the last iteration counts, and a
    row replaces an earlier one of the same prompt, member and seed. main: the reward shown as ``dense``; by default
    ``compositional`` where it is there, else the first.

    Returns ``{"dense_reward", "level", "base", "tuned", "difference"}``; each side is None where it has no rows, else
    holds ``pictures, prompts, strict, dense, scores {reward}, by_tag {tag: {pictures, prompts, strict, dense}}``. An
    interval is ``{mean, low, high}``, or None where there is nothing to average. The difference is over pairs, with
    ``outcomes``: how many pairs got better, the same and worse in the dense score. Rows of equal text are one prompt,
    whatever their ids (GenEval's file names each four times).

    Where rows have them, each side also holds ``gold`` (interval), ``accuracy {"label/component": {overall, tag_mean, by_tag
    {tag}}}`` of the components in ACCURACIES, and ``diversity {network: {spread, vendi}}``; the difference holds ``wins
    {label: {rate, better, same, worse}}``, the share of pairs in which tuned has the higher score, a tie counting half.
    """
    sides = {which: _side(rows, which) for which in ("base", "tuned")}
    names = list(dict.fromkeys(name for side in sides.values() for row in side.values() for name in row["scores"]))
    if main is None:
        main = "compositional" if "compositional" in names else (names[0] if names else "")
    settings = {"seed": seed, "draws": draws, "level": level}
    summary: dict[str, Any] = {"dense_reward": main, "level": level}
    for which, side in sides.items():
        columns = _columns([list(side.values())], names)
        summary[which] = _describe(columns, main, settings) if side else None
    keys = [key for key in sides["base"] if key in sides["tuned"]]
    paired = [[sides[which][key] for key in keys] for which in ("base", "tuned")]
    summary["difference"] = None
    if keys:
        columns = _columns(paired, names)
        described = _describe(columns, main, settings)
        wins = {name: _wins(values, columns.prompt_ids, settings) for name, values in columns.scores.items()}
        summary["difference"] = described | {"outcomes": _outcomes(columns, main), "wins": wins}
    return summary


@dataclass(frozen=True)
class _Columns:
    """Rows as arrays: values of one side, or tuned minus base."""

    prompt_ids: npt.NDArray[np.int64]
    tags: npt.NDArray[np.str_]
    strict: Values
    scores: dict[str, Values]
    gold: Values
    accuracy: dict[str, Values]
    diversity: dict[tuple[str, str], Values]


def _side(rows: Sequence[Row], which: str) -> dict[tuple[int, int, int], Row]:
    """Rows of one side by (prompt, member, seed), of its last iteration."""
    mine = [row for row in rows if row["which"] == which]
    last = max((row["iteration"] for row in mine), default=0)
    return {(row["prompt_id"], row["member"], row["seed"]): row for row in mine if row["iteration"] == last}


def _columns(sides: Sequence[Sequence[Row]], names: Sequence[str]) -> _Columns:
    """Turn one side's rows, or (base, tuned) rows in the same order, into values or differences."""

    def number(value: float | bool | None) -> float:
        return math.nan if value is None else float(value)

    def column(read: list[list[float]]) -> npt.NDArray[np.float64]:
        arrays = [np.array(values, np.float64) for values in read]
        return arrays[0] if len(arrays) == 1 else arrays[1] - arrays[0]

    def inner(key: str, name: str, part: str) -> Values:
        return column([[number(row.get(key, {}).get(name, {}).get(part)) for row in side] for side in sides])

    first = sides[0]
    parts = {
        key: dict.fromkeys(
            (name, part) for row in first for name, values in row.get(key, {}).items() for part in values
        )
        for key in ("components", "diversity")
    }
    return _Columns(
        prompt_clusters(first),
        np.array([row["tag"] or "" for row in first], np.str_),
        column([[number(row["strict"]) for row in side] for side in sides]),
        {name: column([[number(row["scores"].get(name)) for row in side] for side in sides]) for name in names},
        column([[number(row.get("gold")) for row in side] for side in sides]),
        {f"{n}/{p}": inner("components", n, p) for n, p in parts["components"] if p in ACCURACIES},
        {(n, p): inner("diversity", n, p) for n, p in parts["diversity"]},
    )


def prompt_clusters(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """Each row's prompt, int64 [N]: the first prompt id that its text has."""
    first: dict[Any, int] = {}
    return np.array([first.setdefault(row.get("prompt", row["prompt_id"]), row["prompt_id"]) for row in rows], np.int64)


def _describe(columns: _Columns, main: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    ids = columns.prompt_ids
    dense = columns.scores.get(main, np.full(len(ids), math.nan))

    def part(values: npt.NDArray[np.float64], chosen: npt.NDArray[np.bool_]) -> dict[str, float | None] | None:
        if np.isnan(values[chosen]).all():
            return None
        return bootstrap_mean(values[chosen], ids[chosen], **settings).as_json()

    def block(chosen: npt.NDArray[np.bool_]) -> dict[str, Any]:
        return {
            "pictures": int(chosen.sum()),
            "prompts": len(np.unique(ids[chosen])),
            "strict": part(columns.strict, chosen),
            "dense": part(dense, chosen),
        }

    everything = np.ones(len(ids), bool)
    tags = dict.fromkeys(str(tag) for tag in columns.tags if tag)

    def accuracy(values: Values) -> dict[str, Any]:
        several = len(tags) > 1 and not np.isnan(values).all()
        over_tags = bootstrap_tag_mean(values, ids, columns.tags, **settings).as_json() if several else None
        by_tag = {tag: part(values, columns.tags == tag) for tag in tags}
        return {"overall": part(values, everything), "tag_mean": over_tags, "by_tag": by_tag}

    diversity: dict[str, dict[str, Any]] = {}
    for (network, name), values in columns.diversity.items():
        diversity.setdefault(network, {})[name] = part(values, everything)
    return block(everything) | {
        "scores": {name: part(values, everything) for name, values in columns.scores.items()},
        "by_tag": {tag: block(columns.tags == tag) for tag in tags},
        "gold": part(columns.gold, everything),
        "accuracy": {name: accuracy(values) for name, values in columns.accuracy.items()},
        "diversity": diversity,
    }


def _wins(difference: Values, ids: npt.NDArray[np.int64], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The share of pairs with a positive difference, a difference of 0 counting half; None where no pair has both scores."""
    if np.isnan(difference).all():
        return None
    won = np.where(np.isnan(difference), np.nan, (np.sign(difference) + 1) / 2)
    return {"rate": bootstrap_mean(won, ids, **settings).as_json(), **_count(difference)}


def _outcomes(columns: _Columns, main: str) -> dict[str, int]:
    return _count(columns.scores.get(main, np.zeros(0)))


def _count(difference: Values) -> dict[str, int]:
    return {
        "better": int((difference > 0).sum()),
        "same": int((difference == 0).sum()),
        "worse": int((difference < 0).sum()),
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """Lay a summary out as an aligned table: base, tuned and change with intervals, overall and by tag."""
    sides = [name for name in ("base", "tuned", "difference") if summary.get(name)]
    if not sides:
        return "no evaluated pictures"
    heads = {"base": "base", "tuned": "tuned", "difference": "change"}
    table = [["", *(heads[name] for name in sides)]]
    for label, path in table_lines(summary, sides[-1]):
        table.append([label, *(cell(summary[name], path, signed=name == "difference") for name in sides)])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table]
    last = summary[sides[-1]]
    interval = f"{100 * summary['level']:g}% intervals, bootstrap over prompts"
    lines += ["", f"{last['pictures']:,} pictures of {last['prompts']:,} prompts; {interval}"]
    if "outcomes" in last:
        lines[-1] += "; change of strict in percentage points" if last["strict"] else ""
        counted = last["outcomes"]
        lines.append(f"dense score: {counted['better']} better, {counted['same']} the same, {counted['worse']} worse")
        lines += _win_lines(last.get("wins", {}))
    return "\n".join(
        [
            *lines,
            *_distance_lines(summary),
            *_search_lines(summary),
            *(f"warning: {text}" for text in summary.get("warnings", [])),
        ]
    )


def _search_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a search cost, of all pictures of all sides."""
    s = summary.get("search")
    if not s:
        return []
    each = max(1, s["pictures"])
    failed = f", {s['failed']:,} of them without a value" if s["failed"] else ""
    return [
        "",
        f"search: {s['kind']} of {s['width']} by {s['reward']}; {s['network']:,} latents through the network "
        f"({s['network'] / each:.4g} a picture), {s['scored']:,} candidates scored ({s['scored'] / each:.4g} a picture){failed}",
    ]


def _win_lines(wins: Mapping[str, Any]) -> list[str]:
    """Win rates of tuned over base, one line a reward."""
    known = {name: found for name, found in wins.items() if found}
    width = max(map(len, known), default=0)
    lines = [f"  {name:{width}}  {_shown(found['rate'], 100.0, 1, '', '%')}" for name, found in known.items()]
    return ["", "wins of tuned over base, a tie counting half", *lines] if lines else []


def _distance_lines(summary: Mapping[str, Any]) -> list[str]:
    """Distances between sets of pictures, one line a network and pair of sets."""
    rows = []
    for network, pairs in summary.get("distances", {}).items():
        for pair, found in pairs.items():
            values = [f"{name} {_distance(found[name])}" for name in ("kid", "cmmd", "fid") if name in found]
            rows.append((network, pair.replace("_", " to "), ", ".join(values)))
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"  {network:{widths[0]}}  {pair:{widths[1]}}  {text}" for network, pair, text in rows]
    return ["", "distances between sets of pictures, by features", *lines]


def _distance(found: float | Mapping[str, float]) -> str:
    if isinstance(found, Mapping):
        return f"{found['mean']:.4g} (std {found['std']:.2g} over subsets of {found['size']})"
    return f"{found:.4g}"


def table_lines(summary: Mapping[str, Any], side: str) -> list[tuple[str, tuple[str, ...]]]:
    """List a summary's rows: a label and the path of its interval, which is empty for a heading.

    Tags show strict accuracy, or the dense score without it.
    """
    block = summary[side]
    dense = f"dense ({summary['dense_reward']})"
    lines: list[tuple[str, tuple[str, ...]]] = [("strict", ("strict",))] if block["strict"] else []
    lines.append((dense, ("dense",)))
    lines += [(name, ("scores", name)) for name in block["scores"] if name != summary["dense_reward"]]
    if block.get("gold"):
        lines.append(("gold, weighted", ("gold",)))
    measure = "strict" if block["strict"] else "dense"
    if block["by_tag"]:
        lines.append((f"{measure}, by tag", ()))
    lines += [(f"  {tag}", ("by_tag", tag, measure)) for tag in block["by_tag"]]
    for name, found in block.get("accuracy", {}).items():
        lines += _accuracy_lines(name, found)
    parts = [(name, network) for network, found in block.get("diversity", {}).items() for name in found if found[name]]
    if parts:
        lines.append(("within prompts", ()))
    return lines + [(f"  {name} ({network})", ("diversity", network, name)) for name, network in parts]


def _accuracy_lines(name: str, found: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """Lines of one accuracy: what the lines of strict and dense do not say already."""
    label, _, component = name.rpartition("/")
    path = ("accuracy", name)
    lines: list[tuple[str, tuple[str, ...]]] = []
    if component not in ("strict", "dense"):
        lines.append((f"{component} ({label})", (*path, "overall")))
    if found["tag_mean"] and component != "dense":
        lines.append((f"{component} ({label}), mean of tags", (*path, "tag_mean")))
    if component not in ("strict", "dense") and len(found["by_tag"]) > 1:
        lines += [(f"  {tag}", (*path, "by_tag", tag)) for tag in found["by_tag"]]
    return lines


def cell(block: Mapping[str, Any], path: Sequence[str], *, signed: bool) -> str:
    """Show the interval at ``path`` as ``58.0% [55.1, 60.8]``: percent of strict and exact verdicts, else a number."""
    if not path:
        return ""
    found: Any = block
    for name in path:
        found = found.get(name) if found is not None else None
    if found is None:
        return "-"
    percent = path[-1] == "strict" or (path[0] == "accuracy" and path[1].endswith(("/strict", "/exact")))
    sign = "+" if signed else ""
    return _shown(found, 100.0, 1, sign, "" if signed else "%") if percent else _shown(found, 1.0, 3, sign, "")


def _shown(found: Mapping[str, Any], scale: float, digits: int, sign: str, unit: str) -> str:
    mean = f"{scale * found['mean']:{sign}.{digits}f}{unit}"
    if found["low"] is None:
        return f"{mean} (too few prompts)"
    return f"{mean} [{scale * found['low']:{sign}.{digits}f}, {scale * found['high']:{sign}.{digits}f}]"
