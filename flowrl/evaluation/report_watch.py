"""What a run must be watched for: the alarm's events, the score against gold and KL, failed rewards and updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowrl.evaluation import charts
from flowrl.evaluation.charts import Trace
from flowrl.evaluation.page import escape, figure, named, note, swatch, table
from flowrl.evaluation.report_curves import all_keys, chart
from flowrl.evaluation.run_files import RunFiles, number

MAX_EVENTS = 20
MAX_ERRORS = 5

# ------------------------------------------------------------------------------------------------------------- the alarm


def alarm(runs: Sequence[RunFiles]) -> str:
    """Evaluations at which something watched fell while the score rose, and which iterations were best."""
    return "".join(named(runs, run) + _alarm(run) for run in runs)


def _alarm(run: RunFiles) -> str:
    seen = [row for row in run.metrics if number(row.get("alarm/fired")) is not None]
    best = "; ".join(text for name, found in run.best.items() if (text := _best(name, found)))
    told = note(f"Best evaluations: {best}.") if best else ""
    if not seen:
        return note("No evaluation during training, so nothing was watched.") + told
    fired = [row for row in seen if row["alarm/fired"]]
    events = [row for row in seen if row["alarm/fired"] or number(row.get("alarm/streak"))]
    rows = [
        [
            escape(row.get("iteration")),
            '<b class="worse">fired</b>' if row["alarm/fired"] else "against",
            *_changes(row),
        ]
        for row in events[:MAX_EVENTS]
    ]
    if not fired:
        first = note(f"Not fired in {len(seen)} evaluations.")
    else:
        first = f'<p class="worse">Fired first at iteration {escape(fired[0].get("iteration"))}.</p>'
    legend = "Change since the best evaluation of that series; against: fell beyond its interval while the score rose."
    shown = (
        table(["iteration", "alarm", "what fell", "the score since then"], rows, "text") + note(legend) if rows else ""
    )
    return first + shown + told


def _best(name: str, found: Any) -> str:
    mean = number(found.get("mean")) if isinstance(found, Mapping) else None
    return "" if mean is None else f"{name.removeprefix('best_')} {mean:.3f} at iteration {found.get('iteration')}"


def _changes(row: Mapping[str, Any]) -> list[str]:
    """The series with the largest fall (of those that the row has), and the score's change since its best."""
    names = [
        key.removeprefix("alarm/")
        for key in row
        if key.startswith("alarm/") and f"{key}/score" in row and number(row[key]) is not None
    ]
    fell = [name for name in names if (number(row.get(f"alarm/{name}_high")) or 0) < 0] or names
    if not fell:
        return ["-", "-"]
    what = [f"{escape(name)} {_change(row, f'alarm/{name}')}" for name in fell]
    return ["<br>".join(what), "<br>".join(_change(row, f"alarm/{name}/score") for name in fell)]


def _change(row: Mapping[str, Any], key: str) -> str:
    mean, low, high = (number(row.get(f"{key}{end}")) for end in ("", "_low", "_high"))
    within = "" if low is None or high is None else f' <span class="quiet">[{low:+.3g}, {high:+.3g}]</span>'
    return "-" if mean is None else f"<b>{mean:+.3g}</b>{within}"


# ----------------------------------------------------------------------------------------------- the score against others


def against(runs: Sequence[RunFiles]) -> str:
    """Scatters by evaluation: gold and diversity against the score, and score and gold against the KL to the base."""
    golds = [key for key in all_keys(runs) if key.startswith("gold/") and not key.endswith(("_low", "_high"))]
    names = {key: key.replace("/", ": ") for key in golds}
    score, kl = "held-out score", "KL to the base, nats an element"
    pairs = [("eval/score", key, name, score) for key, name in (names | {"eval/diversity": "diversity"}).items()]
    pairs += [("kl", key, name, kl) for key, name in ({"eval/score": score} | names).items()]
    drawn = []
    for x, y, name, x_label in pairs:
        traces = [trace for run in runs if (trace := _trace(run, x, y)) is not None]
        if traces:
            drawn.append(
                charts.scatter_chart(traces, title=f"{name} against {x_label.partition(',')[0]}", x_label=x_label)
            )
    legend = (
        "One point an evaluation, joined in order, numbered by iteration; bars: recorded intervals. A path that goes right "
        "and down gains score and loses what the score stands for."
    )
    return figure(drawn, "Not two evaluations during training yet, so there is no path to draw.", legend)


