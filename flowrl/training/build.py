"""From a checked config to the parts of a run: prompts first, rewards next, the model last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowrl import registry, rng
from flowrl.config.model import require
from flowrl.config.rewards import judging
from flowrl.config.schema import Config
from flowrl.data.conditions import in_turn, multiply_out
from flowrl.data.prompts import read_prompts
from flowrl.data.sampler import weights_by_tag
from flowrl.distributed.backend import Backend
from flowrl.distributed.replicas import check_models
from flowrl.errors import UserError
from flowrl.evaluation.features import FeatureNetwork, load_features
from flowrl.fit import check_model, device_bytes
from flowrl.protocols import Configurable, PipelineAdapter
from flowrl.records import PromptRow
from flowrl.rollout.conditions import Conditioned
from flowrl.rollout.policy import Policy
from flowrl.rollout.requests import request_of
from flowrl.scoring.runtime import RewardRuntime
from flowrl.training.trainer import Trainer
from flowrl.training.update import Reference
from flowrl.training.weights import Weights, adamw, snapshot_reference
from flowrl.worlds.prompts import evaluation_rows, tag_weights, world_rows

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        tags = config.data.tags
        return rows, weights_by_tag(rows, tags) if tags else tag_weights(rows, config.data.prompts)
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


def load_adapter(config: Config, device: torch.device, apart: bool = False) -> PipelineAdapter:
    """Load the model and make its trained part ready: LoRA beside frozen weights, or all weights in float32.

    apart: leave the trained network in main memory, for a device that could not hold it whole.
    """
    model = config.model
    adapter = bare_adapter(config, device, apart)
    if model.train == "lora":
        adapter.add_lora(
            model.lora.rank, model.lora.alpha, model.lora.targets, rng.key(config.seed, 0, stream="initial")
        )
    else:
        adapter.trainable().requires_grad_(True)
        adapter.autocast_dtype = HALVES.get(model.dtype)
    if config.condition.attributes:
        return Conditioned(adapter, config.condition.attributes, config.condition.tensor)
    return adapter  # type: ignore[no-any-return]


def bare_adapter(config: Config, device: torch.device, apart: bool = False) -> Any:
    """Load the model as it is, to run as ``model`` says; full fine-tuning keeps float32 weights whatever model.dtype says."""
    model = config.model
    require(model)
    family: Any = registry.resolve("pipeline", model.adapter)
    dtype = HALVES.get(model.dtype, torch.float32) if model.train == "lora" else torch.float32
    pinned = (model.revision,) if model.revision else ()
    apart = apart and hasattr(family, "bring")
    adapter = family.load(model.path, dtype, torch.device("cpu") if apart else device, *pinned)
    if apart:
        adapter.bring(device)
    if model.optioned:
        _configurable(adapter, model.adapter).configure(model)
    return adapter


def _configurable(adapter: object, name: str) -> Configurable:
    if not isinstance(adapter, Configurable):
        raise UserError(
            f"model.adapter: {name} runs its model in one way only (it has no configure and free_text_encoders); leave out "
            "activation_checkpointing, compile, attention, free_text_encoders, vae_tiling and vae_slicing"
        )
    return adapter


def free_text_encoders(config: Config, adapter: Any, rows: Sequence[PromptRow]) -> None:
    """Encode the prompts of ``rows`` once and drop the text encoders, where the config asks for it."""
    if config.model.free_text_encoders:
        inner = adapter.inner if isinstance(adapter, Conditioned) else adapter
        size = config.batch.micro_batch
        _configurable(inner, config.model.adapter).free_text_encoders([request_of(config, row) for row in rows], size)


def splits(config: Config, backend: Backend) -> bool:
    """Whether the network is to lie in parts."""
    return config.distributed.sharding != "none" and backend.world > 1


def shard(config: Config, adapter: PipelineAdapter, row: PromptRow, backend: Backend) -> None:
    """Split the network over the processes where ``distributed.sharding`` says so and there are several."""
    if not splits(config, backend):
        return
    network, request = adapter.trainable(), request_of(config, row)
    check_models(dict(network.named_parameters()), backend)
    schedule = adapter.schedule(config.rollout.steps, request)
    policy = Policy(adapter, schedule, "ode", 0.0, config.rollout.guidance)
    given = policy.encode([request]).positive
    x = rng.normal([rng.key(config.seed, 0, stream="initial")], adapter.latent_shape(request)).to(adapter.device)
    t = schedule.t[:1].to(adapter.device)
    backend.shard(
        network, config.distributed.sharding, config.distributed.gather, lambda: adapter.predict(x, t, given).value,
        partial(adamw, config.optimizer),
    )  # fmt: skip


def build(config: Config, backend: Backend, trainer_class: type[Trainer] = Trainer) -> Parts:
    """Make a trainer (of another class for studies).

    Prompts and rewards are read before the model, so that their errors come first.
    """
    rows, row_weights = training_prompts(config)
    held_out = judged_prompts(config)
    if config.condition.attributes:
        rows, row_weights = multiply_out(rows, row_weights, config.condition.attributes)
    check_model(config, [*rows, *held_out], device_bytes(backend.device))
    rewards = RewardRuntime(config.rewards, config.failures)
    judged_by = evaluation_rewards(config, rewards)
    networks = load_features(config.evaluation.features) if backend.leads else {}
    if config.threads:
        torch.set_num_threads(config.threads)
    adapter = load_adapter(config, backend.device, apart=splits(config, backend))
    free_text_encoders(config, adapter, [*rows, *held_out])
    shard(config, adapter, rows[0], backend)
    if config.model.train == "lora":
        reference: Reference = adapter.lora_off
    else:
        reference = snapshot_reference(Weights(adapter.trainable(), sharded=backend.sharded))
    trainer = trainer_class(
        config, adapter, rewards, rows, row_weights=row_weights, reference=reference, backend=backend
    )
    return Parts(trainer, judged_by, held_out, reference, networks)
