"""A text run from its config: the supervised start (kept between runs), the iterations, metrics.jsonl."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowrl import __version__
from flowrl.config import to_yaml
from flowrl.errors import UserError
from flowrl.text import credit, tasks
from flowrl.text.config import TextConfig
from flowrl.text.model import Critic, build, pretrain
from flowrl.text.trainer import Trainer
from flowrl.tracking.jsonl import JsonLines

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Say = Callable[[str], None]


def base_model(config: TextConfig, say: Say) -> LlamaForCausalLM:
    """Make the supervised start, or read it where ``pretraining.cache`` has one of equal settings."""
    from safetensors.torch import load_file, save_file

    task = tasks.make(config.task.name, config.task.terms)
    positions = len(task.problem(0).prompt) + tasks.longest(task)
    model = build(config.model, positions, config.pretraining.seed)
    settings: list[Any] = [asdict(config.task), asdict(config.model), asdict(replace(config.pretraining, cache=""))]
    settings += [config.threads, torch.__version__, __version__]
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(config.pretraining.cache) / f"{name}.safetensors"
    if config.pretraining.cache and path.is_file():
        model.load_state_dict(load_file(path))
        return model
    loss = pretrain(model, task, config.pretraining)
    say(f"supervised start: {config.pretraining.steps} steps, last loss {loss:.3f} nats a token")
    if config.pretraining.cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        save_file({key: x.contiguous() for key, x in model.state_dict().items()}, unfinished)
        unfinished.replace(path)
    return model


def make_trainer(config: TextConfig, say: Say) -> Trainer:
    """Build everything that a config names. Sets torch's thread count."""
    torch.set_num_threads(config.threads)
    model = base_model(config, say)
    critic = Critic(copy.deepcopy(model.model)) if credit.needs_value(config.advantage.name) else None
    return Trainer(config, tasks.make(config.task.name, config.task.terms), model, critic)


def train(config: TextConfig, say: Say, command: str = "") -> list[dict[str, Any]]:
    """Run a config to its end; return the rows of its metrics.jsonl.

    say: takes one line an iteration. The run directory gets config.yaml, metrics.jsonl and model.safetensors. Raises
    UserError where it holds another run.
    """
    from safetensors.torch import save_file

    folder = Path(config.run_dir)
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"run_dir: {folder} holds a run already; give another run_dir, or delete the folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"# flowrl {__version__}: {command}\n{to_yaml(config)}", encoding="utf-8")
    trainer = make_trainer(config, say)
    rows: list[dict[str, Any]] = []
    with JsonLines(folder / "metrics.jsonl") as metrics:

        def record(row: dict[str, Any]) -> None:
            rows.append(row)
            metrics.write(row)
            say(_line(row))

        record({"iteration": 0, "samples": 0, "tokens": 0, "eval/accuracy": trainer.evaluate()})
        done = 0
        while not trainer.finished:
            row = trainer.iterate()
            due = config.evaluation.points * trainer.generated // config.tokens
            if due > done or trainer.finished:
                row["eval/accuracy"], done = trainer.evaluate(), due
            record(row)
    save_file({key: x.contiguous() for key, x in trainer.model.state_dict().items()}, folder / "model.safetensors")
    return rows


def _line(row: dict[str, Any]) -> str:
    parts = [f"iteration {row['iteration']}", f"samples {row['samples']}", f"tokens {row['tokens']}"]
    if "reward/outcome/mean" in row:
        parts.append(f"reward {row['reward/outcome/mean']:.3f}")
    if "eval/accuracy" in row:
        parts.append(f"held-out accuracy {row['eval/accuracy']:.3f}")
    if "time/rollout_s" in row:
        parts.append(f"{row['time/rollout_s'] + row['time/update_s']:.2f} s")
    return ", ".join(parts)
