"""A run directory from start to report: loop, checkpoints, stop signals, evaluation."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowrl import __version__
from flowrl.checkpoint import store
from flowrl.checkpoint.signals import StopSignals
from flowrl.config.render import config_hash, to_mapping, to_yaml
from flowrl.config.schema import Config
from flowrl.errors import UserError
from flowrl.evaluation.card import write_card
from flowrl.evaluation.paired import Evaluated, evaluate
from flowrl.evaluation.report import write_report
from flowrl.evaluation.results import write_results
from flowrl.evaluation.statistics import bootstrap_mean
from flowrl.performance.environment import CORE, version
from flowrl.scoring import alarm
from flowrl.tracking import Trackers, open_trackers
from flowrl.tracking.jsonl import JsonLines, cut_after
from flowrl.tracking.progress import Progress
from flowrl.training import metrics
from flowrl.training.build import Parts
from flowrl.training.pictures import PictureBook

Callback = Callable[[int, Mapping[str, Any]], None]
MAX_FAILED_SAVES = 3


class Run:
    """Drives the parts of one run in its folder. write: takes a line of text for the user."""

    def __init__(
        self, config: Config, parts: Parts, folder: Path, command: str, write: Callable[[str], object],
        callbacks: Sequence[Callback] = (),
    ) -> None:  # fmt: skip
        self.config, self.parts, self.folder, self.command = config, parts, folder, command
        self.write, self.callbacks = write, callbacks
        self.trainer = parts.trainer
        self.leads = parts.trainer.backend.leads
        self.failed_saves = 0
        self.rolled_back = False
        self.watch = alarm.Watch(config.alarm, bootstrap_mean)
        self.improved = False
        self.tracker_ids: dict[str, str] = {}
        self.book: PictureBook | None = None
        if self.leads and config.tracking.pictures.enabled:
            self.book = PictureBook(self.trainer, parts.reference, folder / "pictures", write)

    # -- beginning -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Write the resolved config into a new folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = f"# flowrl {__version__}: {self.command}\n{to_yaml(self.config)}"
        (self.folder / "config.yaml").write_text(text, encoding="utf-8")

    def restore(self, loaded: store.Loaded) -> None:
        """Go on from a verified checkpoint; rows written after it are cut."""
        for warning in loaded.warnings:
            self.write(f"warning: {warning}")
        self.trainer.load_state(loaded.state)
        if "alarm" in loaded.state:  # not in those written before there was one
            self.watch.load(loaded.state["alarm"])
        self.tracker_ids = dict(loaded.state.get("trackers", {}))
        self.cut(self.trainer.iteration)

    def cut(self, iteration: int) -> None:
        if not self.leads:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_after(self.folder / name, iteration)
        if self.book is not None:
            self.book.cut(iteration)

    # -- the loop --------------------------------------------------------------------------------------------------

    def go(self) -> int:
        """Train to the end, evaluate, report. Returns 0, or the exit code of a stop signal (143, 130)."""
        config, trainer = self.config, self.trainer
        shown = config.tracking.progress and self.leads
        trainer.observer = self.book
        self.write_environment()
        with (
            StopSignals() as stop,
            JsonLines(self.folder / "metrics.jsonl") if self.leads else _Discard() as log,
            Progress(config.iterations, write=self.write, start=trainer.iteration, enabled=shown) as progress,
            self.open_trackers() as trackers,
        ):
            self.tracker_ids |= trackers.run_ids
            if trainer.iteration == 0 and config.evaluation.every:
                base = {"iteration": 0, **self.quick_evaluation(progress)}
                log.write(base)
                trackers.scalars(base, 0)
            while trainer.iteration < config.iterations:
                progress.phase("training")
                self.improved = False
                row = trainer.iterate()
                if trainer.skipped.hopeless:
                    self.roll_back(progress)
                    continue
                if config.evaluation.every and trainer.iteration % config.evaluation.every == 0:
                    row |= self.quick_evaluation(progress)
                log.write(row)
                trackers.scalars(row, trainer.iteration)
                for callback in self.callbacks:
                    callback(trainer.iteration, row)
                progress.advance(row["score/mean"], self.note(row))
                ended = trainer.iteration == config.iterations
                stopping = trainer.backend.largest(stop.requested or 0)  # any process's signal stops all of them
                if stopping or ended or self.due(config.checkpoint.every) or self.improved:
                    self.save(progress, must=bool(stopping) or ended)
                if stopping:
                    progress.message(
                        f"stopped at iteration {trainer.iteration}; go on with: flowrl train --resume {self.folder}"
                    )
                    return 128 + stopping
            self.finish(progress)
            return stop.exit_code

    def open_trackers(self) -> Trackers:
        """The optional trackers, in the first process alone; a resumed run goes on with the runs it has there."""
        if not self.leads:
            return Trackers()
        return open_trackers(
            self.folder, self.config.tracking, start=self.trainer.iteration + 1, config=to_mapping(self.config),
            run_ids=self.tracker_ids,
        )  # fmt: skip

    def write_environment(self) -> None:
        """Write environment.json: what the run, or its last part, was made with."""
        if self.leads:
            packages = {name: version(name) or "missing" for name in CORE}
            found = {"flowrl": __version__, **machine(), "processes": self.trainer.backend.world, "packages": packages}
            (self.folder / "environment.json").write_text(json.dumps(found, indent=1), encoding="utf-8")

    def due(self, every: int) -> bool:
        return every > 0 and self.trainer.iteration % every == 0

    @staticmethod
    def note(row: Mapping[str, Any]) -> str:
        return f"held-out {row['eval/strict']:.3f}" if row.get("eval/strict") is not None else ""

    def save(self, progress: Progress, *, must: bool) -> None:
        """Write a checkpoint. A full disk keeps the old one and is tried again, up to three times running.

        The first process writes; weights in shards are gathered there first, from all of them.
        """
        if not self.leads:
            if self.trainer.backend.sharded is not None:
                self.trainer.state()
            return
        info = {
            "config": config_hash(self.config),
            "flowrl": __version__,
            "torch": torch.__version__,
            "command": self.command,
            "alarm": self.watch.fired,
        }
        try:
            store.save(
                self.folder / "checkpoints", self.trainer.iteration,
                self.trainer.state() | {"alarm": self.watch.state(), "trackers": self.tracker_ids},
                info=info, keep=self.config.checkpoint.keep, protected=[at for at, _ in self.watch.best.values()],
            )  # fmt: skip
            self.failed_saves = 0
        except store.CheckpointWriteError as error:
            self.failed_saves += 1
            if must or self.failed_saves >= MAX_FAILED_SAVES:
                raise
            progress.message(f"warning: {error} Training goes on; the checkpoint is tried again at the next one.")

    def roll_back(self, progress: Progress) -> None:
        """After several updates in a row that were not finite: back to the last checkpoint with fresh noise, once a run."""
        reason = f"{self.trainer.skipped.consecutive} updates in a row had a gradient that is not finite"
        root = self.folder / "checkpoints"
        if self.rolled_back or not store.list_checkpoints(root):
            raise UserError(
                f"{reason}, at iteration {self.trainer.iteration}; the weights were left as they were. Lower optimizer.lr, "
                "use model.dtype=fp32, or look for a reward or prompt that makes latents overflow."
            )
        progress.message(f"warning: {reason}; going back to the last checkpoint with fresh noise")
        restarts = self.trainer.restarts + 1
        self.restore(store.load(root))
        self.trainer.restarts, self.rolled_back = restarts, True

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, which: str, prompts: Sequence[Any]) -> Evaluated:
        return evaluate(
            self.config, self.trainer.adapter, self.parts.evaluation_rewards, prompts, which, self.trainer.iteration,
            self.trainer.backend,
        )  # fmt: skip

    def quick_evaluation(self, progress: Progress) -> dict[str, Any]:
        """Means with intervals over the first ``evaluation.quick`` prompts, with the averaged weights."""
        progress.phase("evaluation")
        with self.trainer.weights.averaged():
            evaluated = self.evaluate("checkpoint", self.parts.evaluation_prompts[: self.config.evaluation.quick])
        if self.book is not None:
            self.book.keep(evaluated, self.trainer.iteration)
        gold = self.parts.evaluation_rewards.gold
        seen = metrics.judged(evaluated, gold)
        best = dict(self.watch.best)
        findings = self.watch.note(seen)
        changed = self.watch.best != best
        self.improved = changed and self.trainer.iteration > 0  # the base needs no checkpoint
        if changed and self.leads:
            self.write_best()
        told = alarm.warning(findings, self.watch.fired, self.config.alarm.patience)
        if told:
            progress.message(f"warning: iteration {self.trainer.iteration}: {told}")
        return metrics.of_evaluation(evaluated, seen, gold) | alarm.metrics(findings, self.watch)

    def write_best(self) -> None:
        """Write best.json: the iterations with the best score (best_proxy) and the best gold score, each kept as a checkpoint."""
        best = {key: {"iteration": at, "mean": mean} for key, (at, mean) in self.watch.best.items()}
        (self.folder / "best.json").write_text(json.dumps(best, indent=1, allow_nan=False), encoding="utf-8")

    def finish(self, progress: Progress) -> None:
        """Evaluate base and tuned weights in all processes; the first writes the export, the results and the report."""
        self.export()
        progress.phase("evaluating the base")
        with self.parts.reference():
            base = self.evaluate("base", self.parts.evaluation_prompts)
        progress.phase("evaluating the tuned model")
        with self.trainer.weights.averaged():
            tuned = self.evaluate("tuned", self.parts.evaluation_prompts)
        if self.leads:
            self.write_evaluation(base, tuned)
            if self.book is not None:
                self.book.finish(base, tuned)
            progress.phase("report")
            write_report([self.folder])
        self.trainer.backend.largest(0)  # nobody reads the folder before it is whole

    def write_evaluation(self, base: Evaluated, tuned: Evaluated) -> None:
        """Write what is known of two evaluations of the same prompts and noise, and the export's card."""
        facts = {
            "command": self.command, "iteration": self.trainer.iteration, "machine": machine(), "alarm": self.watch.fired,
        }  # fmt: skip
        evaluation = write_results(self.folder, self.config, self.parts.features, facts, base, tuned)
        write_card(self.folder, self.config, evaluation)

    def export(self) -> None:
        """Write the averaged weights to export/, as diffusers loads them: the first process, with the others' shards."""
        folder = self.folder / "export"
        with self.trainer.weights.averaged(), self.trainer.backend.exporting():
            if self.leads:
                folder.mkdir(exist_ok=True)
                self.trainer.adapter.export(str(folder))


class _Discard:
    """Stands in for metrics.jsonl in every process but the first."""

    def write(self, row: Mapping[str, Any]) -> None:
        return None

    def __enter__(self) -> _Discard:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def machine() -> dict[str, Any]:
    """What a recorded result says of where it came from: class, not name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device, "architecture": platform.machine(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
