"""The training of a process reward from start to card: what its folder holds, what a kill leaves, stop signals.

training.json   what was asked for, and which checkpoint of a run drew the samples
samples/        the batches drawn, one checkpoint each
checkpoints/    network, optimizer and losses, by step
model.json, model.safetensors   the process reward, written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flowrl import __version__
from flowrl.checkpoint import store
from flowrl.checkpoint.manifest import MANIFEST
from flowrl.checkpoint.signals import StopSignals
from flowrl.config.render import to_mapping
from flowrl.config.schema import Config
from flowrl.credit.process.storage import Card, save_model
from flowrl.credit.quality import LevelQuality
from flowrl.errors import UserError
from flowrl.training.reward_model import Drawer, RewardModelSettings, RewardModelTrainer, Samples, join
from flowrl.training.trainer import Trainer

RECORD, SAMPLES, STEPS = "training.json", "samples", "checkpoints"
OWN = (RECORD, SAMPLES, STEPS, "model.json", "model.safetensors", "config.yaml")
Write = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What decides a process reward bit for bit. iterations: batches drawn; run: folder of the run that draws, "" for the
    base model."""

    config: Config
    settings: RewardModelSettings
    iterations: int
    run: str = ""

    def flat(self) -> dict[str, Any]:
        """Every setting by its name, as JSON gives it back."""
        nested = {
            "config": to_mapping(self.config), "reward model": asdict(self.settings), "iterations": self.iterations,
            "run": self.run,
        }  # fmt: skip
        made: dict[str, Any] = json.loads(json.dumps(_flat(nested)))
        return made


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inside = isinstance(value, Mapping) and value
        found |= _flat(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return found


class Journal:
    """The folder of one training. resume: go on with what is there; else the folder must hold none of it.

    every: steps between two checkpoints. Raises UserError where the folder is in use, holds nothing to go on with, or was
    begun with other settings. Nothing is written before `begin`.
    """

    def __init__(self, folder: Path, asked: Asked, *, resume: bool = False, every: int = 100) -> None:
        self.folder, self.asked, self.every = folder, asked, every
        self.drawn_by: dict[str, Any] = {}
        if resume:
            self._agree()
            return
        held = [name for name in OWN if (folder / name).exists()]
        if held:
            raise UserError(
                f"--out: {folder} already holds {held[0]}; choose another folder, or go on with the training there by the "
                "same command and --resume"
            )

    def _agree(self) -> None:
        file = self.folder / RECORD
        if not file.is_file():
            raise UserError(
                f"--resume: {self.folder} has no {RECORD}, so no training to go on with; leave --resume out"
            )
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            was, self.drawn_by = dict(record["asked"]), dict(record["drawn_by"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: cannot be read ({error}); train anew in another folder") from error
        now = self.asked.flat()
        for name in sorted(was.keys() | now.keys()):
            if was.get(name) != now.get(name):
                raise UserError(
                    f"--resume: {self.folder} was begun with {name} {was.get(name)!r}, and now it is {now.get(name)!r}; "
                    "resume with the settings that it was begun with, or train anew in another folder"
                )

    def begin(self) -> None:
        """Write training.json, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{RECORD}.part"
        draft.write_text(
            json.dumps({"asked": self.asked.flat(), "drawn_by": self.drawn_by}, indent=1), encoding="utf-8"
        )
        os.replace(draft, self.folder / RECORD)

    # -- samples ---------------------------------------------------------------------------------------------------

    def batches(self, write: Write) -> dict[int, Samples]:
        """The batches on disk that verify, by number. A damaged one is told of and will be drawn again: it comes out the same."""
        root = self.folder / SAMPLES
        found = {}
        for number in sorted({entry.iteration for entry in store.list_checkpoints(root)}):
            try:
                found[number] = Samples.of(store.load(root, number).state)
            except UserError as error:
                write(f"warning: batch {number + 1} is drawn again: {error}")
        return found

    def keep_batch(self, number: int, samples: Samples) -> None:
        store.save(self.folder / SAMPLES, number, samples.state(), info=_info(), keep=max(2, self.asked.iterations))

    def load_generator(self, trainer: Trainer) -> None:
        """Give the trainer the weights that draw: of the run's last checkpoint, and when resumed of that very one again."""
        if not self.asked.run:
            return
        at = self.drawn_by.get("iteration")
        loaded = store.load(Path(self.asked.run) / "checkpoints", at)
        digest = hashlib.sha256((loaded.path / MANIFEST).read_bytes()).hexdigest()
        if self.drawn_by.get("digest", digest) != digest:
            raise UserError(
                f"--resume: the checkpoint of iteration {at} in {self.asked.run} is not the one that drew the first samples; "
                "was the run begun anew? Train anew in another folder"
            )
        trainer.load_state(loaded.state)
        self.drawn_by = {"iteration": loaded.iteration, "digest": digest}
        self.begin()

    # -- training --------------------------------------------------------------------------------------------------

    def restore(self, made: RewardModelTrainer, write: Write) -> None:
        """Load the last checkpoint of the network, where there is one."""
        root = self.folder / STEPS
        if not store.list_checkpoints(root):
            return
        loaded = store.load(root)
        for warning in loaded.warnings:
            write(f"warning: {warning}")
        made.load(loaded.state)
        write(f"going on at step {made.step} of {made.settings.steps}")

    def keep_network(self, made: RewardModelTrainer) -> None:
        store.save(self.folder / STEPS, made.step, made.state(), info=_info(), keep=2)

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.asked.settings.steps


def _info() -> dict[str, Any]:
    return {"flowrl": __version__, "torch": torch.__version__}


def train_reward_model(
    trainer: Trainer, journal: Journal, write: Write, again: str = "the same command and --resume"
) -> list[LevelQuality]:
    """Draw what is missing of the samples, train, calibrate, judge, and write the process reward; returns the report.

    again: the command that goes on after a stop. A batch drawn is on disk at once, the network every ``journal.every`` steps.
    Raises SystemExit with 143 or 130 after a stop signal, all that was done on disk.
    """
    journal.begin()
    with StopSignals() as stop:

        def stopping(at: str) -> None:
            if stop.requested:
                write(f"stopped at {at}; go on with: {again}")
                raise SystemExit(stop.exit_code)

        made = RewardModelTrainer(trainer, journal.asked.settings, _collect(trainer, journal, write, stopping))
        journal.restore(made, write)

        def after() -> None:
            if stop.requested or journal.due(made.step):
                journal.keep_network(made)
            if made.step < made.settings.steps:  # what follows the last step is short
                stopping(f"step {made.step} of {made.settings.steps}")

        loss = made.fit(write, after)
        temperature, offset = made.calibration()
        found = made.judge(temperature, offset)
        save_model(journal.folder, made.network, _card(journal.asked, made, loss, temperature, offset, found))
    return found


def _collect(trainer: Trainer, journal: Journal, write: Write, stopping: Callable[[str], None]) -> Samples:
    """All batches' samples: those on disk, and the others drawn and written there."""
    count = journal.asked.iterations
    held = journal.batches(write)
    missing = [number for number in range(count) if number not in held]
    if missing:
        journal.load_generator(trainer)
        draw = Drawer(trainer)
    for number in missing:
        held[number] = draw(number)
        journal.keep_batch(number, held[number])
        write(f"batch {number + 1} of {count}: mean score {float(held[number].score.nanmean()):.4f}")
        stopping(f"batch {number + 1} of {count}")
    return join([held[number] for number in range(count)])


def _card(
    asked: Asked, made: RewardModelTrainer, loss: float, temperature: list[float], offset: list[float],
    found: list[LevelQuality],
) -> Card:  # fmt: skip
    settings, config = asked.settings, asked.config
    facts = {
        "settings": asdict(settings), "loss": loss, "samples": len(made.samples.score),
        "groups": len(made.training_groups), "held_out_groups": len(made.held_out), "adapter": config.model.adapter,
        "path": config.model.path, "parameters": sum(p.numel() for p in made.network.parameters()),
        "rewards": [{"name": e.name, "weight": e.weight} for e in config.rewards],
    }  # fmt: skip
    return Card(
        settings.kind, made.network_settings, settings.levels, temperature, offset, list(settings.features),
        [q.as_json() for q in found], facts,
    )  # fmt: skip
