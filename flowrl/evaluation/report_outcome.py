"""The report's first sections: what was run, base against tuned, warnings, where tuned lost most."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flowrl.evaluation.page import escape, named, note, swatch, table
from flowrl.evaluation.run_files import RunFiles, number
from flowrl.evaluation.statistics import cell, table_lines

SIDES = ("base", "tuned", "difference")
MAX_LOSSES = 8
_MISSING = "-"


def facts(runs: Sequence[RunFiles]) -> str:
    """Command, version, machine and how far each run came."""
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    head = ["", *(swatch(run) for run in runs)] if len(runs) > 1 else []
    rows = [[escape(name), *(escape(flat(run.facts.get(name, "-"))) for run in runs)] for name in names]
    done = [str(sum(bool(row.get("iteration")) for row in run.metrics)) for run in runs]  # row 0 is the base
    return table(head, [*rows, ["iterations recorded", *done]], "facts")


def flat(value: Any) -> str:
    """Write a JSON value in one line, objects as ``name value, name value``."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {flat(part)}" for name, part in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def headline(runs: Sequence[RunFiles]) -> str:
    """Base, tuned and change with intervals, then wins and distances where they were measured."""
    judged = [(run, run.evaluation) for run in runs if run.evaluation and any(run.evaluation.get(s) for s in SIDES)]
    if not judged:
        return note("No evaluation yet: run `flowrl eval` on this run, then `flowrl report` again.")
    lines: dict[
        tuple[str, ...], tuple[str, tuple[str, ...]]
    ] = {}  # by path (a heading: by text), so that runs share rows
    head = [""]
    for run, summary in judged:
        side = next(name for name in reversed(SIDES) if summary.get(name))
        for label, path in table_lines({"dense_reward": "score"} | summary, side):
            lines.setdefault(path or (label,), (label, path))
        first = f"{swatch(run)}<br>base" if len(runs) > 1 else "base"
        head += [first, "tuned", "change"]
    rows = _rows(list(lines.values()), [summary for _, summary in judged])
    level = 100 * float(judged[0][1].get("level", 0.95))
    counts = [f"{summary['difference']['pictures']:,}" for _, summary in judged if summary.get("difference")]
    pairs = f"{', '.join(counts)} paired pictures, same prompts and noise on both sides; " if counts else ""
    legend = f"{pairs}brackets: {level:g}% bootstrap intervals over prompts; strict changes in percentage points."
    shown = table(head, rows, "result" if len(judged) == 1 else "result many") + note(legend)
    more = [(run, _wins(summary) + _distances(summary)) for run, summary in judged]
    return shown + "".join(named(runs, run) + text for run, text in more if text)


