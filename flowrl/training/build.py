"""From a checked config to the parts of a run: prompts first, rewards next, the model last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flowrl import registry, rng
from flowrl.config.rewards import judging
from flowrl.config.schema import Config
from flowrl.data.conditions import in_turn, multiply_out
from flowrl.data.prompts import read_prompts
from flowrl.data.sampler import weights_by_tag
from flowrl.distributed.backend import Backend
from flowrl.evaluation.features import FeatureNetwork, load_features
from flowrl.protocols import PipelineAdapter
from flowrl.records import PromptRow
from flowrl.rollout.conditions import Conditioned
from flowrl.scoring.runtime import RewardRuntime
from flowrl.training.trainer import Trainer
from flowrl.training.update import Reference
from flowrl.training.weights import Weights, snapshot_reference
from flowrl.worlds.prompts import evaluation_rows, tag_weights, world_rows


@dataclass(frozen=True)
class Parts:
    """A trainer and what evaluation needs beside it. features: by name, in the first process alone."""

    trainer: Trainer
    evaluation_rewards: RewardRuntime
    evaluation_prompts: Sequence[PromptRow]
    reference: Reference
    features: Mapping[str, FeatureNetwork] = field(default_factory=dict)


def training_prompts(config: Config) -> tuple[list[PromptRow], list[float] | None]:
    """The rows to train on and how likely each is drawn (None: one pass after another)."""
    if config.data.prompts.startswith("world/"):
        rows = world_rows(config.data.prompts, "train")
        return rows, weights_by_tag(rows, config.data.tags) if config.data.tags else tag_weights(rows)
    rows = read_prompts(Path(config.data.prompts), config.data.format)
    return rows, weights_by_tag(rows, config.data.tags) if config.data.tags else None


def held_out_prompts(config: Config) -> list[PromptRow]:
    """The evaluation prompts: a stratified pick of the world's held-out sentences, or the first rows of a file."""
    settings = config.evaluation
    if settings.prompts.startswith("world/"):
        return evaluation_rows(settings.count, settings.seed, settings.prompts)
    return read_prompts(Path(settings.prompts), settings.format)[: settings.count]


def judged_prompts(config: Config) -> list[PromptRow]:
    """The evaluation prompts, each with its attributes where ``condition`` has any."""
    rows = held_out_prompts(config)
    return in_turn(rows, config.condition.attributes) if config.condition.attributes else rows


def evaluation_rewards(config: Config, training: RewardRuntime) -> RewardRuntime:
    """The evaluation's own rewards, or those of training where it names none; and gold in either case."""
    if not config.evaluation.rewards:
        return training.for_evaluation()
    return RewardRuntime(judging(config), config.failures).for_evaluation()


def load_adapter(config: Config, device: torch.device) -> PipelineAdapter:
    """Load the model and make its trained part ready: LoRA beside frozen weights, or all weights in float32."""
    model = config.model
    adapter = bare_adapter(config, device)
    if model.train == "lora":
        adapter.add_lora(
            model.lora.rank, model.lora.alpha, model.lora.targets, rng.key(config.seed, 0, stream="initial")
        )
    else:
        adapter.trainable().requires_grad_(True)
        if model.dtype == "bf16":
            adapter.autocast_dtype = torch.bfloat16
    if config.condition.attributes:
        return Conditioned(adapter, config.condition.attributes, config.condition.tensor)
    return adapter  # type: ignore[no-any-return]


def bare_adapter(config: Config, device: torch.device) -> Any:
    """Load the model as it is; full fine-tuning keeps its weights in float32 whatever model.dtype says."""
    model = config.model
    family: Any = registry.resolve("pipeline", model.adapter)
    half = model.dtype == "bf16" and model.train == "lora"
    return family.load(model.path, torch.bfloat16 if half else torch.float32, device)


def build(config: Config, backend: Backend, trainer_class: type[Trainer] = Trainer) -> Parts:
    """Make a trainer (of another class for studies).

    Prompts and rewards are read before the model, so that their errors come first.
    """
    rows, row_weights = training_prompts(config)
    held_out = judged_prompts(config)
    if config.condition.attributes:
        rows, row_weights = multiply_out(rows, row_weights, config.condition.attributes)
    rewards = RewardRuntime(config.rewards, config.failures)
    judged_by = evaluation_rewards(config, rewards)
    networks = load_features(config.evaluation.features) if backend.leads else {}
    if config.threads:
        torch.set_num_threads(config.threads)
    adapter = load_adapter(config, backend.device)
    if config.model.train == "lora":
        reference: Reference = adapter.lora_off
    else:
        reference = snapshot_reference(Weights(adapter.trainable()))
    trainer = trainer_class(
        config, adapter, rewards, rows, row_weights=row_weights, reference=reference, backend=backend
    )
    return Parts(trainer, judged_by, held_out, reference, networks)
