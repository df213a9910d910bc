"""One self-contained HTML report of one or several runs: no script, no address outside the file.

What a run directory lacks is stated in the report; text from prompts, configs and files is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flowrl.errors import UserError
from flowrl.evaluation import page, process_section, report_curves, report_outcome, report_run, report_watch
from flowrl.evaluation.run_files import RunFiles, labels, read_run

Section = Callable[[Sequence[RunFiles]], str]
SECTIONS: tuple[tuple[str, Section], ...] = (
    ("Before and after", report_outcome.headline),
    ("Warnings", report_outcome.warnings),
    ("Alarm", report_watch.alarm),
    ("Pictures", report_run.pictures),
    ("Largest losses", report_outcome.losses),
    ("Rewards while training", report_curves.rewards),
    ("Held-out evaluation while training", report_curves.evaluations),
    ("Score against gold, diversity and KL", report_watch.against),
    ("Policy", report_curves.policy),
    ("Ratio, clipping and credit by step", report_curves.by_step),
    ("Process rewards", process_section.process),
    ("Failures", report_watch.failures),
    ("Time and calls", report_run.cost),
    ("Configuration", report_run.configs),
    ("Environment", report_run.environment),
)


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of ``runs`` to ``out`` (by default report.html in the first run directory); return its path.

    Reads config.yaml, metrics.jsonl, evaluation.json, samples.jsonl, best.json, environment.json, grids and pictures of
    each directory, as far as they are there. Raises UserError where there is no run, or a directory holds no part of one.
    """
    if not runs:
        raise UserError("report: no run directory given; name at least one, as in: flowrl report runs/demo")
    read = [
        read_run(Path(path), label, index) for index, (path, label) in enumerate(zip(runs, labels(runs), strict=True))
    ]
    target = Path(runs[0]) / "report.html" if out is None else Path(out)
    title = "flowrl: " + ", ".join(run.label for run in read)
    sections = [(name, make(read)) for name, make in SECTIONS]
    page.save(target, page.page(title, report_outcome.facts(read), sections))
    return target
