"""Evaluate what a source names: load the model once, judge it as it is and as it was tuned, write the results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from flowrl.checkpoint import store
from flowrl.config.rewards import judging
from flowrl.config.schema import Config
from flowrl.distributed.backend import Backend
from flowrl.errors import UserError
from flowrl.evaluation.features import load_features
from flowrl.evaluation.paired import Evaluated, evaluate
from flowrl.evaluation.results import write_results
from flowrl.evaluation.sources import Source
from flowrl.protocols import PipelineAdapter
from flowrl.scoring.runtime import RewardRuntime
from flowrl.training.build import bare_adapter, judged_prompts, load_adapter
from flowrl.training.run import machine
from flowrl.training.search import searching_of
from flowrl.training.weights import Weights, snapshot_reference

Block = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Subject:
    """A model to be judged. base, tuned: blocks within which it has those weights; tuned is None for a model as it is."""

    adapter: PipelineAdapter
    base: Block
    tuned: Block | None
    iteration: int = 0
    alarm: tuple[str, ...] = ()


def evaluate_source(
    source: Source, command: str, backend: Backend, write: Callable[[str], object]
) -> dict[str, Any] | None:
    """Evaluate and write the results into ``source.out``; returns what evaluation.json holds, None beside the first process.

    Every process of ``backend`` calls this. Feature networks, prompts and rewards are read before the model.
    """
    config = source.config
    networks = load_features(config.evaluation.features) if backend.leads else {}
    prompts = judged_prompts(config)
    with RewardRuntime(judging(config), config.failures) as rewards:
        judges = rewards.for_evaluation()
        if config.threads:
            torch.set_num_threads(config.threads)
        subject = load_subject(source, backend.device, write if backend.leads else _silent)

        searching = searching_of(config, subject.adapter, judges, prompts[0], subject.base)

        def judged(which: str, block: Block) -> Evaluated:
            with block():
                return evaluate(
                    config, subject.adapter, judges, prompts, which, subject.iteration, backend,
                    None if searching is None else searching.draw,
                )  # fmt: skip

        base = judged("base", subject.base)
        tuned = judged("tuned", subject.tuned) if subject.tuned else None
        spent = None if searching is None else searching.facts(backend)
    if not backend.leads:
        return None
    facts = {
        "command": command, "source": str(source.path), "kind": source.kind, "iteration": subject.iteration,
        "machine": machine(), "alarm": list(subject.alarm),
    }  # fmt: skip
    facts |= {} if spent is None else {"search": spent}
    return write_results(source.out, config, networks, facts, base, tuned)


def _silent(text: str) -> None:
    """Takes the place of printing in every process but the first."""


def load_subject(source: Source, device: torch.device, write: Callable[[str], object]) -> Subject:
    """Load the model that a source names, with both sets of weights."""
    config = source.config
    if source.kind in ("run", "checkpoint"):
        return _trained(source, config, device, write)
    if source.kind == "lora" and config.condition.attributes:
        raise UserError(
            f"{source.path}: a LoRA lacks the vectors of condition.attributes; evaluate the run or a checkpoint"
        )
    adapter = bare_adapter(config, device)
    if source.kind == "lora":
        adapter.load_lora(str(source.path))
        return Subject(adapter, adapter.lora_off, nullcontext)
    return Subject(adapter, nullcontext, None)


def _trained(source: Source, config: Config, device: torch.device, write: Callable[[str], object]) -> Subject:
    """The weights of a checkpoint, averaged where the run averages them, and those it started from."""
    loaded = store.load(source.checkpoints, source.iteration)
    for warning in loaded.warnings:
        write(f"warning: {warning}")
    adapter = load_adapter(config, device)
    weights = Weights(adapter.trainable(), config.ema.decay, config.ema.every)
    reference = adapter.lora_off if config.model.train == "lora" else snapshot_reference(weights)
    weights.load(loaded.state)
    fired = tuple(loaded.info.get("alarm", ()))
    return Subject(adapter, reference, weights.averaged, loaded.iteration, fired)