def _trace(run: RunFiles, x: str, y: str) -> Trace | None:
    """The evaluations of a run that have both, None below two. The base is at KL 0."""
    points, low, high = [], [], []
    for row in run.metrics:
        at, value = _kl(row) if x == "kl" else number(row.get(x)), number(row.get(y))
        if at is None or value is None:
            continue
        points.append((at, value, str(row.get("iteration", ""))))
        low.append(number(row.get(f"{y}_low")))
        high.append(number(row.get(f"{y}_high")))
    if len(points) < 2 or (x == "kl" and not any(point[0] for point in points)):
        return None
    return Trace(run.label, points, low, high, run.color)


def _kl(row: Mapping[str, Any]) -> float | None:
    if row.get("iteration") == 0:
        return 0.0
    found = number(row.get("policy/kl_to_base"))
    return number(row.get("policy/kl")) if found is None else found


# -------------------------------------------------------------------------------------------------------------- failures


def failures(runs: Sequence[RunFiles]) -> str:
    """Samples without a reward, in training and evaluation, with their first errors; skipped updates."""
    head = ["", *(swatch(run) for run in runs)] if len(runs) > 1 else []
    counts = [_counts(run) for run in runs]
    names = list(dict.fromkeys(name for found in counts for name in found))
    rows = [[escape(name), *(escape(found.get(name, "-")) for found in counts)] for name in names]
    parts = [table(head, rows, "facts")] if rows else [note("No figures on failures in metrics.jsonl yet.")]
    if any(value for run in runs for value in run.column("score/invalid_fraction")):
        title = "samples without a score"
        parts.append(f'<div class="charts">{chart(runs, "score/invalid_fraction", title)}</div>')
    for run in runs:
        errors = _errors(run)
        if errors:
            items = "".join(f"<li>{escape(text)}</li>" for text in errors[:MAX_ERRORS])
            parts.append(named(runs, run) + f'<ul class="warnings">{items}</ul>')
    return "".join(parts)


def _counts(run: RunFiles) -> dict[str, str]:
    found = {}
    for key in run.keys:
        if key == "score/invalid" or (key.startswith("reward/") and key.endswith("/invalid")):
            values = [int(value) for value in run.column(key) if value is not None]
            worst = f", at most {max(values):,} in an iteration" if any(values) else ""
            name = "samples without a score" if key == "score/invalid" else f"not scored by {key.split('/')[1]}"
            found[name] = f"{sum(values):,}{worst}"
        elif key in ("score/gated", "update/skipped"):
            values = [int(value) for value in run.column(key) if value is not None]
            gated = key == "score/gated"
            found["left out by a gate" if gated else "updates skipped"] = f"{sum(values) if gated else max(values):,}"
    if run.samples:
        missing = sum(number(row.get("score")) is None and "score" in row for row in run.samples)
        found["evaluated pictures without a score"] = f"{missing:,} of {len(run.samples):,}"
    return found


def _errors(run: RunFiles) -> list[str]:
    """Different errors of rewards, in training first."""
    found: dict[str, None] = {}
    for row in run.metrics:
        for key, value in row.items():
            if key.startswith("reward/") and key.endswith("/error") and isinstance(value, str):
                found.setdefault(f"{key.split('/')[1]}: {value}", None)
    for row in run.samples:
        errors = row.get("errors")
        for name, text in errors.items() if isinstance(errors, dict) else ():
            found.setdefault(f"{name}: {text}", None)
    return list(found)
