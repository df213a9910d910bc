"""Read run directories for the report: what is there, what is not, and what the numbers warn of."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.evaluation.charts import COLORS
from flowrl.evaluation.statistics import summarise, summary_text

GRIDS = {
    "change.png": "Base beside tuned: gains, unchanged, losses",
    "worst.png": "Largest losses first: where reward hacking would show",
    "tuned.png": "Tuned pictures, one a prompt, chosen by no score",
    "video.png": "Videos that changed most, base above tuned",
    "video.webp": "Videos that changed most, base beside tuned, moving",
}
PICTURES = {
    "checkpoints": "Base, in-training evaluations and tuned, largest losses first",
    "group": "Groups while training, by advantage",
    "steps": "One sample step by step: clean estimates and the credit of each step",
    "video": "Best and worst videos of groups while training",
}
_NUMBERED = re.compile(r"(group|steps|video)-\d{6}\.(png|webp)")
MIN_LIVE = 0.2
"""Below this share of groups with a signal the report warns."""


@dataclass
class RunFiles:
    """What could be read of one run directory; ``warnings`` says what could not, and what the numbers warn of."""

    path: Path
    label: str
    color: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    grids: list[Path] = field(default_factory=list)
    pictures: dict[str, list[Path]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def column(self, key: str) -> list[float | None]:
        """The finite numbers of one metric, row by row; None where a row has none."""
        return [number(row.get(key)) for row in self.metrics]

    @functools.cached_property
    def keys(self) -> dict[str, None]:
        """Metrics with at least one finite number, in the order of their first."""
        return dict.fromkeys(key for row in self.metrics for key in row if number(row[key]) is not None)


def labels(runs: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where names repeat."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def read_run(path: Path, label: str, index: int) -> RunFiles:
    """Read what a run directory holds. Raises UserError where it holds no part of a run."""
    known = ("config.yaml", "metrics.jsonl", "evaluation.json", "samples.jsonl")
    if not any((path / name).is_file() for name in known):
        raise UserError(f"report: {path} is no run directory (none of {', '.join(known)} there); name the run's folder")
    run = RunFiles(path, label, COLORS[index % len(COLORS)])
    if (path / "config.yaml").is_file():
        run.config = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
        run.facts = _first_line(run.config)
    else:
        run.warnings.append("config.yaml is missing")
    run.metrics = _json_lines(run, "metrics.jsonl")
    if not run.metrics:
        run.warnings.append("metrics.jsonl is missing or has no rows: no curves")
    run.samples = _json_lines(run, "samples.jsonl")
    run.best = _json_object(run, "best.json") or {}
    run.environment = _json_object(run, "environment.json") or {}
    run.evaluation = _evaluation(run)
    if run.evaluation is None:
        run.warnings.append("no evaluation yet: neither evaluation.json nor samples.jsonl has results")
    run.grids = [path / "grids" / name for name in GRIDS if (path / "grids" / name).is_file()]
    run.grids += sorted(set((path / "grids").glob("*.png")) - set(run.grids))
    if not run.grids:
        run.warnings.append("no grids yet")
    run.pictures = _pictures(path / "pictures")
    run.warnings += _judged(run)
    return run


def _pictures(folder: Path) -> dict[str, list[Path]]:
    """What the run drew of its training, by kind, in the order of iterations."""
    found: dict[str, list[Path]] = {}
    if (folder / "checkpoints.png").is_file():
        found["checkpoints"] = [folder / "checkpoints.png"]
    for file in sorted(folder.glob("*-*.*"), key=lambda file: (file.stem, file.suffix)):
        matched = _NUMBERED.fullmatch(file.name)
        if matched:
            found.setdefault(matched[1], []).append(file)
    return found


def _first_line(config: str) -> dict[str, Any]:
    """Version and command, which a run writes as the first line of its config: ``# flowrl VERSION: COMMAND``."""
    name, colon, command = config.partition("\n")[0].partition(": ")
    if not (colon and name.startswith("# flowrl ")):
        return {}
    return {"command": command, "version": name.removeprefix("# flowrl ")}


def _evaluation(run: RunFiles) -> dict[str, Any] | None:
    """The summary in evaluation.json, else one of samples.jsonl; adds the facts and warnings that come with it."""
    found = _json_object(run, "evaluation.json")
    try:
        if found is not None:
            summary_text(found)  # reads all that the report will read
            run.facts |= {key: found[key] for key in ("command", "version", "machine", "world") if key in found}
            run.warnings += [str(text) for text in found.get("warnings", [])]
            return found
        return summarise(run.samples) if run.samples else None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        name = "samples.jsonl" if found is None else "evaluation.json"
        run.warnings.append(f"{name}: not a summary this version can read ({type(error).__name__}: {error})")
        return None


def _json_object(run: RunFiles, name: str) -> dict[str, Any] | None:
    file = run.path / name
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        run.warnings.append(f"{name} could not be read: {error}")
        return None
    if not isinstance(found, dict):
        run.warnings.append(f"{name} holds no object")
        return None
    return found


def _json_lines(run: RunFiles, name: str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; broken lines (a run that was cut off) are left out and counted in a warning."""
    file = run.path / name
    rows, broken = [], []
    for count, line in enumerate(file.read_bytes().splitlines() if file.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(count)
    if broken:
        run.warnings.append(f"{name}: {len(broken)} broken lines left out, the first is line {broken[0]}")
    return rows


def _judged(run: RunFiles) -> list[str]:
    """Warnings that the numbers themselves call for."""
    found = []
    change = (run.evaluation or {}).get("difference") or {}
    for name in ("strict", "dense"):
        part = change.get(name)
        if not part:
            continue
        if part["low"] is None:
            found.append(f"{name}: too few prompts to tell a change")
        elif part["low"] <= 0 <= part["high"]:
            found.append(f"{name}: the interval of the change includes 0, so this evaluation cannot tell a change")
    strict, dense = change.get("strict"), change.get("dense")
    if strict and dense and (dense["low"] or 0) > 0 and (strict["high"] or 0) < 0:
        found.append("the dense score rose while strict accuracy fell: look for reward hacking in the worst pictures")
    live = [value for value in run.column("group/live_fraction") if value is not None][-10:]
    if live and statistics.fmean(live) < MIN_LIVE:
        found.append(f"only {statistics.fmean(live):.0%} of the groups carried a signal in the last iterations")
    bad = {
        key for row in run.metrics for key, value in row.items() if isinstance(value, float) and number(value) is None
    }
    return found + ([f"not finite at least once: {', '.join(sorted(bad))}"] if bad else [])


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that JSON may hold."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
