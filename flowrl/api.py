"""The public Python face: train, resume, evaluate, load_run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.config import check, load
from flowrl.config.schema import Config
from flowrl.errors import UserError

if TYPE_CHECKING:
    from flowrl.training.run import Callback, Run


@dataclass(frozen=True)
class RunFolder:
    """A run on disk. summary: evaluation.json, or None before the run has ended."""

    folder: Path
    config: Config
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None

    def text(self) -> str:
        """The figures before and after, and where the report is."""
        from flowrl.evaluation.statistics import summary_text

        lines = [] if self.summary is None else [summary_text(self.summary), ""]
        return "\n".join([*lines, f"report: {self.folder / 'report.html'}"])


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def train(
    config: Config | str | Path, callbacks: Sequence[Callback] = (), *, command: str = "flowrl.train"
) -> RunFolder:
    """Fine-tune as ``config`` says (a Config, a YAML file or the name of a shipped recipe) and return the finished run.

    callbacks: called after each iteration with its number and its metrics. Raises UserError for a mistake in the config,
    before a model is loaded; SystemExit with 143 or 130 after a stop signal, with a checkpoint on disk.
    """
    config = config if isinstance(config, Config) else load(config)
    backend = _backend(config)
    config = _checked(config, backend)
    folder = Path(config.run_dir)
    # Asked of all processes before any goes on, since the first is about to write that file.
    if backend.largest(int((folder / "config.yaml").exists())):
        raise UserError(
            f"run_dir: {folder} already holds a run; choose another with run_dir=..., or continue it with "
            f"flowrl train --resume {folder}"
        )
    run = _open(config, folder, command, callbacks, backend)
    if backend.leads:
        run.prepare()
    return _go(run)


def resume(folder: str | Path, overrides: Sequence[str] = (), callbacks: Sequence[Callback] = ()) -> RunFolder:
    """Continue the run of ``folder`` from its newest good checkpoint, bit-exactly on one machine."""
    from flowrl.checkpoint import store

    folder = Path(folder)
    config = load(folder / "config.yaml", overrides)
    backend = _backend(config)
    config = _checked(config, backend)
    root = folder / "checkpoints"
    loaded = store.load(root) if store.list_checkpoints(root) else None
    run = _open(config, folder, _command(folder), callbacks, backend)
    if loaded is None:
        _write(f"{folder}: no checkpoint yet, starting at iteration 0")
        run.cut(-1)
    else:
        run.restore(loaded)
    return _go(run)


def evaluate(
    source: str | Path, overrides: Sequence[str] = (), *, config: str = "", out: str | Path | None = None
) -> str:
    """Evaluate a run, a checkpoint, an exported LoRA, a pipeline's folder or a recipe; returns the table as text.

    The first three are judged against their base, from the same prompts and noise. config: the recipe that says which model,
    prompts and rewards, where no run around ``source`` does; out: folder of the results (see ``sources.find`` for the
    defaults). Under torchrun the processes share the work, and all but the first return "". Raises UserError.
    """
    from flowrl.evaluation.report import write_report
    from flowrl.evaluation.sources import find
    from flowrl.evaluation.statistics import summary_text
    from flowrl.training.evaluate import evaluate_source

    found = find(source, overrides, config, out)
    named = ["--config", config] if config else []
    own = shlex.join(["flowrl", "eval", str(source), *named, *overrides])
    backend = _backend(None)
    try:
        command = _command(found.path) if found.kind == "run" else own
        summary = evaluate_source(found, command, backend, _write)
    finally:
        backend.close()
    if summary is None:
        return ""
    report = write_report([found.out])
    return (
        summary_text(summary)
        + f"\n\nsamples: {found.out / 'samples.jsonl'}\ngrids:   {found.out / 'grids'}\nreport:  {report}"
    )


def load_run(folder: str | Path) -> RunFolder:
    """Read a run's config, metrics and summary. UserError where ``folder`` holds no run."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} holds no run: it has no config.yaml")
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    summary = folder / "evaluation.json"
    return RunFolder(
        folder, load(folder / "config.yaml"), rows, json.loads(summary.read_text()) if summary.exists() else None
    )


def _checked(config: Config, backend: Any) -> Config:
    """What can be found wrong before a model is loaded: the settings, and the packages of the trackers."""
    from flowrl.config.model import require as require_attention
    from flowrl.tracking import require

    config = check(config, backend.world)
    require_attention(config.model)
    if backend.leads:
        require(config.tracking)
    return config


def _backend(config: Config | None) -> Any:
    """The processes of a run, as many as its config asks for; it says how many there really are."""
    from flowrl.distributed.backend import Backend

    if config is None:
        return Backend()
    backend = Backend(config.distributed.processes, config.distributed.timeout_s, config.distributed.sharding)
    if backend.leads:
        _write(f"running on {backend.describe()}")
    return backend


def _command(folder: Path) -> str:
    """The command that began the run, from the first line of its config."""
    first = (folder / "config.yaml").read_text(encoding="utf-8").split("\n", 1)[0]
    return first.partition(": ")[2] if first.startswith("# flowrl") else "flowrl train"


def _open(config: Config, folder: Path, command: str, callbacks: Sequence[Callback], backend: Any) -> Run:
    from flowrl.training.build import build
    from flowrl.training.run import Run

    return Run(config, build(config, backend), folder, command, _write, callbacks)


def _go(run: Run) -> RunFolder:
    try:
        code = run.go()
    finally:
        run.trainer.rewards.close()
        run.parts.evaluation_rewards.close()
        run.trainer.backend.close()
    if code:
        raise SystemExit(code)
    return load_run(run.folder)
