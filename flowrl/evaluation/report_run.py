"""The report's sections on the run itself: pictures, time and calls, configuration, environment."""

from __future__ import annotations

import json
import math
import statistics as plain
from collections.abc import Sequence
from pathlib import Path

from flowrl.evaluation import charts
from flowrl.evaluation.page import escape, named, note, picture, swatch, table
from flowrl.evaluation.report_curves import all_keys
from flowrl.evaluation.report_outcome import flat
from flowrl.evaluation.run_files import GRIDS, PICTURES, RunFiles

MAX_EACH = 4
"""Pictures of one kind that a report holds: the first, the last, and some between."""


def pictures(runs: Sequence[RunFiles]) -> str:
    """Grids of the evaluation, then what the run drew of its training."""
    parts = []
    for run in runs:
        parts.append(named(runs, run))
        if not run.grids:
            parts.append(note("No grids yet: `flowrl eval` writes them."))
        for index, file in enumerate(run.grids):
            title = GRIDS.get(file.name, file.stem)
            state = " open" if index == 0 else ""
            parts.append(f"<details{state}><summary>{escape(title)}</summary>{picture(file, title)}</details>")
        for kind, title in PICTURES.items():
            files = spread(run.pictures.get(kind, []), MAX_EACH)
            shown = "".join(_numbered(file) for file in files)
            if shown:
                parts.append(f"<details><summary>{escape(title)}</summary>{shown}</details>")
    return "".join(parts)


def _numbered(file: Path) -> str:
    number = file.stem.rpartition("-")[2]
    title = f"iteration {int(number)}" if number.isdigit() else file.stem
    return picture(file, title)


def spread(files: Sequence[Path], count: int) -> list[Path]:
    """At most ``count`` files at even distances, the first and the last among them."""
    if len(files) <= count:
        return list(files)
    return [files[round(index * (len(files) - 1) / (count - 1))] for index in range(count)]


def cost(runs: Sequence[RunFiles]) -> str:
    """Seconds by phase, network calls and memory, means an iteration."""
    parts = []
    for run in runs:
        times = {key: _mean(run.column(key)) for key in run.keys if key.startswith("time/")}
        whole = times.pop("time/iteration_s", None)
        shares = [(key.removeprefix("time/").removesuffix("_s"), value) for key, value in times.items()]
        if shares:
            title = f"{run.label}: seconds an iteration" + (f", {whole:.3g} in all" if whole else "")
            parts.append(f'<div class="wide bar">{charts.stacked_bar(shares, title=title)}</div>')
    keys = [key for key in all_keys(runs) if key.startswith(("calls/", "memory/"))]
    if keys:
        head = ["mean an iteration", *(swatch(run) for run in runs)]
        rows = [[escape(key), *(_amount(run, key) for run in runs)] for key in keys]
        parts.append(table(head, rows))
    return "".join(parts) or note("No times in metrics.jsonl yet.")


def _mean(values: Sequence[float | None]) -> float:
    there = [value for value in values if value is not None and math.isfinite(value)]
    return plain.fmean(there) if there else 0.0


def _amount(run: RunFiles, key: str) -> str:
    return f"{_mean(run.column(key)):,.1f}" if key in run.keys else "-"


def configs(runs: Sequence[RunFiles]) -> str:
    """The resolved configuration of each run."""
    parts = []
    for run in runs:
        text = f"<pre>{escape(run.config)}</pre>" if run.config is not None else note("config.yaml is missing.")
        settings = (run.evaluation or {}).get("settings")
        if settings is not None:
            text += (
                f"<h3>Evaluation settings</h3><pre>{escape(json.dumps(settings, indent=2, ensure_ascii=False))}</pre>"
            )
        parts.append(f"<details><summary>{swatch(run)}</summary>{text}</details>")
    return "".join(parts)


def environment(runs: Sequence[RunFiles]) -> str:
    """Versions and machine of each run, as the run recorded them."""
    names = list(dict.fromkeys(name for run in runs for name in run.environment))
    if not names:
        return note("No environment.json: this run was made by a version that did not record it, or has not begun.")
    head = ["", *(swatch(run) for run in runs)] if len(runs) > 1 else []
    rows = [[escape(name), *(escape(flat(run.environment.get(name, "-"))) for run in runs)] for name in names]
    return table(head, rows, "facts")
