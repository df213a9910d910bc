"""One comparison from request to page: plan, run, judge, write."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowrl import __version__
from flowrl.comparison import planning
from flowrl.comparison.planning import Planned, PlannedMethod, Request, prepare
from flowrl.comparison.runs import DONE, Write, check_folder, finished, run_all, run_one, run_side_by_side
from flowrl.config import ConfigError
from flowrl.errors import UserError
from flowrl.evaluation import comparison_page
from flowrl.evaluation.comparison import MethodRuns, clip_note, compare_methods
from flowrl.evaluation.page import save


def compare(request: Request, command: str, write: Write, *, only: str | None = None) -> str:
    """Run every method over every seed and write comparison.json, comparison.md and compare.html; returns text to print.

    Runs that are finished are reused, and interrupted ones resumed. command: as recorded. write: takes lines about
    progress. only: do this one run (``METHOD-SEED``) and judge nothing. Raises ConfigError with every mistake before a
    model is loaded; SystemExit with 143 or 130 after a stop signal, with a checkpoint on disk.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "flowrl compare: is one process; start it without torchrun, and use --jobs for runs side by side"
        )
    planned = prepare(request)
    problems = [problem for _, config in planned.runs for problem in check_folder(config)]
    if problems:
        raise ConfigError(problems)
    runs = planned.runs
    if only is not None:
        named = dict(runs)
        if only not in named:
            raise UserError(f"--only: no run {only!r}; use one of {', '.join(named)}")
        if not finished(Path(named[only].run_dir)):
            run_one(named[only], command, write)
        return ""
    if request.jobs > 1:
        run_side_by_side(runs, words_of(request), request.jobs, request.out / "logs", write)
    else:
        run_all(runs, command, write)
    return write_comparison(planned, request.out, command)


def words_of(request: Request) -> list[str]:
    """Write a request as the words of the command line that make it again."""
    return [
        "compare", request.source, *request.overrides, "--methods", request.methods, "--seeds", request.seeds,
        "--budget", request.budget, "--out", str(request.out), "--jobs", str(request.jobs),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- results


def write_comparison(planned: Planned, out: Path, command: str) -> str:
    """Judge finished runs and write the three files and grid.png; returns the table as text."""
    methods = [read_runs(method) for method in planned.methods]
    gold = planning.gold_names(planned.methods[0].config)
    judged = compare_methods(methods, gold)
    first = planned.methods[0]
    objective = first.config.objective
    clip_text, clip_warning = clip_note(
        first.label, judged["methods"][first.label]["clip_fraction"], objective.updates * objective.passes,
        planning.ratio_methods(planned),
    )  # fmt: skip
    for method in planned.methods:
        judged["methods"][method.label] |= {
            "settings": method.settings, "iterations": method.config.iterations,
            "planned": {"forward_samples": method.forward, "backward_samples": method.backward},
            "runs": [config.run_dir for config in method.configs],
        }  # fmt: skip
    result = {
        "command": command, "version": __version__, "machine": _machine(planned), "seeds": list(planned.seeds),
        "budget": planned.budget, "budget_text": planning.budget_text(planned), "clip_text": clip_text,
        "warnings": [*([clip_warning] if clip_warning else []), *_warnings(planned, judged)], **judged,
    }  # fmt: skip
    grid = out / "grid.png"
    _grid(planned).save(grid)
    save(out / "comparison.json", json.dumps(result, indent=1, allow_nan=False))
    save(out / "comparison.md", comparison_page.markdown(result))
    configs = {m.label: (Path(m.config.run_dir) / "config.yaml").read_text(encoding="utf-8") for m in planned.methods}
    save(out / "compare.html", comparison_page.page(result, methods, grid, configs))
    return _text(result, out)


def read_runs(method: PlannedMethod) -> MethodRuns:
    """Read the finished runs of one method."""
    folders = [Path(config.run_dir) for config in method.configs]
    extra = [json.loads((folder / DONE).read_text(encoding="utf-8"))["spread"] for folder in folders]
    return MethodRuns(
        method.label,
        metrics=[_lines(folder / "metrics.jsonl") for folder in folders],
        samples=[_lines(folder / "samples.jsonl") for folder in folders],
        spread=[{side: {int(p): v for p, v in run[side].items()} for side in ("base", "tuned")} for run in extra],
        kl=method.config.objective.kl.form != "none",
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _machine(planned: Planned) -> Any:
    """Where the runs were made, as each recorded it: one machine, or a list where they differ."""
    found: list[Any] = []
    for _, config in planned.runs:
        machine = json.loads((Path(config.run_dir) / "evaluation.json").read_text(encoding="utf-8"))["machine"]
        if machine not in found:
            found.append(machine)
    return found[0] if len(found) == 1 else found


def _warnings(planned: Planned, judged: dict[str, Any]) -> list[str]:
    found = []
    if len(planned.seeds) == 1:
        found.append("one seed: the intervals cover prompts only, and another seed may turn the order round")
    measure = judged["measure"]
    if judged["base"].get(measure) is None or judged["base"][measure]["low"] is None:
        found.append("too few evaluation prompts for an interval; raise evaluation.count")
    return found


def _grid(planned: Planned) -> Any:
    """The base's kept pictures, then each method's, from the first seed."""
    from PIL import Image

    rows: list[tuple[str, Any, list[float | None]]] = []
    prompts: list[str] = []
    for method in planned.methods:
        folder = Path(method.config.run_dir)
        kept = json.loads((folder / DONE).read_text(encoding="utf-8"))["pictures"]
        prompts = [picture["prompt"] for picture in kept]
        for side in ("base", "tuned") if not rows else ("tuned",):
            images = []
            for number in range(len(kept)):
                with Image.open(folder / "compared" / f"{side}-{number}.png") as image:
                    images.append(np.asarray(image.convert("RGB")))
            label = "base" if side == "base" else method.label
            rows.append((label, np.stack(images), [picture[side] for picture in kept]))
    return comparison_page.picture_grid(rows, prompts)


def _text(result: dict[str, Any], out: Path) -> str:
    head, rows = comparison_page.columns(result)
    table: Sequence[Sequence[str]] = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    warnings = [f"warning: {text}" for text in result["warnings"]]
    ends = [f"table:  {out / 'comparison.md'}", f"report: {out / 'compare.html'}"]
    return "\n".join([*lines, "", *warnings, *([""] if warnings else []), *ends])
