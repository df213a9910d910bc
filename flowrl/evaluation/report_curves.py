"""The report's curves by iteration: rewards, held-out evaluation, policy, and what each step of the schedule does."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Sequence

from flowrl.evaluation import charts
from flowrl.evaluation.charts import Series
from flowrl.evaluation.page import figure, note
from flowrl.evaluation.run_files import RunFiles, number

WINDOW = 9  # iterations in a moving mean
MAX_POINTS = 400  # values a line keeps
_FRACTIONS = (
    "strict", "clip_fraction", "clip_fraction_low", "clip_fraction_high", "live_fraction", "invalid_fraction",
    "variance_share",
)  # fmt: skip
_POLICY = {
    "policy/kl": "KL to the reference, in the loss", "policy/kl_to_base": "KL to the base, nats an element",
    "policy/ratio_mean": "mean ratio", "policy/clip_fraction": "clip fraction",
    "policy/clip_fraction_low": "clip fraction, below", "policy/clip_fraction_high": "clip fraction, above",
    "group/live_fraction": "groups with a signal", "group/std_mean": "score spread within groups",
    "optimizer/grad_norm": "gradient norm", "optimizer/lr": "learning rate",
}  # fmt: skip
_SILENT = ("policy/kl", "policy/clip_fraction_low", "policy/clip_fraction_high")
_STEPS = (
    ("policy/ratio_mean", "ratio", 1.0),
    ("policy/clip_fraction", "clipped", None),
    ("advantage/abs_mean", "mean |advantage|", None),
)


def series(run: RunFiles, key: str, *, smooth: bool) -> Series:
    """One line of a run: with its own interval where the rows have one, else smoothed on request."""
    x = [number(row.get("iteration")) or 0.0 for row in run.metrics]
    y = run.column(key)
    low, high, points = run.column(f"{key}_low"), run.column(f"{key}_high"), None
    kept = [index for index, value in enumerate(y) if value is not None and math.isfinite(value)]
    if any(value is not None for value in low):
        smooth = False
    elif smooth and len(kept) >= 2 * WINDOW:
        points, (y, low, high) = y, moving(y)
    kept = [index for index in kept if y[index] is not None]
    kept = [kept[index] for index in range(0, len(kept), math.ceil(len(kept) / MAX_POINTS))] if kept else []

    def take(column: Sequence[float | None] | None) -> list[float | None] | None:
        return None if column is None else [column[index] for index in kept]

    return Series(
        run.label, [x[index] for index in kept], take(y) or [], take(low), take(high), take(points),
        dots=len(kept) <= 30 and points is None, color=run.color,
    )  # fmt: skip


def moving(values: Sequence[float | None]) -> tuple[list[float | None], list[float | None], list[float | None]]:
    """Return the centred mean over WINDOW iterations, and that mean less and plus two standard errors."""
    mean: list[float | None] = []
    error: list[float] = []
    for index in range(len(values)):
        near = [
            v
            for v in values[max(0, index - WINDOW // 2) : index + WINDOW // 2 + 1]
            if v is not None and math.isfinite(v)
        ]
        mean.append(plain.fmean(near) if near else None)
        error.append(2 * plain.stdev(near) / math.sqrt(len(near)) if len(near) > 1 else 0.0)
    low = [None if m is None else m - e for m, e in zip(mean, error, strict=True)]
    high = [None if m is None else m + e for m, e in zip(mean, error, strict=True)]
    return mean, low, high


def chart(
    runs: Sequence[RunFiles], key: str, title: str, *, smooth: bool = False, reference: float | None = None
) -> str:
    """One metric of all runs that have it."""
    lines = [series(run, key, smooth=smooth) for run in runs if key in run.keys]
    return charts.line_chart(lines, title=title, percent=key.split("/")[-1] in _FRACTIONS, reference=reference)


def all_keys(runs: Sequence[RunFiles]) -> list[str]:
    """The metrics of all runs, each once."""
    return list(dict.fromkeys(key for run in runs for key in run.keys))


def _is_bound(key: str) -> bool:
    return key.endswith(("_low", "_high"))


def rewards(runs: Sequence[RunFiles]) -> str:
    """The score, each reward's own scale, and how much of the score's variance each one makes."""
    have = all_keys(runs)
    keys = [key for key in have if key.startswith("reward/") and key.split("/")[-1] in ("mean", "strict")]
    drawn = [chart(runs, key, key, smooth=True) for key in [*(["score/mean"] if "score/mean" in have else []), *keys]]
    legend = (
        f"Dots: one iteration each. Line: mean over {WINDOW} iterations; band: two standard errors of that mean, "
        "from the spread between iterations. A run too short for this shows its values."
    )
    return figure(drawn, "No reward in metrics.jsonl yet.", legend) + _shares(runs)


def _shares(runs: Sequence[RunFiles]) -> str:
    """Share of each reward in the variance of the score: one chart a run, all its rewards in it."""
    drawn = []
    for run in runs:
        keys = [key for key in run.keys if key.startswith("reward/") and key.endswith("/variance_share")]
        lines = [_recolored(run, key, index) for index, key in enumerate(keys)]
        if lines:
            title = "share of the score's variance" + (f", {run.label}" if len(runs) > 1 else "")
            drawn.append(charts.line_chart(lines, title=title, percent=True))
    legend = (
        "Shares of the variance of the score within groups; they add up to 100%. A reward with almost none teaches nothing, "
        "whatever its weight."
    )
    return figure(drawn, "", legend) if drawn else ""


def _recolored(run: RunFiles, key: str, index: int) -> Series:
    line = series(run, key, smooth=True)
    name = key.removeprefix("reward/").removesuffix("/variance_share")
    color = charts.COLORS[index % len(charts.COLORS)]
    return Series(name, line.x, line.y, line.low, line.high, line.points, line.dots, color)


def evaluations(runs: Sequence[RunFiles]) -> str:
    """Held-out measures with their intervals, gold among them; picture statistics folded away."""
    have = all_keys(runs)
    keys = [key for key in have if key.startswith(("eval/", "gold/")) and not _is_bound(key)]
    missing = "No evaluation during training (evaluation.every is 0, or none was due yet)."
    shown = figure(
        [chart(runs, key, key) for key in keys], missing, "Bands: the intervals recorded with each evaluation."
    )
    drawn = [chart(runs, key, key.removeprefix("picture/")) for key in have if key.startswith("picture/")]
    if not drawn:
        return shown
    folded = figure(drawn, "", "Means over the evaluated pictures: a jump here without one in gold is worth a look.")
    return f"{shown}<details><summary>Picture statistics</summary>{folded}</details>"


def policy(runs: Sequence[RunFiles]) -> str:
    """How far the policy moves."""
    have = all_keys(runs)
    shown = [key for key in _POLICY if key in have and (key not in _SILENT or _ever_above(runs, key))]
    drawn = [chart(runs, key, _POLICY[key], reference=1.0 if key == "policy/ratio_mean" else None) for key in shown]
    return figure(drawn, "No policy figures in metrics.jsonl yet.")


def _ever_above(runs: Sequence[RunFiles], key: str) -> bool:
    """A metric that is 0 throughout says nothing, such as the KL without a KL term."""
    return any(value for run in runs for value in run.column(key))


def by_step(runs: Sequence[RunFiles]) -> str:
    """Ratio, clip fraction and size of the advantages of each step of the schedule."""
    parts = []
    for key, name, level in _STEPS:
        steps = sorted({int(k.rpartition("_")[2]) for k in all_keys(runs) if _step_of(k, key)})
        panels = [
            (f"{name}, step {step}",
             [series(run, f"{key}/step_{step}", smooth=False) for run in runs if f"{key}/step_{step}" in run.keys])
            for step in steps
        ]  # fmt: skip
        if panels:
            drawn = charts.small_multiples(panels, percent=name == "clipped", reference=level)
            parts.append(f'<div class="charts small">{drawn}</div>')
    legend = (
        "Step 0 starts from noise. Only trained steps have figures; gaps are iterations whose window lay elsewhere."
    )
    return "".join(parts) + note(legend) if parts else note("No figures by step in metrics.jsonl yet.")


def _step_of(key: str, prefix: str) -> bool:
    return key.startswith(f"{prefix}/step_") and key.rpartition("_")[2].isdigit()