def _rows(lines: Sequence[tuple[str, tuple[str, ...]]], summaries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of the lines that some run has a number for, and of the headings that have a line below them."""
    rows: list[list[str]] = []
    headed = False
    for label, path in lines:
        name = escape(label.strip())
        row = [f'<span class="tag">{name}</span>' if label.startswith(" ") else name]
        for summary in summaries:
            row += [_interval(summary.get(side), path, signed=side == "difference") for side in SIDES]
        if path and set(row[1:]) == {_MISSING}:
            continue
        if not path and headed:
            rows.pop()  # a heading with nothing below it
        headed = not path
        rows.append(row)
    if headed:
        rows.pop()
    return rows


def _interval(block: Mapping[str, Any] | None, path: Sequence[str], *, signed: bool) -> str:
    if not block:
        return _MISSING if path else ""
    text = cell(block, path, signed=signed)
    if text == _MISSING:
        return text
    mean, _, rest = text.partition(" ")
    kind = ""
    if signed and rest.startswith("["):
        low, high = (float(part) for part in rest.strip("[]").split(", "))
        kind = ' class="better"' if low > 0 else ' class="worse"' if high < 0 else ""
    return f'<b{kind}>{escape(mean)}</b> <span class="quiet">{escape(rest)}</span>'


def _wins(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, found in ((summary.get("difference") or {}).get("wins") or {}).items():
        if not found:
            continue
        rate, low, high = (number(found["rate"].get(key)) for key in ("mean", "low", "high"))
        if rate is None:
            continue
        kind = ' class="better"' if low is not None and low > 0.5 else ""
        kind = ' class="worse"' if high is not None and high < 0.5 else kind
        within = "" if low is None or high is None else f"[{100 * low:.1f}, {100 * high:.1f}]"
        counts = [f"{found.get(key, 0):,}" for key in ("better", "same", "worse")]
        cells = f'<b{kind}>{100 * rate:.1f}%</b> <span class="quiet">{within}</span>'
        rows.append([escape(name), cells, *counts])
    if not rows:
        return ""
    legend = "Share of pairs in which tuned has the higher score, a tie counting half."
    return table(["wins of tuned over base", "rate", "better", "same", "worse"], rows, "numbers") + note(legend)


def _distances(summary: Mapping[str, Any]) -> str:
    rows, kinds = [], ("kid", "cmmd", "fid")
    for network, pairs in (summary.get("distances") or {}).items():
        for pair, found in pairs.items():
            rows.append(
                [f"{escape(network)}, {escape(pair.replace('_', ' to '))}", *(_distance(found.get(k)) for k in kinds)]
            )
    return table(["distance between sets of pictures", *kinds], rows, "numbers") if rows else ""


def _distance(found: Any) -> str:
    if isinstance(found, Mapping):
        mean, spread = number(found.get("mean")), number(found.get("std"))
        return "-" if mean is None or spread is None else f'{mean:.4g} <span class="quiet">std {spread:.2g}</span>'
    value = number(found)
    return "-" if value is None else f"{value:.4g}"


def warnings(runs: Sequence[RunFiles]) -> str:
    """What could not be read, and what the numbers warn of."""
    items = [
        f"<li>{escape(f'{run.label}: ' if len(runs) > 1 else '')}{escape(text)}</li>"
        for run in runs
        for text in run.warnings
    ]
    return f'<ul class="warnings">{"".join(items)}</ul>' if items else note("None.")


def losses(runs: Sequence[RunFiles]) -> str:
    """The pairs whose score fell most, with what the reward says it saw in the tuned picture."""
    parts = []
    for run in runs:
        found = sorted(_fallen(run.samples), key=lambda pair: (pair[2], str(pair[1].get("prompt"))))[:MAX_LOSSES]
        rows = [
            [
                escape(tuned.get("prompt", "-")), f"{_number(base)} to {_number(tuned)}",
                f'<b class="worse">{change:+.2f}</b>', escape(base.get("detail") or "-"), escape(tuned.get("detail") or "-"),
            ]
            for base, tuned, change in found
        ]  # fmt: skip
        if rows:
            head = ["prompt", "score", "change", "seen in the base's picture", "seen in the tuned one"]
            parts.append(named(runs, run) + table(head, rows, "text"))
    legend = "The pairs whose score fell most: where reward hacking and forgetting show first."
    return (
        "".join(parts) + note(legend) if parts else note("No pair of pictures whose score fell, or no samples.jsonl.")
    )


def _number(row: Mapping[str, Any]) -> str:
    value = number(row.get("score"))
    return "-" if value is None else f"{value:.2f}"


def _fallen(samples: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any], float]]:
    """(base row, tuned row, change) of the pairs whose score fell."""
    sides: dict[str, dict[Any, Mapping[str, Any]]] = {"base": {}, "tuned": {}}
    for row in samples:
        if row.get("which") in sides:
            sides[row["which"]][str(row.get("prompt_id")), str(row.get("member")), str(row.get("seed"))] = row
    pairs = []
    for key, tuned in sides["tuned"].items():
        base = sides["base"].get(key)
        before, after = number((base or {}).get("score")), number(tuned.get("score"))
        if base is not None and before is not None and after is not None and after < before:
            pairs.append((base, tuned, after - before))
    return pairs
