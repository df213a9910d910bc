"""The report's section on process rewards and critics: how good they are at each noise level."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flowrl.evaluation.run_files import RunFiles

_KEY = re.compile(r"process/(?P<label>.+)/(?P<what>accuracy|tau|slope|left_out)/(?P<level>\d+)")


def process_levels(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """Read the newest numbers of each process reward and noise level from metrics rows: label -> level -> name -> number."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        for key, value in row.items():
            match = _KEY.fullmatch(key)
            if match and isinstance(value, int | float) and not isinstance(value, bool):
                levels = found.setdefault(match["label"], {})
                levels.setdefault(int(match["level"]), {})[match["what"]] = float(value)
    return found


def process_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay the quality of process rewards out as an HTML table, noisiest level first; "" where a run has none.

    rows: of metrics.jsonl, oldest first. Pair accuracy is a running mean over iterations, tau and slope are of the last
    iteration that saw the level; all are within groups, against the score of the finished picture.
    """
    found = process_levels(rows)
    if not found:
        return ""
    lines = []
    for label, levels in found.items():
        failed = sum(int(row.get(f"process/{label}/invalid") or 0) for row in rows)
        for level in sorted(levels, reverse=True):
            numbers = levels[level]
            cells = [_shown(numbers.get(name)) for name in ("accuracy", "tau", "slope")]
            out = "left out of credit" if numbers.get("left_out") else "in use"
            cells = [html.escape(label), str(level), *cells, out, str(failed)]
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = (
        "process reward",
        "noise level (0 is the cleanest)",
        "pair accuracy",
        "tau",
        "slope",
        "credit",
        "failed values",
    )
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        '<p class="note">Within groups, against the score of the finished picture; pair accuracy 0.5 is chance.</p>'
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def process(runs: Sequence[RunFiles]) -> str:
    """Make the report's section: a table for each run that has process rewards."""
    found = [(run.label, process_table(run.metrics)) for run in runs]
    parts = [f"<h3>{html.escape(label)}</h3>{table}" if len(runs) > 1 else table for label, table in found if table]
    return "".join(parts) or '<p class="note">No process rewards.</p>'
